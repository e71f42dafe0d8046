"""The two kinds of Ray actors that hold a model: one that decodes, and one that is a DeepSpeed rank."""

import dataclasses
import os
import socket
import time
from collections.abc import Callable

import ray
import torch

from dfactory.config.recipe import Recipe
from dfactory.decoding import decode
from dfactory.models.registry import add_adapters, load_policy, resolve_model_dir
from dfactory.redaction import remember
from dfactory.rl.liveness import Process, beating, this_process
from dfactory.rl.rollouts import DecodedGroup, GroupCall
from dfactory.rl.weights import WeightSet, load_weights
from dfactory.vocabulary import recipe_vocabulary


class RolloutActor:
    """Holds a policy and answers prompts. One call at a time, so weights never change within a rollout."""

    def __init__(self, recipe: Recipe, folder: str):
        os.chdir(folder)  # relative paths in a recipe are those of the driver
        remember(recipe)
        model_dir = resolve_model_dir(recipe.model_name_or_path)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.policy = load_policy(
            model_dir, dtype=recipe.dtype, device=device, init_weights=recipe.init_weights, seed=recipe.seed
        )
        if recipe.use_peft:
            add_adapters(self.policy, **recipe.lora_options, seed=recipe.seed)
            self.policy.to(device).eval()
        keys = dataclasses.replace(recipe.decode, block_size=recipe.block_size, seed=recipe.seed)
        self.rules = recipe_vocabulary(recipe).rules(keys)
        self.timeout_s = recipe.rollout_timeout_s
        self.version = -1

    def set_weights(self, weights: WeightSet) -> float:
        """Take a version of the weights; the seconds that it took."""
        started = time.perf_counter()
        load_weights(self.policy.model, weights, self.timeout_s)
        self.version = weights.version
        return time.perf_counter() - started

    def generate(self, calls: list[GroupCall]) -> list[DecodedGroup]:
        """Decode the groups together; the responses to one prompt share its cache (see decoding/decoder.py)."""
        started = time.perf_counter()
        prompts = [call.prompt_ids for call in calls for _ in call.noise_ids]
        noise_ids = [noise for call in calls for noise in call.noise_ids]
        rollouts = iter(decode(self.policy, prompts, self.rules, noise_ids=noise_ids))
        seconds = (time.perf_counter() - started) / len(calls)
        return [
            DecodedGroup(call.number, self.version, [next(rollouts) for _ in call.noise_ids], seconds) for call in calls
        ]

    def process(self) -> Process:
        return this_process()


class LearnerActor:
    """One DeepSpeed rank. It runs the training loop that it is given; the loop does not know that Ray is there."""

    def __init__(self, rank: int, world_size: int, folder: str):
        os.chdir(folder)  # as above
        # Ray shows an actor its own GPU only (CUDA_VISIBLE_DEVICES), so that is number 0 in every learner.
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
        self.rank = rank

    def address(self) -> tuple[str, int]:
        """Where the ranks can meet, asked of rank 0: its node's address and a port that is free there."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return host, probe.getsockname()[1]

    def run(self, recipe: Recipe, learn: Callable, address: tuple[str, int], feed) -> int:
        remember(recipe)
        if int(os.environ["WORLD_SIZE"]) > 1:  # alone it needs no port, and opens none
            os.environ.update(MASTER_ADDR=address[0], MASTER_PORT=str(address[1]))
        with beating(lambda: feed.beat(self.rank)):
            return learn(recipe, feed)

    def process(self) -> Process:
        return this_process()
