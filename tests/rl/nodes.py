"""Runs a recipe on a cluster of three nodes of one core each, all on this machine: `nodes.py RECIPE FOLDER [key=value ...]`.

Every learner leaves FOLDER/RANK.json: where it ran, where the controller and the driver ran, and how many ranks it met.
"""

import json
import os
import sys
from pathlib import Path

from dfactory.config.load import load_recipe
from dfactory.rl.access import lock_local_cluster
from dfactory.train import learn

lock_local_cluster()

import ray  # noqa: E402  (the lock comes first)
import torch.distributed as dist  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from dfactory.rl.cluster import run  # noqa: E402


def node_id(actor=None) -> str:
    return ray.get_runtime_context().get_node_id()


def main(recipe_file: str, folder: str, overrides: list[str]) -> int:
    cluster = Cluster(shutdown_at_exit=True)
    for host in ("127.0.0.2", "127.0.0.3", "127.0.0.4"):
        cluster.add_node(num_cpus=1, node_ip_address=host, include_dashboard=False)
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        ray.init(log_to_driver=True)
        driver = node_id()

        def learn_and_tell(recipe, feed) -> int:
            status = learn(recipe, feed)
            controller = ray.get(feed.controller.__ray_call__.remote(node_id))
            seen = {"learner": node_id(), "controller": controller, "driver": driver, "ranks": dist.get_world_size()}
            seen["master"] = os.environ["MASTER_ADDR"]
            (Path(folder) / f"{dist.get_rank()}.json").write_text(json.dumps(seen))
            return status

        return run(load_recipe(recipe_file, overrides), learn_and_tell)
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
