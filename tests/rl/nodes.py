"""Runs a recipe on three nodes of one core each, all of them on this machine: `nodes.py RECIPE FOLDER [key=value ...]`.

Every learner leaves FOLDER/RANK.json: on which node it was, on which the controller and the driver, and how many ranks met.
"""

import json
import sys
from pathlib import Path

from dfactory.rl.access import lock_local_cluster

lock_local_cluster()  # before Ray is imported

import ray  # noqa: E402
import torch.distributed as dist  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from dfactory.recipe import load_recipe  # noqa: E402
from dfactory.rl import cluster  # noqa: E402
from dfactory.train import learn  # noqa: E402

HOSTS = (
    "127.0.0.2",
    "127.0.0.3",
    "127.0.0.4",
)  # Ray takes 127.0.0.1 for "this machine" and replaces it by another address


def node(actor=None) -> str:
    return ray.get_runtime_context().get_node_id()


def main(recipe_file: str, folder: str, overrides: list[str]) -> int:
    def learn_and_tell(recipe, client) -> int:
        status = learn(recipe, client)
        controller = ray.get(client.controller.__ray_call__.remote(node))
        seen = {"learner": node(), "controller": controller, "driver": driver, "ranks": dist.get_world_size()}
        (Path(folder) / f"{dist.get_rank()}.json").write_text(json.dumps(seen))
        return status

    nodes = Cluster(shutdown_at_exit=True)
    for host in HOSTS:
        nodes.add_node(num_cpus=1, node_ip_address=host, include_dashboard=False)
    ray.init(address=nodes.address)
    driver = node()
    try:
        return cluster.run(load_recipe(recipe_file, overrides), learn_and_tell)
    finally:
        ray.shutdown()
        nodes.shutdown()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
