"""The controller decides which groups are decoded when, by which actor and with which weights, and handles failures.

Groups of G rollouts are numbered in the order of the prompts. A step trains on the next `prompts_per_step` groups with a
signal, `num_iterations` times, and each time makes a new version of the weights. A group may be submitted when the version
that will first train on it is at most `max_staleness` ahead of the newest published weights:

    next version to be trained on new rollouts
        + num_iterations * (groups outstanding // prompts_per_step)  <=  version of the weights + max_staleness

With max_staleness below num_iterations training is synchronous: no group is decoded until the new weights are published.
Groups are consumed in the order of their numbers, so in that mode a run and its resumption decode exactly the same.

Each group is decoded once: its number is the key. A rollout actor that dies, or does not answer in time, is killed and
replaced, and its groups go back to the front of the queue; late results of the old actor are dropped. If an actor cannot
be replaced, because its node is gone, the controller keeps trying as long as another actor works; the missing one holds
no groups.
"""

import asyncio
import collections
import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from dfactory.errors import RolloutError
from dfactory.recipe import Recipe
from dfactory.rl.advantage import group_advantages
from dfactory.rl.liveness import Process, Pulse, this_process, why
from dfactory.rl.metrics import batch_metrics
from dfactory.rl.prompts import PromptStream
from dfactory.rl.rollouts import DecodedGroup, GroupCall, RolloutBatch
from dfactory.rl.scoring import ScoredGroup, Scorer
from dfactory.rl.weights import WeightSet

LONGEST_PAUSE_S = 30.0  # between two attempts to start a rollout actor


class Controller:
    """An asynchronous Ray actor; every learner rank calls `next_batch`, rank 0 also `publish`.

    `make_actor` starts a rollout actor (in its bundle of the placement group); `folder` is the driver's.
    """

    def __init__(self, recipe: Recipe, make_actor: Callable[[int], Any], folder: str = "."):
        os.chdir(folder)
        self.recipe = recipe
        self.prompts = PromptStream(recipe)
        self.scorer = Scorer(recipe, self.prompts)
        self.workers = [RolloutWorker(self, index, make_actor) for index in range(recipe.num_rollout_workers)]
        self.waiting: collections.deque[_Group] = collections.deque()  # submitted, not with a worker
        self.groups: collections.deque[_Group] = collections.deque()  # submitted, not consumed, by number
        self.weights: WeightSet | None = None
        self.new_weights = asyncio.Event()  # a new event for every version
        # the version that takes the next rollouts; None until a learner has sent the run's position
        self.next_version: int | None = None
        self.next_group = 0
        self.batches: dict[int, asyncio.Future] = {}
        self.restarts = 0
        self.problem: BaseException | None = None  # why the run cannot continue
        self.pulse = Pulse(recipe.num_learners)

    async def process(self) -> Process:
        return this_process()

    async def beat(self, rank: int) -> None:
        """Record a learner's heartbeat."""
        self.pulse.beat(rank)

    async def silence(self) -> dict[int, float]:
        return self.pulse.silence()

    async def publish(self, weights: WeightSet) -> None:
        """Use these weights for all decoding that starts from now on."""
        self.weights = weights
        self.new_weights.set()
        self.new_weights = asyncio.Event()
        self._submit()

    async def next_batch(self, version: int, next_group: int) -> RolloutBatch:
        """The rollouts of the step that makes version + 1. All ranks call this and get the same batch."""
        if version not in self.batches:
            for done in [other for other in self.batches if other < version]:
                del self.batches[done]
            self.batches[version] = asyncio.ensure_future(self._collect(version, next_group))
        return await asyncio.shield(self.batches[version])

    async def faults(self) -> dict[str, int]:
        return {"rollout_restarts": self.restarts, **self.scorer.outcomes()}

    # --- groups ------------------------------------------------------------------------------------------------------

    async def _collect(self, version: int, next_group: int) -> RolloutBatch:
        started = time.perf_counter()
        if self.next_version is None:
            self.next_group = next_group  # a resumed run continues at its checkpoint's position
        self.next_version = version
        while self.weights is None or self.weights.version + self.recipe.max_staleness < version:
            await self.new_weights.wait()  # another rank may call before rank 0 has published
        self._submit()
        used: list[ScoredGroup] = []
        seen: list[ScoredGroup] = []
        while len(used) < self.recipe.prompts_per_step or not any(group.has_signal for group in used):
            scored = await self._finished(self.groups[0])
            self.groups.popleft()
            seen.append(scored)
            if scored.has_signal or self.recipe.zero_signal == "drop":
                used.append(scored)
            self._refuse_barren(seen)
            goes_on = not any(group.has_signal for group in used)
            self._submit(collected=min(len(used), self.recipe.prompts_per_step - goes_on))
        self.next_version = version + self.recipe.num_iterations
        metrics = batch_metrics(seen, version) | {
            "seconds/rollout_wait": time.perf_counter() - started,
            "rollout_restarts": float(self.restarts),
        }
        self.scorer.write_samples(version + 1, seen)
        self.scorer.write_groups(version + 1, seen, used)
        rollouts = [rollout for scored in used if scored.has_signal for rollout in scored.rollouts()]
        self._submit()
        following = seen[-1].number + 1
        return RolloutBatch(rollouts, following, self.prompts.epoch(following), metrics)

    def _submit(self, collected: int = 0) -> None:
        if self.weights is None or self.next_version is None:
            return
        newest = self.weights.version + self.recipe.max_staleness  # version that may train on what is decoded now
        while self._version_of(collected + len(self.groups)) <= newest:
            group = _Group(self.prompts.call(self.next_group))
            if self.problem is not None:
                group.fail(self.problem)
            self.next_group += 1
            self.groups.append(group)
            self.waiting.append(group)
        for worker in self.workers:
            worker.wake()

    def _version_of(self, ahead: int) -> int:
        """The version that will first train on a group with `ahead` unconsumed groups before it."""
        return self.next_version + self.recipe.num_iterations * (ahead // self.recipe.prompts_per_step)

    async def _finished(self, group: "_Group") -> ScoredGroup:
        """The group, decoded and scored. The reward pool returns in bounded time, also if a reward hangs."""
        recipe = self.recipe
        limit = recipe.max_rollout_attempts * (recipe.cluster_timeout_s + 3 * recipe.rollout_timeout_s)
        try:
            await asyncio.wait_for(asyncio.shield(group.decoded), limit)
        except TimeoutError:
            raise RolloutError(
                f"no rollouts of group {group.call.number} ({self.prompts.origin(group.call.number)}) after {limit:.0f} s: "
                f"{'; '.join(worker.state for worker in self.workers)}; rollout_timeout_s bounds one decoding call"
            ) from None
        return await group.done

    def _refuse_barren(self, seen: list[ScoredGroup]) -> None:
        """Raise RolloutError after max_steps_without_signal steps' worth of groups in a row without a signal. This also ends
        a step that already has some groups and would wait for the others forever."""
        limit = self.recipe.max_steps_without_signal * self.recipe.prompts_per_step
        barren = list(itertools.takewhile(lambda group: not group.has_signal, reversed(seen)))
        if len(barren) < limit:
            return
        rewards = [reward for group in barren for reward in group.rewards if reward is not None]
        self.scorer.write_samples(self.next_version + 1, barren)
        count = self.recipe.num_generations
        equal = f"in every group all {count} rewards were equal (mean {statistics.fmean(rewards or [0.0]):.3f})"
        raise RolloutError(
            f"none of {len(barren)} groups had a signal: {equal if rewards else 'no rollout got a reward'}; reward outcomes "
            f"{self.scorer.outcomes()}{self.scorer.complaints()}; check the reward on the completions in "
            f"{self.scorer.samples_path}, or raise decode.temperature or num_generations"
        )

    def take(self, most: int) -> list["_Group"]:
        """Waiting groups for a free worker, oldest first: its even share of the queue."""
        share = max(1, -(-len(self.waiting) // len(self.workers)))
        return [self.waiting.popleft() for _ in range(min(most, share, len(self.waiting)))]

    def requeue(self, groups: list["_Group"], reason: str) -> None:
        """Put groups whose worker failed back at the front of the queue; one that has failed too often ends the run."""
        for group in reversed(groups):
            group.attempts += 1
            if group.attempts >= self.recipe.max_rollout_attempts:
                group.fail(
                    RolloutError(
                        f"group {group.call.number} ({self.prompts.origin(group.call.number)}) failed "
                        f"{group.attempts} times, the last time because {reason}"
                    )
                )
            else:
                self.waiting.appendleft(group)
        for worker in self.workers:
            worker.wake()

    def fail(self, problem: BaseException) -> None:
        """End the run: every pending group raises the problem."""
        self.problem = problem
        self.waiting.clear()
        for group in self.groups:
            group.fail(problem)

    def check_workers(self) -> None:
        """End the run if every worker has failed max_rollout_attempts times in a row to start its actor."""
        tries = self.recipe.max_rollout_attempts
        if all(worker.failed_starts >= tries for worker in self.workers):
            reasons = "; ".join(worker.state for worker in self.workers)
            self.fail(RolloutError(f"no rollout actor could be restarted, with {tries} attempts each: {reasons}"))

    async def score(self, group: "_Group", decoded: DecodedGroup) -> None:
        """Compute rewards and advantages of a decoded group. An exception ends the run; a failing reward is only counted."""
        try:
            outcome = await self.scorer.score(decoded)
            advantages = group_advantages(
                outcome.rewards, baseline=self.recipe.advantage_baseline, scale=self.recipe.scale_rewards
            )
            weighted = advantages.weighted(functools.partial(self.recipe.algorithm.weights, self.recipe))
            group.finish(outcome.with_advantages(weighted))
        except Exception as problem:  # raised where the group is awaited
            group.fail(problem)


class _Group:
    """A group between its submission and its consumption."""

    def __init__(self, call: GroupCall):
        self.call = call
        self.attempts = 0
        self.scoring: asyncio.Future | None = None  # a reference, else the event loop might drop the task
        self.decoded: asyncio.Future = asyncio.get_running_loop().create_future()
        self.done: asyncio.Future = asyncio.get_running_loop().create_future()

    def finish(self, scored: ScoredGroup) -> None:
        if not self.done.done():
            self.done.set_result(scored)

    def fail(self, problem: BaseException) -> None:
        if not self.done.done():
            self.done.set_exception(problem)
            self.end_decoding()

    def end_decoding(self) -> None:
        if not self.decoded.done():
            self.decoded.set_result(None)


class RolloutWorker:
    """Sends groups to one rollout actor, and replaces it when it fails. `state` describes it in messages."""

    def __init__(self, controller: Controller, index: int, make_actor: Callable[[int], Any]):
        self.controller, self.index, self.make_actor = controller, index, make_actor
        self.actor = None
        self.process: Process | None = None
        self.version = -1
        self.failed_starts = 0  # in a row
        self.state = f"rollout actor {index} was not needed yet"
        self.event = asyncio.Event()
        self.task = asyncio.ensure_future(self._serve())
        self.task.add_done_callback(self._ended)

    def wake(self) -> None:
        self.event.set()

    async def _serve(self) -> None:
        while True:
            await self.event.wait()
            self.event.clear()
            while self.controller.weights is not None and self.controller.waiting:
                if await self._ready() and (groups := self.controller.take(most=64)):
                    await self._decode(groups)

    async def _ready(self) -> bool:
        """Whether the actor runs and has the newest weights. Starts it and sends them; after a failure it waits and returns
        False."""
        recipe = self.controller.recipe
        try:
            if self.actor is None:
                self._set_state("is starting")
                self.actor, self.version = self.make_actor(self.index), -1
                self.process = await asyncio.wait_for(self.actor.process.remote(), recipe.cluster_timeout_s)
            while (weights := self.controller.weights).version != self.version:
                self._set_state(f"is loading weights of version {weights.version}")
                await asyncio.wait_for(self.actor.set_weights.remote(weights), recipe.rollout_timeout_s)
                self.version = weights.version
        except (RayError, TimeoutError) as problem:
            if isinstance(problem, RayTaskError) and not isinstance(problem.cause, TimeoutError):
                version = self.controller.weights.version
                self._set_state(f"could not read the weights of version {version} from Ray's store: {why(problem)}")
                self.controller.fail(RolloutError(self.state))
                return False
            self.failed_starts += 1
            self._replace("could not load the weights" if self.process else "did not start", problem)
            self.controller.check_workers()
            await asyncio.sleep(min(2.0**self.failed_starts, LONGEST_PAUSE_S))
            return False
        self.failed_starts = 0
        return True

    async def _decode(self, groups: list[_Group]) -> None:
        recipe = self.controller.recipe
        self._set_state(f"is decoding {len(groups)} groups")
        try:
            calls = [group.call for group in groups]
            decoded = await asyncio.wait_for(self.actor.generate.remote(calls), recipe.rollout_timeout_s)
        except (RayError, TimeoutError) as problem:
            if isinstance(problem, RayTaskError):  # the code raised and would raise again
                self._set_state(f"raised an error: {problem}")
                for group in groups:
                    group.fail(RolloutError(self.state))
            else:
                self._replace("failed while it decoded", problem)
                self.controller.requeue(groups, self.state)
        else:
            self._set_state("is waiting for groups")
            for group, result in zip(groups, decoded, strict=True):
                group.end_decoding()
                group.scoring = asyncio.ensure_future(self.controller.score(group, result))

    def _replace(self, what: str, problem: BaseException) -> None:
        self._set_state(f"{what}: {why(problem)}")
        print(f"{self.state}; restarting it", flush=True)
        ray.kill(self.actor)
        self.actor = self.process = None
        self.controller.restarts += 1

    def _set_state(self, what: str) -> None:
        self.state = f"rollout actor {self.index}{f' ({self.process})' if self.process else ''} {what}"

    def _ended(self, task: asyncio.Task) -> None:
        """A worker serves until the controller is killed. If its task ends with an error, that is a bug: end the run."""
        if not task.cancelled() and (problem := task.exception()) is not None:
            self.controller.fail(problem)
