"""Reward functions in processes of their own, which may hang, crash, leak and lie about lengths.

    with RewardPool(parse_rewards(recipe.reward_funcs), workers=2, timeout_s=60) as pool:
        future = pool.submit(group)            # returns at once; decoding continues
        result = future.result()               # or asyncio.wrap_future(future)
        results = pool.score(groups)           # in the order of groups

A call is one function on one group, or on one rollout where the reward says `per_rollout`. A call that exceeds its time
costs its process, which is killed and replaced; so does one that ends its process. Neither touches another call. A function
that raises, returns the wrong number of rewards, or no number, is counted and its message kept.

What a rollout gets (TRL's rule, made strict): the weighted sum over the functions that scored it; None counts as absent.
With no score at all, or where any function failed, it has no reward: a crash is never a 0, and never a lower sum.

The processes are plain ones, so a pool works in a script, in a test, and inside of a Ray actor. They import no torch.
"""

import asyncio
import enum
import itertools
import json
import os
import pickle
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from dfactory.errors import ConfigError, RolloutError
from dfactory.rl.rewards.specs import RewardSpec
from dfactory.rl.rewards.worker import LENGTH

START_S = 120.0  # for a reward process to import its libraries
STARTS = 3  # tries to start one
LONGEST_REPLY = 1 << 26


class Outcome(enum.StrEnum):
    OK = "ok"
    UNSCORED = "unscored"  # the function returned None: not its business
    TIMEOUT = "timeout"
    CRASH = "crash"  # the process ended: a signal, sys.exit, out of memory
    ERROR = "error"  # the function raised
    WRONG_LENGTH = "wrong_length"
    NOT_A_NUMBER = "not_a_number"


FAILURES = frozenset(Outcome) - {Outcome.OK, Outcome.UNSCORED}


@dataclass(frozen=True)
class RewardGroup:
    """What reward functions see of the G rollouts of one prompt.

    `row` is the dataset row: each value is repeated for every rollout. `per_rollout` has lists of length G already:
    completion_ids, tokens_per_forward, forwards, finish_reason.
    """

    prompt: str | list[dict]
    completions_G: list[str] | list[list[dict]]
    row: dict[str, Any] = field(default_factory=dict)
    per_rollout: dict[str, list] = field(default_factory=dict)

    @classmethod
    def of(cls, prompt: str | list[dict], answers: Sequence[Any], row: dict) -> "RewardGroup":
        """Of Answers (types.py, which imports torch); those to messages are messages."""
        texts = [answer.text for answer in answers]
        return cls(
            prompt=prompt,
            completions_G=texts if isinstance(prompt, str) else [[{"role": "assistant", "content": t}] for t in texts],
            row=row,
            per_rollout={
                "completion_ids": [answer.token_ids for answer in answers],
                "tokens_per_forward": [answer.tokens_per_forward for answer in answers],
                "forwards": [answer.forwards for answer in answers],
                "finish_reason": [answer.finish_reason.value for answer in answers],
            },
        )

    def arguments(self, rollouts: range) -> dict[str, list]:
        """The keyword arguments of a reward function for some of the rollouts."""
        columns = {name: [value] * len(rollouts) for name, value in self.row.items() if name not in TRL_OMITS}
        lists = {"completions": self.completions_G} | self.per_rollout
        columns |= {name: [values[i] for i in rollouts] for name, values in lists.items()}
        return columns | {"prompts": [self.prompt] * len(rollouts)}


TRL_OMITS = ("prompt", "completion", "completion_ids")  # columns of a row that TRL does not hand on


@dataclass(frozen=True)
class FunctionScores:
    """What one function said about the G rollouts of a group."""

    score_G: list[float | None]
    outcome_G: list[Outcome]
    messages: list[str]  # why it failed, if it did
    metrics: list[tuple[str, float]]  # TRL's log_metric
    extra: dict[str, list]  # TRL's log_extra: columns for the table of completions


@dataclass(frozen=True)
class RewardResult:
    """Rewards of a group, in the order of its completions; by function too, in the order of the recipe."""

    reward_G: list[float | None]  # None: leave the rollout out
    functions: dict[str, FunctionScores]


def outcome_counts(results: Iterable[RewardResult]) -> Counter[tuple[str, Outcome]]:
    """How often each (function, outcome) occurred, in rollouts."""
    counts: Counter[tuple[str, Outcome]] = Counter()
    for result in results:
        for name, scores in result.functions.items():
            counts.update((name, outcome) for outcome in scores.outcome_G)
    return counts


def failure_messages(results: Iterable[RewardResult]) -> Counter[str]:
    """The distinct messages of failed calls, for the log."""
    return Counter(
        f"reward {name}: {message}"
        for result in results
        for name, scores in result.functions.items()
        for message in scores.messages
    )


class RewardPool:
    """Raises ConfigError if a reward cannot be loaded, or cannot score one of `rows`, (file:line, columns) of the data;
    later, RolloutError if a replaced process does not come up."""

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        *,
        workers: int = 2,
        timeout_s: float = 60.0,
        memory_mb: float = 4096.0,
        rows: Sequence[tuple[str, dict[str, Any]]] = (),
    ):
        self.specs, self.timeout_s, self.memory_mb = list(specs), timeout_s, memory_mb
        self.restarts = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="reward pool", daemon=True)
        self._thread.start()
        try:
            self.required_columns: dict[str, list[str]] = self._run(self._start(workers, rows)).result()
        except BaseException:
            self.close()
            raise

    def submit(self, group: RewardGroup) -> Future[RewardResult]:
        """Queue a group. Its future is done when every function has answered or failed."""
        return self._run(self._score(group))

    def score(self, groups: Iterable[RewardGroup]) -> list[RewardResult]:
        return [future.result() for future in [self.submit(group) for group in groups]]

    def close(self) -> None:
        """Kill the processes. Groups that are still in work are cancelled."""
        if not self._loop.is_closed():
            self._run(self._stop()).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _run(self, coroutine) -> Future:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _start(self, workers: int, rows: Sequence[tuple[str, dict]]) -> dict[str, list[str]]:
        self._calls: asyncio.Queue[_Call] = asyncio.Queue()
        self._workers = [_Worker(self.specs) for _ in range(workers)]
        needs = await asyncio.gather(*(worker.start(rows) for worker in self._workers))
        self._serving = [asyncio.create_task(self._serve(worker)) for worker in self._workers]
        return needs[0]

    async def _stop(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(worker.kill() for worker in self._workers))

    async def _score(self, group: RewardGroup) -> RewardResult:
        everyone = range(len(group.completions_G))
        parts = [[range(i, i + 1) for i in everyone] if spec.per_rollout else [everyone] for spec in self.specs]
        calls = [
            [
                _Call(pickle.dumps((index, group.arguments(part))), len(part), self._loop.create_future())
                for part in function_parts
                if part
            ]
            for index, function_parts in enumerate(parts)
        ]
        for call in itertools.chain(*calls):
            self._calls.put_nowait(call)
        answers = [await asyncio.gather(*(call.answer for call in function_calls)) for function_calls in calls]
        functions = {spec.name: join(found) for spec, found in zip(self.specs, answers, strict=True)}
        weights = [spec.weight for spec in self.specs]
        return RewardResult([combine(list(functions.values()), weights, i) for i in everyone], functions)

    async def _serve(self, worker: "_Worker") -> None:
        """One process, one call after another."""
        while True:
            call = await self._calls.get()
            if call.answer.cancelled():
                continue
            try:
                if not worker.alive:
                    self.restarts += 1
                    await worker.start()
                scores = await worker.score(call, self.timeout_s)
                if worker.memory_mb > self.memory_mb:
                    await worker.kill()
            except Exception as problem:  # raised where the call is awaited; else the caller would wait forever
                if not call.answer.done():
                    call.answer.set_exception(problem)
                continue
            if not call.answer.done():
                call.answer.set_result(scores)


@dataclass(frozen=True, eq=False)
class _Call:
    message: bytes  # pickle of the function's number and its arguments
    rollouts: int
    answer: asyncio.Future

    def failed(self, outcome: Outcome, message: str) -> FunctionScores:
        return FunctionScores([None] * self.rollouts, [outcome] * self.rollouts, [message], [], {})


class _Worker:
    """A reward process as the pool sees it."""

    def __init__(self, specs: list[RewardSpec]):
        self.specs = specs
        self.memory_mb = 0.0
        self._process: asyncio.subprocess.Process | None = None

    @property
    def _name(self) -> str:
        return f"a process with the rewards {', '.join(spec.name for spec in self.specs)}"

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self, rows: Sequence[tuple[str, dict]] = ()) -> dict[str, list[str]]:
        """Columns that each reward needs, once all are loaded. One that was killed meanwhile is started again."""
        for _ in range(STARTS):
            try:
                return await self._start(rows)
            except _Ended as end:
                await self.kill()
                reason = end
        raise RolloutError(f"{self._name} did not start in {STARTS} tries: {reason}")

    async def _start(self, rows: Sequence[tuple[str, dict]]) -> dict[str, list[str]]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "dfactory.rl.rewards.worker", str(os.getpid()), str(theirs.fileno())),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=environment,
                start_new_session=True,
            )
        self._reader, self._writer = await asyncio.open_connection(sock=ours, limit=LONGEST_REPLY)
        self.memory_mb = 0.0
        try:
            async with asyncio.timeout(START_S):
                ready = await self._ask(pickle.dumps((self.specs, list(rows))))
        except TimeoutError:
            await self.kill()
            raise RolloutError(f"{self._name} took longer than {START_S:g} s to import them") from None
        if "failed" in ready:
            await self.kill()
            raise ConfigError(ready["failed"])
        return ready["needs"]

    async def score(self, call: _Call, timeout_s: float) -> FunctionScores:
        try:
            async with asyncio.timeout(timeout_s):
                reply = await self._ask(call.message)
        except TimeoutError:
            await self.kill()
            return call.failed(Outcome.TIMEOUT, f"no answer within {timeout_s:g} s; its process was replaced")
        except _Ended as end:
            await self.kill()
            return call.failed(Outcome.CRASH, f"{end}")
        self.memory_mb = reply["memory_mb"]
        if "outcome" in reply:
            return call.failed(Outcome(reply["outcome"]), reply["message"])
        outcomes = [Outcome(outcome) for outcome, _ in reply["scores"]]
        values = [value for _, value in reply["scores"]]
        bad = [f"reward {i} is no finite number" for i, o in enumerate(outcomes) if o is Outcome.NOT_A_NUMBER]
        return FunctionScores(values, outcomes, bad, [tuple(pair) for pair in reply["metrics"]], reply["extra"])

    async def kill(self) -> None:
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._writer.close()
        await self._process.wait()

    async def _ask(self, message: bytes) -> dict:
        try:
            self._writer.write(LENGTH.pack(len(message)) + message)
            await self._writer.drain()
            return json.loads(await self._reader.readuntil(b"\n"))
        except (BrokenPipeError, ConnectionResetError, asyncio.IncompleteReadError):
            raise _Ended(f"the process ended with {await self._status()}") from None
        except (ValueError, asyncio.LimitOverrunError):
            raise _Ended("the process wrote something else than an answer") from None

    async def _status(self) -> str:
        status = await self._process.wait()
        return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


class _Ended(Exception):
    """The process cannot be talked to any more."""


def join(parts: Sequence[FunctionScores]) -> FunctionScores:
    """The answers for parts of a group, in order, as one."""
    extra: dict[str, list] = {}
    for part in parts:
        for column, values in part.extra.items():
            extra.setdefault(column, []).extend(values)
    return FunctionScores(
        [score for part in parts for score in part.score_G],
        [outcome for part in parts for outcome in part.outcome_G],
        [message for part in parts for message in part.messages],
        [metric for part in parts for metric in part.metrics],
        extra,
    )


def combine(functions: Sequence[FunctionScores], weights: Sequence[float], i: int) -> float | None:
    """The reward of rollout i: the sum of weight times score; None if no function scored it, or one failed."""
    if any(function.outcome_G[i] in FAILURES for function in functions):
        return None
    scored = [(weight, f.score_G[i]) for weight, f in zip(weights, functions, strict=True) if f.score_G[i] is not None]
    return sum(weight * score for weight, score in scored) if scored else None
