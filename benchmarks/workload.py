"""What the benchmarks of speed share: a model and records, our training step, and the obvious one beside it.

The model has LLaDA2-mini's shape in small: 256 wide, 4 layers of which the first is dense, 32 experts of which a token
takes 4, with random weights wide enough (0.06) that a loss depends on what the model is shown. Both sides read the same
directory, take the same views of the same documents, and do the same: forward, backward, clipping, AdamW.
"""

import gc
import json
import logging
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
from torch import nn

from dfactory import distributed
from dfactory.algorithms.sft import SFT
from dfactory.assembly import make_source, make_views, read_inputs
from dfactory.config.data import DatasetKeys
from dfactory.data.source import RecordSource
from dfactory.engine.trainer import Trainer
from dfactory.models.registry import load_policy
from dfactory.models.saving import save_policy
from dfactory.models.tiny import write_tiny_config
from dfactory.packing import align
from dfactory.recipe import Recipe
from dfactory.types import Example, ViewBatch
from tests.reference import one_view_nll, reference_model

BLOCK = 32
SHAPE = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "initializer_range": 0.06,
    "max_position_embeddings": 8192,
}
# LLaDA2-mini's layers at their own size, two of its twenty: a dense one and one of experts. For a GPU.
MINI = {
    "hidden_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 5120,
    "moe_intermediate_size": 512,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "initializer_range": 0.02,
    "max_position_embeddings": 8192,
}
SHAPES = {"small": SHAPE, "mini": MINI}
STEPS = 1000  # that a recipe could run; the learning rate is constant
MEMORY_SAMPLES = 0.002  # seconds between two looks at the resident memory
LEARNING_RATE = 1e-4

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def write_config(directory: Path, vocabulary: int, shape: str = "small", **sizes: int) -> Path:
    """The model's config.json alone; `sizes` take the place of the shape's."""
    padding = text_ids(vocabulary).stop  # drawn as zeros and never trained, so no record may hold it
    return write_tiny_config(directory, vocab_size=vocabulary, pad_token_id=padding, **SHAPES[shape] | sizes)


def write_model(directory: Path, vocabulary: int, shape: str = "small", seed: int = 0, **sizes: int) -> Path:
    """Save the model with weights drawn in fp32."""
    config, model_dir = write_config(directory / "config_only", vocabulary, shape, **sizes), directory / "model"
    model_dir.mkdir()
    save_policy(load_policy(config, dtype="float32", init_weights="random", seed=seed), model_dir)
    return model_dir


def special_ids(vocabulary: int) -> tuple[int, int]:
    """Mask and EOS."""
    return vocabulary - 1, vocabulary - 2


def text_ids(vocabulary: int) -> range:
    """What records are made of: all but mask, EOS and padding."""
    return range(vocabulary - 3)


class Lengths(NamedTuple):
    """Tokens of a record."""

    prompt: int
    response: int


def write_records(file: Path, lengths: Sequence[Lengths], vocabulary: int, seed: int = 0) -> Path:
    """Tokenised records of random ids."""
    rng = random.Random(seed)
    with file.open("w") as out:
        for prompt, response in lengths:
            ids = rng.choices(text_ids(vocabulary), k=prompt + response)
            out.write(json.dumps({"input_ids": ids, "prompt_lengths": prompt}) + "\n")
    return file


def sft_recipe(model_dir: Path, records: Path, vocabulary: int, **keys) -> Recipe:
    """SFT on complementary pairs of views."""
    mask, eos = special_ids(vocabulary)
    return Recipe(
        **{
            "model_name_or_path": str(model_dir),
            "output_dir": str(model_dir.parent / "unused"),
            "dtype": "float32",
            "mask_token_id": mask,
            "eos_token_id": eos,
            "datasets": [DatasetKeys(str(records))],
            "block_size": BLOCK,
            "complementary": True,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
        }
        | keys
    )


class Documents(NamedTuple):
    """The documents of a ViewBatch with their views, each filled with padding to the longest. K views."""

    clean_DL: torch.Tensor
    noisy_KDL: torch.Tensor
    target_KDL: torch.Tensor


class Records:
    """A recipe's windows of one micro-batch, and the same documents one a row for the obvious version."""

    def __init__(self, recipe: Recipe, rank: int = 0, world_size: int = 1):
        inputs = read_inputs(recipe)
        self.recipe, self.examples, self.eos = recipe, inputs.train, inputs.special.eos
        self.make_views = make_views(recipe, inputs)
        self.source: RecordSource = make_source(recipe, inputs, rank, world_size)
        self.index_of = {int(name): index for index, name in enumerate(self.examples.document_id_E)}

    def example(self, name: int) -> Example:
        """By the document's id."""
        return self.examples[self.index_of[name]]

    def padded(self, batch: ViewBatch) -> Documents:
        visits = zip(batch.document_id_D.tolist(), batch.columns["visit_D"].tolist(), strict=True)
        documents = [(align(self.example(name), BLOCK, self.eos), visit) for name, visit in visits]
        views, longest = self.recipe.views_per_document, max(len(d.input_ids_T) for d, _ in documents)
        clean_DL = np.full((len(documents), longest), self.eos)
        noisy_KDL = np.full((views, len(documents), longest), self.eos)
        target_KDL = np.zeros(noisy_KDL.shape, bool)
        for row, (document, visit) in enumerate(documents):
            length = len(document.input_ids_T)
            clean_DL[row, :length] = document.input_ids_T
            noisy_KDL[:, row, :length] = document.input_ids_T
            for k, view in enumerate(self.make_views(document, visit)):
                noisy_KDL[k, row, view.position_P] = view.input_ids_P
                target_KDL[k, row, view.position_P] = view.target_P
        return Documents(*(torch.from_numpy(array) for array in (clean_DL, noisy_KDL, target_KDL)))

    def real_tokens(self, batch: ViewBatch) -> int:
        """Tokens of the batch's documents, without the fill to whole blocks."""
        return sum(len(self.example(name)) for name in batch.document_id_D.tolist())


class Ours:
    """What `dfactory train` runs for a window: DeepSpeed, packed rows, scores of targets only."""

    def __init__(self, recipe: Recipe):
        policy = load_policy(recipe.model_name_or_path, revision=recipe.model_revision, dtype=recipe.dtype)
        self.parameters = list(policy.parameters())
        self.trainer, self.objective = Trainer(recipe, policy, STEPS), SFT()

    def step(self, batch: ViewBatch, documents: Documents) -> float:
        return self.trainer.train_window([batch], self.objective)["loss"]


class Obvious:
    """One pass a view over noisy ++ clean rows, by tests/reference.py. A view's graph is freed before the next one's."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.model = recipe, reference_model(Path(recipe.model_name_or_path))
        self.device = distributed.device()
        self.model.tensors = {name: tensor.to(self.device) for name, tensor in self.model.tensors.items()}
        self.parameters = [nn.Parameter(tensor) for tensor in self.model.parameters().values()]
        self.model.tensors |= dict(zip(self.model.parameters(), self.parameters, strict=True))
        self.optimiser = torch.optim.AdamW(self.parameters, recipe.learning_rate, weight_decay=recipe.weight_decay)

    def step(self, batch: ViewBatch, documents: Documents) -> float:
        clean_DL, noisy_KDL, target_KDL = (tensor.to(self.device) for tensor in documents)
        count, total = target_KDL.sum(), 0.0
        for noisy_DL, target_DL in zip(noisy_KDL, target_KDL, strict=True):
            with self.device:  # where masks and positions are made
                nll = one_view_nll(self.model, clean_DL, noisy_DL, target_DL, BLOCK)
            loss = nll.sum() / count
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self.parameters, self.recipe.max_grad_norm)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return total


class Memory(NamedTuple):
    """Bytes at the peak of a step: of the device's memory where there is one, else of the process."""

    above_parameters: int  # gradients, AdamW's moments and fp32 copies of bf16 weights included
    above_state: int  # above what stands between two steps


def measure_memory(make: Callable[[], Ours | Obvious], batch: ViewBatch, documents: Documents) -> Memory:
    """Of the second step: the first one makes the moments. Peaks are sampled, because the kernel's never falls again."""
    before = memory_in_use()
    side = make()
    parameters = sum(parameter.nbytes for parameter in side.parameters)
    side.step(batch, documents)
    gc.collect()
    state = memory_in_use()
    with PeakMemory() as stepping:
        side.step(batch, documents)
    return Memory(stepping.peak - before - parameters, stepping.peak - state)


def memory_in_use() -> int:
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss


class PeakMemory:
    """The highest memory in use: what the device's allocator has counted, or the process's own, sampled in a thread."""

    def __init__(self, measure: Callable[[], int] = memory_in_use):
        self.measure = measure

    def __enter__(self) -> "PeakMemory":
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.peak, self.done = self.measure(), threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.done.set()
        self.thread.join()
        self.peak = max(self.peak, torch.cuda.max_memory_allocated() if torch.cuda.is_available() else self.measure())

    def _watch(self) -> None:
        while not self.done.wait(MEMORY_SAMPLES):
            self.peak = max(self.peak, self.measure())


class Timed(NamedTuple):
    seconds: list[float]  # a round
    results: list  # what each round returned

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def interleave(calls: dict[str, Callable[[int], object]], rounds: int, warmup: int = 1) -> dict[str, Timed]:
    """Call each side in turn with the number of the round. The results of warm-up rounds are kept, their times not."""
    timed = {name: Timed([], []) for name in calls}
    for number in range(warmup + rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            result = call(number)
            seconds = time.perf_counter() - started
            timed[name].results.append(result)
            if number >= warmup:
                timed[name].seconds.append(seconds)
    return timed


def largest_difference(left: Sequence[float], right: Sequence[float]) -> float:
    """Relative, over two series of losses."""
    return max(abs(a - b) / abs(b) for a, b in zip(left, right, strict=True))
