"""Continuous batching: a thread decodes the jobs in its slots and takes the next job as soon as a slot is free.

Jobs wait in a bounded queue. Each gets the decoder's progress after every forward, and the same answer as if it were
decoded alone (see decoding/decoder.py). Only this thread uses the decoder.
"""

import dataclasses
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable

from dfactory.decoding import DecodeRules, Progress, make_decoder
from dfactory.decoding.slots import Decodable
from dfactory.errors import DFactoryError

MEMORY = 0.9  # weight of the past in the running mean of seconds per job


class QueueFull(DFactoryError):
    """The queue has no room for more jobs. `retry_after`: an estimate of the seconds until it has."""

    def __init__(self, waiting: int, retry_after: int):
        super().__init__(f"{waiting} requests are waiting already: try again in {retry_after} s")
        self.retry_after = retry_after


class Stopped(DFactoryError):
    """The engine accepts no more jobs: it is shutting down, or has failed."""


@dataclasses.dataclass(eq=False)
class Job:
    """One prompt to answer. `on_progress` is called from the engine's thread, with None if the engine fails."""

    prompt_ids: list[int]
    rules: DecodeRules
    noise_id: int
    on_progress: Callable[[Progress | None], None]
    draft: tuple[int, ...] = ()  # the first tokens of the answer, masks among them; something is left to decode
    number: int = -1
    started: float = 0.0


@dataclasses.dataclass
class Counts:
    """What the engine has done since it started."""

    forwards: int = 0  # of the whole batch
    answers: int = 0
    tokens: int = 0  # up to and including EOS
    answer_forwards: int = 0  # denoising passes, summed over answers
    given_up: int = 0  # jobs cancelled before their answer was complete


class Engine:
    """Start it, submit jobs, stop it."""

    def __init__(self, policy: Decodable, rules: DecodeRules, capacity: int, max_queue: int):
        """`capacity`: tokens of a slot. Of the rules, jobs have their own but for the slots and the block size."""
        self.decoder = make_decoder(policy, rules, rules.batch_size, capacity)
        self.slots, self.max_queue = rules.batch_size, max_queue
        self.counts = Counts()
        self.changed = threading.Condition()
        self.waiting: deque[Job] = deque()
        self.running: dict[int, Job] = {}
        self.unwanted: set[int] = set()
        self.changes: dict[int, DecodeRules] = {}
        self.closed = False
        self.failed = False
        self._numbers = itertools.count()
        self._seconds = 0.0  # running mean per job
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, jobs: list[Job]) -> None:
        """Queue all of the jobs or none. Raises QueueFull or Stopped."""
        with self.changed:
            if self.closed or self.failed:
                raise Stopped(
                    "the server is shutting down" if not self.failed else "the decoder has failed; see its log"
                )
            if len(self.waiting) + len(jobs) > self.max_queue + max(0, self.slots - len(self.running)):
                raise QueueFull(len(self.waiting), self._retry_after())
            for job in jobs:
                job.number = next(self._numbers)
                self.waiting.append(job)
            self.changed.notify_all()

    def cancel(self, jobs: list[Job]) -> None:
        """Cancel the jobs that are not done; their slots are free before the next forward."""
        numbers = {job.number for job in jobs}
        with self.changed:
            kept = [job for job in self.waiting if job.number not in numbers]
            self.counts.given_up += len(self.waiting) - len(kept)
            self.waiting = deque(kept)
            self.unwanted |= numbers & self.running.keys()
            self.changed.notify_all()

    def change_rules(self, job: Job, rules: DecodeRules) -> None:
        """Decode a job by other rules from the next forward on; block size and longest answer have to be the same. Nothing
        happens to one that is done."""
        with self.changed:
            job.rules = rules
            if job.number in self.running:
                self.changes[job.number] = rules

    def close(self) -> None:
        """Accept no more jobs; running and waiting ones are finished."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def give_up_all(self) -> None:
        """After `close`: cancel all jobs and report None to each."""
        with self.changed:
            left = [*self.running.values(), *self.waiting]
        self.cancel(left)
        for job in left:
            job.on_progress(None)

    @property
    def most(self) -> int:
        """The most jobs that can be running and waiting at once."""
        return self.max_queue + self.slots

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the thread after `close`. Returns whether it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _retry_after(self) -> int:
        return min(60, max(1, math.ceil(self._seconds * (len(self.waiting) + 1) / self.slots)))

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._report(self.decoder.step())
        finally:  # an exception leaves the thread; no client may keep waiting for an answer that will not come
            with self.changed:
                self.failed = not self.closed or bool(self.waiting or self.running)
                left = [*self.running.values(), *self.waiting]
            for job in left:
                job.on_progress(None)

    def _wait_for_work(self) -> bool:
        """Move jobs into free slots, waiting for one if there is none. Returns False when closed and all jobs are done."""
        with self.changed:
            self._drop_unwanted()
            while not (self.waiting or self.running):
                if self.closed:
                    return False
                self.changed.wait()
                self._drop_unwanted()
            while self.waiting and self.decoder.free:
                job = self.waiting.popleft()
                job.started = time.monotonic()
                self.decoder.add(job.number, job.prompt_ids, job.rules, draft=job.draft, noise_id=job.noise_id)
                self.running[job.number] = job
            for number in self.changes.keys() & self.running.keys():
                self.decoder.change_rules(number, self.changes[number])
            self.changes.clear()
        return True

    def _drop_unwanted(self) -> None:
        for number in self.unwanted & self.running.keys():
            self.decoder.remove(number)
            del self.running[number]
            self.counts.given_up += 1
        self.unwanted.clear()

    def _report(self, steps: list[Progress]) -> None:
        self.counts.forwards += bool(steps)
        for progress in steps:
            with self.changed:
                job = self.running[progress.prompt]
                if progress.rollout is not None:
                    del self.running[job.number]
                    self._count(job, progress)
            job.on_progress(progress)

    def _count(self, job: Job, progress: Progress) -> None:
        self.counts.answers += 1
        self.counts.tokens += len(progress.rollout.output_ids)
        self.counts.answer_forwards += progress.forwards
        seconds = time.monotonic() - job.started
        self._seconds = MEMORY * self._seconds + (1 - MEMORY) * seconds if self._seconds else seconds
