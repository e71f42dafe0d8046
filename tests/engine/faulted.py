"""Runs of the tiny models in forks of one warm process, with a fault, and what they leave.

A fork costs no imports, and dies alone. Two ranks are two forks; when one ends badly the other is killed, as torchrun does.
"""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  every run would import it, which takes seconds
import numpy as np
import torch
import torch.distributed as dist

from benchmarks.local_client import copy_weights
from dfactory import faults, train
from dfactory.engine import checkpoint
from dfactory.errors import DFactoryError
from dfactory.models.saving import save_policy
from dfactory.recipe import load_recipe
from dfactory.rl.actors import RolloutActor
from dfactory.rl.advantage import group_advantages
from dfactory.rl.prompts import PromptStream
from dfactory.rl.rollouts import RolloutBatch, ScoredRollout
from tests.engine.conftest import ROOT, write_recipe

STEPS = 3  # with a checkpoint at each; only the newest is kept
DEADLINE_S = 240


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of run: stage, ZeRO stage, ranks."""

    stage: str
    zero: int
    ranks: int

    def __str__(self) -> str:
        return f"{self.stage} ZeRO-{self.zero} {self.ranks} rank{'s' if self.ranks > 1 else ''}"


class DecodingClient:
    """What Ray's controller and rollout actor do, in this process: decodes with the published weights, for real."""

    def __init__(self, recipe):
        self.recipe, self.prompts = recipe, PromptStream(recipe)
        self.actor = RolloutActor(recipe, os.getcwd())

    def publish(self, version, groups):
        copy_weights(self.actor.policy, groups)
        return {"seconds/sync": 0.0}

    def next_batch(self, version, next_group):
        box = [self._decode(next_group) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(box, src=0)
        following = next_group + self.recipe.prompts_per_step
        return RolloutBatch(box[0], following, self.prompts.epoch(following), {"reward": 0.5})

    def _decode(self, next_group):
        calls = [self.prompts.call(next_group + index) for index in range(self.recipe.prompts_per_step)]
        scored = []
        for group in self.actor.generate(calls):
            rewards = [float(sum(r.output_ids) % 7) - 0.1 * index for index, r in enumerate(group.rollouts)]
            advantage_G = group_advantages(rewards, baseline="mean", scale="group").advantage_G
            for index, rollout in enumerate(group.rollouts):
                scored.append(ScoredRollout(group.number, index, rollout, rewards[index], float(advantage_G[index])))
        return scored


class Runner:
    """Starts runs; every one is a recipe, overrides, and perhaps a fault."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.sft = write_recipe(folder)

    def recipe(self, kind: Kind, run: Path, more: list[str]):
        keys = [f"max_steps={STEPS}", "save_steps=1", "save_total_limit=1", f"output_dir={run}"]
        keys += [f"deepspeed={ROOT}/recipes/deepspeed/zero{kind.zero}.json", "per_device_train_batch_size=2"]
        if kind.stage == "sft":
            return load_recipe(self.sft, [*keys, "warmup_steps=0", "eval_datasets=[]", *more])
        keys += ["model_name_or_path=tiny", "block_size=8", "max_length=40", "row_length=400", "eval_datasets=[]"]
        keys += ["decode.max_new_tokens=8", "decode.threshold=0.5", "num_generations=2", "prompts_per_step=2"]
        keys += ["eval_decode_prompts=0", "warmup_steps=0"]
        return load_recipe(ROOT / "recipes/quickstart/rl.yaml", [*keys, *more])

    def run(
        self, kind: Kind, run: Path, more: list[str] = (), *, fault: str | None = None, record: Path | None = None
    ) -> tuple[int, str]:
        """(exit status of the rank that ended first with another than 0, or 0; what was printed)"""
        recipe, log = self.recipe(kind, run, list(more)), self.folder / "log"
        while True:
            status = self._start(kind, recipe, log, fault, record)
            if "EADDRINUSE" not in (
                said := log.read_text()
            ):  # another process took the port that was free: nothing began
                return status, said

    def _start(self, kind: Kind, recipe, log: Path, fault: str | None, record: Path | None) -> int:
        log.write_text("")
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        children = {}
        for rank in range(kind.ranks):
            if pid := os.fork():
                children[pid] = rank
            else:
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": kind.ranks, "MASTER_PORT": port}
                _child(recipe, place if kind.ranks > 1 else {}, log, fault, record)
        return _wait(children)


def _child(recipe, place: dict, log: Path, fault: str | None, record: Path | None) -> None:
    """Never returns."""
    status = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        for name in ("MASTER_ADDR", faults.VARIABLE):
            os.environ.pop(name, None)
        if place:
            os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}})
        if fault is not None:
            os.environ[faults.VARIABLE] = fault
        if record is not None:
            os.environ[faults.VARIABLE] = "none:0"
            faults.at = functools.partial(_record, record, place.get("RANK", 0))
        checkpoint.save_policy = functools.partial(save_policy, max_shard_bytes=200_000)  # several, with an index
        status = train.learn(recipe, DecodingClient(recipe) if recipe.stage == "rl" else None)
    except DFactoryError as problem:
        status = problem.exit_status
        print(f"{type(problem).__name__}: {problem}", flush=True)
    except BaseException:  # a fork must not go on as a copy of the test runner
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _record(file: Path, rank: int, point: str, path: Path | None = None, start: int = 0) -> None:
    size = path.stat().st_size if path is not None else 0
    with file.open("a") as lines:
        lines.write(json.dumps({"point": point if rank == 0 else f"{point}@{rank}", "bytes": size}) + "\n")


def _wait(children: dict[int, int]) -> int:
    status, deadline = 0, time.monotonic() + DEADLINE_S
    while children:
        pid, raw = os.waitpid(-1, os.WNOHANG)
        if pid in children:
            del children[pid]
            ended = os.waitstatus_to_exitcode(raw)
            if ended and not status:
                status = ended
                time.sleep(0.2)  # the others may have something to say
                for other in children:
                    os.kill(other, signal.SIGKILL)
        elif time.monotonic() > deadline:
            for other in children:
                os.kill(other, signal.SIGKILL)
            raise AssertionError(f"a run of {DEADLINE_S} s hangs")
        else:
            time.sleep(0.01)
    return status


def result(run: Path) -> dict:
    """What has to be equal: the parameters by name, the state, and the losses of all steps."""
    last = run / f"checkpoint-{STEPS}"
    digests = {}
    for file in sorted(last.glob("*.safetensors")):
        digests[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    assert digests, f"{last} holds no weights"
    for file in sorted((last / "engine/shards").glob("*optim_states.pt")):
        digests[file.name] = _digest(torch.load(file, weights_only=False)["optimizer_state_dict"])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "weights": digests,
        "state": json.loads((last / "engine/state.json").read_text()),
        "losses": [(row["step"], row["loss"], row["grad_norm"]) for row in rows],
        "latest": (run / "LATEST").read_text(),
        "left": sorted(path.name for path in run.iterdir()),
    }


def _digest(value) -> str:
    """Of all tensors in a nest of containers, in order."""
    sha256 = hashlib.sha256()

    def visit(one) -> None:
        if isinstance(one, torch.Tensor):
            sha256.update(np.ascontiguousarray(one.detach().flatten().view(torch.uint8).numpy()).data)
        elif isinstance(one, dict):
            for name in sorted(one, key=str):
                visit(one[name])
        elif isinstance(one, (list, tuple)):
            for item in one:
                visit(item)

    visit(value)
    return sha256.hexdigest()


def fresh(run: Path) -> Path:
    shutil.rmtree(run, ignore_errors=True)
    return run
