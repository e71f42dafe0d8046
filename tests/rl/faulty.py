"""`dfactory train` whose learners can lose the weights they have published: `faulty.py RECIPE key=value ...`, with the Ray
cluster in RAY_ADDRESS. The file `lose` beside output_dir is the order to do so, and is taken away.
"""

import sys
from pathlib import Path

import ray

from dfactory import cli, train


class Owner:
    """An object in the store is lost with the process that put it there."""

    def put(self, bucket) -> list:
        return [ray.put(bucket)]


def learn(recipe, client) -> int:
    from dfactory.rl import cluster
    from dfactory.train import learn as learn_well

    put, order = cluster.put_weights, Path(recipe.output_dir).parent / "lose"

    def put_and_lose(version, groups):
        weights = put(version, groups)
        if not order.exists():
            return weights
        order.unlink()
        owner = ray.remote(num_cpus=0)(Owner).remote()
        lost = [ray.get(owner.put.remote(bucket))[0] for bucket in weights.buckets]
        ray.kill(owner)
        return weights._replace(buckets=lost)

    cluster.put_weights = put_and_lose
    return learn_well(recipe, client)


if __name__ == "__main__":
    train.learn = learn
    sys.exit(cli.main(["train", *sys.argv[1:]]))
