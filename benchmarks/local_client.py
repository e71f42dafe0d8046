"""Clients of rollouts in this process, for benchmarks and tests.

A RolloutSource asks them for batches as it asks the controller on Ray: `publish` takes the learner's weights, `next_batch`
returns scored rollouts.
"""

import asyncio
import threading
from collections.abc import Iterable
from typing import Any

import torch

from dfactory.models.policy import Policy
from dfactory.recipe import Recipe
from dfactory.rl.controller import Controller
from dfactory.rl.rollouts import RolloutBatch
from dfactory.rl.weights import WeightSet

Weights = Iterable[dict[str, torch.Tensor]]


def copy_weights(policy: Policy, groups: Weights) -> None:
    """Write published weights into the tensors of a policy."""
    own = policy.model.state_dict()
    for group in groups:
        for name, tensor in group.items():
            own[name].copy_(tensor)


class LocalCall:
    """A method of a rollout actor that is not a process of its own."""

    def __init__(self, method):
        self.method = method

    async def remote(self, *arguments):
        return await asyncio.to_thread(self.method, *arguments)


class LocalClient:
    """A controller, in a thread, with one rollout actor whose methods are LocalCalls."""

    def __init__(self, recipe: Recipe, actor: Any, timeout_s: float):
        self.actor, self.timeout_s = actor, timeout_s
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.controller = self._wait(self._start(recipe))

    async def _start(self, recipe: Recipe) -> Controller:
        return Controller(recipe, lambda index: self.actor)

    def _wait(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(self.timeout_s)

    def publish(self, version: int, groups: Weights) -> dict[str, float]:
        """The actor gets the version; a subclass gives it the weights."""
        self._wait(self.controller.publish(WeightSet(version, [], 0, 0.0)))
        return {}

    def next_batch(self, version: int, next_group: int) -> RolloutBatch:
        return self._wait(self.controller.next_batch(version, next_group))

    def close(self) -> None:
        self.controller.scorer.close()
        self.loop.call_soon_threadsafe(self.loop.stop)
