"""Faults at every write point of saving, and what became of the run: `python -m tests.engine.killpoints [few | KIND ...]`.

A run of three steps saves at each and keeps one checkpoint. A first run records which points it passes; then each of them
gets its faults, when the second checkpoint is written (points of starting: at the start). After every fault the run is
started again with resume_from_checkpoint=true, and has to end with the parameters, the optimiser's state, the losses and
the files of an undisturbed run. KIND is stage-zero-ranks, such as sft-1-2; without one all kinds are run, which took half
an hour beside other jobs. `few` is the choice that CI makes.
"""

import collections
import dataclasses
import json
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from tests.engine.conftest import ROOT
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
FEW = {
    Kind("sft", 1, 1): [
        "metrics.jsonl.appended:half",
        "weights.written:enospc",
        "shard.written:short",
        "manifest.json.written:half",
        "checkpoint.renamed:kill",
        "old.removing:half",
        "unused.renamed:kill on resuming",
    ],
    Kind("rl", 3, 1): ["state.json.renamed:kill"],
    Kind("sft", 3, 2): ["shard.written@1:half"],
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A fault as DFACTORY_FAULT names it."""

    point: str
    count: int
    fault: str
    resuming: bool = False

    @property
    def variable(self) -> str:
        return f"{self.point}:{self.count}:{self.fault}"

    def __str__(self) -> str:
        return f"{self.point}:{self.fault}{' on resuming' if self.resuming else ''}"


def cases_of(recorded: list[dict], kind: Kind) -> list[Case]:
    """Each point once: where the second checkpoint is written, or else where it is passed first. Two ranks, which take
    longer, get one fault at each point of a checkpoint."""
    passed, found = collections.Counter(), {}
    for one in recorded:
        passed[one["point"]] += 1
        second = passed["checkpoint.begun"] == 2
        if one["point"] not in found or (second and one["point"] not in {p for p, (_, s, _) in found.items() if s}):
            found[one["point"]] = (passed[one["point"]], second, one["bytes"])
    cases = []
    for point, (count, second, size) in found.items():
        faults = ["kill", *(["half"] if size else [])]
        if kind.ranks > 1:
            faults = faults[-1:] if second else []
        if kind == EVERY and point != "old.removing":
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
        status, log = self.runner.run(self.kind, run, more, fault=case.variable)
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
            for left in ("unused-checkpoint-2", "config.until-step-1.yaml"):  # save_total_limit is another one
                found["left"].remove(left)
        for name, value in expected.items():
            assert found[name] == value, f"{self.kind} {case}: {name} {found[name]} is not {value}"
        return f"{said}; {how}; equal"

    def cases(self) -> list[Case]:
        resuming = RESUMING if self.kind.ranks == 1 else RESUMING[1:4]
        return cases_of(self.recorded, self.kind) + [Case(point, 1, "kill", resuming=True) for point in resuming]


def points_in_the_code() -> set[str]:
    """Those with a fixed name that a learner passes when it saves."""
    files = [file for file in (ROOT / "dfactory").rglob("*.py") if file.name != "faults.py"]
    points = {point for file in files for point in re.findall(r'faults\.at\("([\w.]+)"', file.read_text())}
    return points - {"completions.jsonl.appended", "unused.renamed"}  # of the controller; and of resuming


def main(words: list[str]) -> int:
    few = words == ["few"]
    kinds = list(FEW) if few else [k for k in KINDS if not words or f"{k.stage}-{k.zero}-{k.ranks}" in words]
    failed = total = 0
    missed = set() if words else points_in_the_code()
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            sweep = Sweep(Runner(Path(folder)), kind)
            missed -= {one["point"] for one in sweep.recorded}
            chosen = [case for case in sweep.cases() if not few or str(case) in FEW[kind]]
            assert not few or len(chosen) == len(FEW[kind]), f"{kind}: {sweep.cases()} lack some of {FEW[kind]}"
            for case in chosen:
                total += 1
                try:
                    outcome = sweep.fault(case)
                except AssertionError as problem:
                    failed += 1
                    outcome = f"FAILED: {problem}"
                print(f"{kind!s:20} {case!s:48} {outcome}", flush=True)
    print(f"{total} faults, {total - failed} runs ended as undisturbed ones, {failed} did not")
    if missed:
        print(f"no run passed {', '.join(sorted(missed))}")
    return int(failed > 0 or bool(missed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
