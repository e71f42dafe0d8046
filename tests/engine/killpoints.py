"""Faults at every write point of saving, and what became of the run: `python -m tests.engine.killpoints [KIND ...]`.

A run of three steps saves at each and keeps one checkpoint. A first run records which points it passes; then each of them
gets its faults, when the second checkpoint is written (points of starting: at the start). After every fault the run is
started again with resume_from_checkpoint=true, and has to end with the parameters, the optimiser's state, the losses and
the files of an undisturbed run. KIND is stage-zero-ranks, such as sft-1-2; without one all kinds are run.
"""

import collections
import dataclasses
import json
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from tests.engine.faulted import Kind, Runner, fresh, result

KINDS = [Kind(stage, zero, ranks) for ranks in (1, 2) for stage in ("sft", "rl") for zero in (1, 3)]
EVERY = Kind("sft", 1, 1)  # gets every kind of fault at every point, the others those that kill
SAID = {"short": "cut short", "enospc": "No space left on device"}
RESUME = ["resume_from_checkpoint=true"]
RESUMING = [  # points that a run passes when it is resumed behind a damaged newer checkpoint
    "leftovers.removed",
    "LATEST.written",
    "LATEST.renamed",
    "unused.renamed",
    "config.yaml.written",
    "config.yaml.renamed",
    "metrics.jsonl.written",
    "metrics.jsonl.renamed",
]


@dataclasses.dataclass(frozen=True)
class Case:
    """A fault as DFACTORY_FAULT names it."""

    point: str
    count: int
    fault: str
    resuming: bool = False

    def __str__(self) -> str:
        return f"{self.point}:{self.count}:{self.fault}"


def cases_of(recorded: list[dict], every: bool) -> list[Case]:
    """Each point once: where the second checkpoint is written, or else where it is passed first."""
    passed, found = collections.Counter(), {}
    for one in recorded:
        passed[one["point"]] += 1
        second = passed["checkpoint.begun"] == 2
        if one["point"] not in found or (second and one["point"] not in {p for p, (_, s, _) in found.items() if s}):
            found[one["point"]] = (passed[one["point"]], second, one["bytes"])
    cases = []
    for point, (count, _, size) in found.items():
        faults = ["kill", *(["half"] if size else [])]
        if every and point != "old.removing":
            faults += ["enospc", *(["short"] if size else [])]
        cases += [Case(point, count, fault) for fault in faults]
    return cases


class Sweep:
    """The cases of one kind of run."""

    def __init__(self, runner: Runner, kind: Kind):
        self.runner, self.kind = runner, kind
        whole, record = fresh(runner.folder / "whole"), runner.folder / "record"
        record.unlink(missing_ok=True)
        self._must_end(whole, [], record=record)
        self.expected = result(whole)
        self.recorded = [json.loads(line) for line in record.read_text().splitlines()]
        self._damaged: Path | None = None

    def _must_end(self, run: Path, more: list[str], **options) -> str:
        status, log = self.runner.run(self.kind, run, more, **options)
        assert status == 0, f"{self.kind}: {run.name} ended with {status}: {log[-3000:]}"
        return log

    def damaged(self) -> Path:
        """A run that lost checkpoint 3, and whose checkpoint 2 is cut short."""
        if self._damaged is None:
            self._damaged = fresh(self.runner.folder / "damaged")
            self._must_end(self._damaged, ["save_total_limit=9"])
            shutil.rmtree(self._damaged / "checkpoint-3")
            (self._damaged / "LATEST").write_text("checkpoint-2\n")
            file = next((self._damaged / "checkpoint-2/engine/shards").glob("*optim_states.pt"))
            file.write_bytes(file.read_bytes()[:-1000])
        return self._damaged

    def fault(self, case: Case) -> str:
        """Plants a fault, resumes, and returns what happened. Raises AssertionError where the end is not the right one."""
        run, more = fresh(self.runner.folder / "faulted"), []
        expected = self.expected
        if case.resuming:
            shutil.copytree(self.damaged(), run)
            more = RESUME
        status, log = self.runner.run(self.kind, run, more, fault=str(case))
        if case.fault in SAID:
            assert status == 1, f"{self.kind} {case}: ended with {status}: {log[-2000:]}"
            assert SAID[case.fault] in log, f"{self.kind} {case}: {log[-2000:]}"
            said = "exit 1"
        else:
            assert status == -signal.SIGKILL, f"{self.kind} {case}: ended with {status}: {log[-2000:]}"
            said = "killed"
        status, log = self.runner.run(self.kind, run, RESUME)
        how = "resumed"
        if status:
            assert "finds no whole checkpoint" in log, f"{self.kind} {case}: {log[-2000:]}"
            assert status == 1
            assert not (run / "LATEST").exists(), f"{self.kind} {case}: a checkpoint was published, and is lost"
            how = "no checkpoint yet: refused to resume, started anew"
            self._must_end(run, [])
        elif step := [line for line in log.splitlines() if " steps from step " in line]:
            how = f"resumed from step {step[0].partition(' from step ')[2].partition(',')[0]}"
        found = result(run)
        if case.resuming:
            found["left"].remove("unused-checkpoint-2")
        for name, value in expected.items():
            assert found[name] == value, f"{self.kind} {case}: {name} {found[name]} is not {value}"
        return f"{said}; {how}; equal"

    def cases(self) -> list[Case]:
        cases = cases_of(self.recorded, self.kind == EVERY)
        return cases + [Case(point, 1, "kill", resuming=True) for point in RESUMING]


def main(words: list[str]) -> int:
    kinds = [kind for kind in KINDS if not words or f"{kind.stage}-{kind.zero}-{kind.ranks}" in words]
    failed = total = 0
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            sweep = Sweep(Runner(Path(folder)), kind)
            for case in sweep.cases():
                total += 1
                try:
                    outcome = sweep.fault(case)
                except AssertionError as problem:
                    failed += 1
                    outcome = f"FAILED: {problem}"
                name = f"{case}{' on resuming' if case.resuming else ''}"
                print(f"{kind!s:20} {name:48} {outcome}", flush=True)
    print(f"{total} faults, {total - failed} runs ended as undisturbed ones, {failed} did not")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
