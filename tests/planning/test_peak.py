"""The forecast of a step's memory beside its measured peak: bytes of all tensors that are alive, of two small steps."""

import dataclasses
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dfactory import assembly
from dfactory.engine.trainer import Trainer, deepspeed_config
from dfactory.models.head import CHUNK_BYTES, ONE_PASS_BYTES, ONE_PASS_TILE
from dfactory.planning.memory import forecast, setup_of
from dfactory.recipe import load_recipe
from dfactory.train import learn
from tests.engine.conftest import ROOT
from tests.rl.test_source import BLOCK, FakeClient

WITHIN = 0.10
QUICKSTART = ROOT / "recipes/quickstart"
RECORDS = ["per_device_train_batch_size=2", "row_length=512", "save_steps=null"]
ROLLOUTS = ["max_length=16", "decode.max_new_tokens=10", f"block_size={BLOCK}", "save_steps=null"]
CASES = {
    "sft": ("sft.yaml", RECORDS),
    "cap": ("cap.yaml", ["model_name_or_path=tiny", *RECORDS]),
    "dpo": ("dpo.yaml", ["model_name_or_path=tiny", "reference=copy", *RECORDS]),
    "rl": ("rl.yaml", ["model_name_or_path=tiny", "kl_coef=0.1", *ROLLOUTS]),
    "lora": ("sft.yaml", ["use_peft=true", *RECORDS]),
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


def state_of(trainer: Trainer) -> list[torch.Tensor]:
    """Weights, gradients and what the optimiser keeps."""
    parameters = list(trainer.policy.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    kept = [value for state in trainer.engine.basic_optimizer.state.values() for value in state.values()]
    return [*parameters, *gradients, *(value for value in kept if isinstance(value, torch.Tensor))]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_forecast_is_the_peak(case, tmp_path, monkeypatch):
    file, keys = CASES[case]
    keys = [*keys, "max_steps=2", "eval_datasets=[]", "eval_decode_prompts=0", "dtype=float32", "warmup_steps=0"]
    recipe = load_recipe(QUICKSTART / file, [*keys, f"output_dir={tmp_path}/run"])
    step, steps = Trainer.train_window, []

    def measured(trainer, window, objective):
        with Alive(state_of(trainer)) as alive:
            metrics = step(trainer, window, objective)
        steps.append((alive.peak, max(window, key=lambda batch: batch.input_ids_RS.numel())))
        return metrics

    monkeypatch.setattr(Trainer, "train_window", measured)
    assert learn(recipe, FakeClient() if case == "rl" else None) == 0
    peak, batch = steps[-1]
    rows, row_length = batch.input_ids_RS.shape
    setup = dataclasses.replace(
        setup_of(recipe, deepspeed_config(recipe), 1),
        rows=rows,
        row_length=row_length,
        targets=batch.num_targets,
        logits_bytes=CHUNK_BYTES["cpu"],
        one_pass_bytes=ONE_PASS_BYTES["cpu"],
        one_pass_tile=ONE_PASS_TILE["cpu"],
    )
    lines = forecast(Path(assembly.resolve(recipe.model_name_or_path)), setup)
    outside = sum(line.bytes for line in lines.lines if line.name in recipe.frozen_models)  # of this measurement
    found = lines.device_bytes - outside
    print(f"{case}: forecast {found / 1e6:.1f} MB, measured {peak / 1e6:.1f} MB, {found / peak:.3f}")
    assert found == pytest.approx(peak, rel=WITHIN), lines
