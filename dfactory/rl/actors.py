"""The two kinds of Ray actors that hold a model: one that decodes, and one that is a DeepSpeed rank.

When a step trains on a rollout, the weights may be newer than those that decoded it. The ratio then needs the decoding
policy's log-probabilities of the rollout's views. For `trace` the decoder has recorded them. ELBO views do not exist during
decoding, so the rollout actor scores them right after it has decoded, under the same weights. No process keeps old
weights: the learner needs no memory for them, and skips the pass that it makes for fresh rollouts. The price is a forward
over the views of every group, those without a signal included: 1.06 seconds beside 1.75 of decoding for 192 rollouts of
the quickstart's recipe with ELBO views.
"""

import dataclasses
import os
import socket
import time
from collections.abc import Callable

import numpy as np
import ray
import torch

from dfactory.algorithms.rollouts import rollout_views
from dfactory.algorithms.trace import all_steps
from dfactory.allocator import bound_freed_memory, keep_freed_memory
from dfactory.inference import Pipeline
from dfactory.models.adapters import add_adapters
from dfactory.models.registry import load_policy
from dfactory.noise import RandomMask
from dfactory.recipe import Recipe
from dfactory.redaction import remember
from dfactory.rl.liveness import Process, beating, this_process
from dfactory.rl.rollouts import DecodedGroup, GroupCall, ScoredRollout
from dfactory.rl.rows import RolloutRows, by_rollout, pads_on
from dfactory.rl.source import recorded
from dfactory.rl.weights import WeightSet, load_weights
from dfactory.vocabulary import recipe_vocabulary


class RolloutActor:
    """Holds a policy and decodes prompts. It runs one call at a time, so weights never change within a rollout."""

    def __init__(self, recipe: Recipe, folder: str):
        os.chdir(folder)  # relative paths in a recipe are those of the driver
        remember(recipe)
        keep_freed_memory()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        vocabulary = recipe_vocabulary(recipe)
        self.policy = load_policy(
            recipe.model_name_or_path,
            revision=recipe.model_revision,
            dtype=recipe.dtype,
            device=device,
            init_weights=recipe.init_weights,
            seed=recipe.seed,
            merged=True,
            token_ranges=recipe.token_ranges,
            logit_shift=recipe.logit_shift,
            mask=vocabulary.new_mask,
        )
        if recipe.use_peft:
            add_adapters(self.policy, **recipe.lora_options, seed=recipe.seed)
            self.policy.to(device).eval()
        keys = dataclasses.replace(recipe.decode_keys, seed=recipe.seed)
        self.pipeline = Pipeline.of(self.policy, vocabulary, keys)
        self.scores = recipe.actors_score
        mask_id = self.pipeline.rules.mask_token_id
        masks = RandomMask(mask_id, recipe.seed, **recipe.mask_options)
        layout = (recipe.aligned_block_size, recipe.row_length or recipe.longest_record)
        padded = pads_on(device)
        self.rows = RolloutRows(
            rollout_views(recipe, masks), *layout, train_after_eos=recipe.train_after_eos, padded=padded
        )
        self.trace_rows = RolloutRows(all_steps(mask_id), *layout, padded=padded)
        self.timeout_s = recipe.rollout_timeout_s
        self.version = -1

    def set_weights(self, weights: WeightSet) -> float:
        """Load a version of the weights. Returns the seconds that it took."""
        started = time.perf_counter()
        load_weights(self.policy.model, weights, self.timeout_s)
        self.version = weights.version
        return time.perf_counter() - started

    def generate(self, calls: list[GroupCall]) -> list[DecodedGroup]:
        """Decode the groups together; the responses to one prompt share its cache (see decoding/decoder.py)."""
        started = time.perf_counter()
        prompts = [call.prompt_ids for call in calls for _ in call.noise_ids]
        noise_ids = [noise for call in calls for noise in call.noise_ids]
        decoded = iter(self.pipeline.decode(prompts, noise_ids=noise_ids))
        rollouts = [
            ScoredRollout(call.number, index, next(decoded), 0.0, 0.0)
            for call in calls
            for index in range(len(call.noise_ids))
        ]
        old = self._old_logprobs(rollouts) if self.scores else None
        gap = self.decoder_gap(rollouts[0])
        bound_freed_memory()
        seconds, stop, groups = (time.perf_counter() - started) / len(calls), 0, []
        for call in calls:
            here = slice(stop, stop := stop + len(call.noise_ids))
            members = [scored.rollout for scored in rollouts[here]]
            groups.append(
                DecodedGroup(call.number, self.version, members, seconds, old and old[here], None if groups else gap)
            )
        return groups

    @torch.no_grad()
    def _old_logprobs(self, rollouts: list[ScoredRollout]) -> list[np.ndarray]:
        """Log-probabilities, under the weights that decoded, of the views that learners will train on."""
        batches = self.rows.build(rollouts)
        return by_rollout(batches, [self.policy.score(batch).logprob_N for batch in batches], len(rollouts))

    @torch.no_grad()
    def decoder_gap(self, scored: ScoredRollout) -> float | None:
        """How far the decoder's distribution is from the trained one: the mean of |p / recorded p - 1| over the tokens of a
        rollout. It comes from suppressed tokens and rounding. None if the steps cannot be rebuilt."""
        rollout = scored.rollout
        if rollout.edits or self.pipeline.rules.mask_token_id in rollout.token_ids:
            return None
        total = count = 0.0
        for batch in self.trace_rows.build([scored]):
            gap_N = (self.policy.score(batch).logprob_N.cpu() - recorded(batch, [scored])).expm1().abs()
            total, count = total + gap_N.sum().item(), count + len(gap_N)
        return total / count

    def process(self) -> Process:
        return this_process()


class LearnerActor:
    """One DeepSpeed rank. It runs the training loop that it is given; the loop does not know about Ray."""

    def __init__(self, rank: int, world_size: int, folder: str):
        os.chdir(folder)  # as above
        # An actor sees only its own GPU (CUDA_VISIBLE_DEVICES), which is number 0 in every learner.
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
        self.rank = rank

    def address(self) -> tuple[str, int]:
        """The rendezvous of the ranks; call it on rank 0. Its node's address and a free port."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return host, probe.getsockname()[1]

    def run(self, recipe: Recipe, learn: Callable, address: tuple[str, int], client) -> int:
        """Train to the end; `client` reaches the controller. Returns the exit status."""
        remember(recipe)
        keep_freed_memory()
        if int(os.environ["WORLD_SIZE"]) > 1:  # a single rank opens no port
            os.environ.update(MASTER_ADDR=address[0], MASTER_PORT=str(address[1]))
        with beating(lambda: client.beat(self.rank)):
            return learn(recipe, client)

    def process(self) -> Process:
        return this_process()
