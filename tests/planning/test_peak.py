"""The forecast of a step's memory beside its measured peak: bytes of all tensors that are alive, of two small steps."""

import dataclasses
import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dfactory import assembly
from dfactory.engine.trainer import deepspeed_config
from dfactory.models.head import CHUNK_BYTES, ONE_PASS_BYTES, ONE_PASS_TILE
from dfactory.planning.memory import forecast, setup_of
from dfactory.recipe import load_recipe
from dfactory.runs.folder import RunFolder
from dfactory.train import Run
from tests.engine.conftest import ROOT
from tests.rl.test_source import BLOCK, FakeClient

WITHIN = 0.10
FIRST_RECORDS = 200
# with DeepSpeed's default buckets all but 3 percent are buckets in a model this small
ZERO = {
    "zero1": {"stage": 1, "reduce_bucket_size": 1_000_000},
    "zero2": {"stage": 2, "reduce_bucket_size": 1_000_000, "overlap_comm": True},
    "zero3": {"stage": 3, "reduce_bucket_size": 100_000, "stage3_prefetch_bucket_size": 100_000},
}
QUICKSTART = ROOT / "recipes/quickstart"
RECORDS = ["per_device_train_batch_size=2", "row_length=512", "save_steps=null"]
ROLLOUTS = ["max_length=16", "decode.max_new_tokens=10", f"block_size={BLOCK}", "save_steps=null"]
CASES = {
    "sft": ("sft.yaml", RECORDS),
    "cap": ("cap.yaml", ["model_name_or_path=tiny", *RECORDS]),
    "dpo": ("dpo.yaml", ["model_name_or_path=tiny", "reference=copy", *RECORDS]),
    "rl": ("rl.yaml", ["model_name_or_path=tiny", "kl_coef=0.1", *ROLLOUTS]),
    "lora": ("sft.yaml", ["use_peft=true", *RECORDS]),
    "bf16": ("sft.yaml", ["dtype=bfloat16", *RECORDS]),
    **dict.fromkeys(ZERO, ("sft.yaml", RECORDS)),
}


class Alive(TorchDispatchMode):
    """Counts the bytes of storages that are alive: those that are there already, and all that operations make."""

    def __init__(self, held: list[torch.Tensor]):
        super().__init__()
        self.bytes = self.peak = 0
        self.known: dict[int, weakref.ref] = {}
        for tensor in held:
            self._see(tensor)

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known[key] = weakref.ref(storage, lambda _: self._gone(key, size))
            self.bytes += size
            self.peak = max(self.peak, self.bytes)

    def _gone(self, key: int, size: int) -> None:
        del self.known[key]
        self.bytes -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor)
        return out


def tensors() -> list[torch.Tensor]:
    """All that are there."""
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A recipe's key for the first records of its file: reading all of them takes longer than the steps."""
    folder = tmp_path_factory.mktemp("records")

    def first(file: str) -> list[str]:
        datasets = load_recipe(QUICKSTART / file).datasets
        if not datasets:
            return []
        path = Path(datasets[0].path)
        short = folder / path.name
        short.write_text("".join(path.read_text().splitlines(keepends=True)[:FIRST_RECORDS]))
        return [f"datasets=[{{path: {short}}}]"]

    return first


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_forecast_is_the_peak(case, tmp_path, records):
    file, keys = CASES[case]
    keys = ["dtype=float32", *keys, *(records(file) if file != "rl.yaml" else [])]
    keys += ["max_steps=2", "eval_datasets=[]", "eval_decode_prompts=0", "warmup_steps=0", f"output_dir={tmp_path}/run"]
    if case in ZERO:
        (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": ZERO[case]}))
        keys += [f"deepspeed={tmp_path}/zero.json"]
    recipe = load_recipe(QUICKSTART / file, keys)
    gc.collect()
    others = {tensor.untyped_storage()._cdata for tensor in tensors()}
    run = Run(RunFolder(recipe.output_dir), recipe, FakeClient() if file == "rl.yaml" else None)
    if file == "rl.yaml":
        run.source.rows.padded = True  # as on a GPU: the forecast is for whole rows
    for _ in range(2):  # the first step makes the optimiser's state
        window = run.next_window()
        held = [tensor for tensor in tensors() if tensor.untyped_storage()._cdata not in others]
        with Alive(held) as alive:
            run.trainer.train_window(window, run.objective)
    largest = max(window, key=lambda batch: batch.input_ids_RS.numel())
    rows, row_length = largest.input_ids_RS.shape
    setup = dataclasses.replace(
        setup_of(recipe, deepspeed_config(recipe), 1),
        rows=rows,
        row_length=row_length,
        targets=largest.num_targets,
        logits_bytes=CHUNK_BYTES["cpu"],
        one_pass_bytes=ONE_PASS_BYTES["cpu"],
        one_pass_tile=ONE_PASS_TILE["cpu"],
    )
    lines = forecast(Path(assembly.resolve(recipe.model_name_or_path)), setup)
    print(
        f"{case}: forecast {lines.device_bytes / 1e6:.1f} MB, measured {alive.peak / 1e6:.1f} MB, "
        f"{lines.device_bytes / alive.peak:.3f}"
    )
    assert lines.device_bytes == pytest.approx(alive.peak, rel=WITHIN), lines
