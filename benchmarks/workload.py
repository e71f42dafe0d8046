"""What the benchmarks of speed share: a model and records, our training step, and the opponent's beside it.

The model has LLaDA2-mini's shape in small: 256 wide, 4 layers of which the first is dense, 32 experts of which a token
takes 4, with random weights wide enough (0.06) that a loss depends on what the model is shown. Both sides read the same
directory, take the same views of the same documents, and do the same: forward, backward, clipping, AdamW.
"""

import json
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.opponent_training import NoisyRow, PeerTraining
from dfactory.algorithms.sft import SFT
from dfactory.assembly import make_source, make_views, read_inputs
from dfactory.config.data import DatasetKeys
from dfactory.data.source import RecordSource
from dfactory.engine.trainer import Trainer
from dfactory.models.policy import Policy
from dfactory.models.registry import load_policy
from dfactory.models.saving import save_policy
from dfactory.models.tiny import write_tiny_config
from dfactory.packing import align
from dfactory.recipe import Recipe
from dfactory.types import AlignedDocument, Example, View, ViewBatch

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
# Dense decoders under dllm's names for them, block-causal and without a shift. SmolLM2-135M whole; two of the 28 layers of
# Qwen3 1.7B.
SMOLLM2 = {
    "model_type": "a2d-llama",
    "architectures": ["A2DLlamaLMHeadModel"],
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 1536,
    "initializer_range": 0.04,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
QWEN3 = {
    "model_type": "a2d-qwen3",
    "architectures": ["A2DQwen3LMHeadModel"],
    "hidden_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 6144,
    "initializer_range": 0.02,
    "max_position_embeddings": 8192,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
SHAPES = {"small": SHAPE, "mini": MINI, "mini32": MINI | {"num_experts": 32}, "qwen3-1.7b": QWEN3, "smollm2": SMOLLM2}
STEPS = 1000  # that a recipe could run; the learning rate is constant
LEARNING_RATE = 1e-4

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def write_config(directory: Path, vocabulary: int, shape: str = "small", **sizes: int) -> Path:
    """The model's config.json alone; `sizes` take the place of the shape's."""
    padding = text_ids(vocabulary).stop  # drawn as zeros and never trained, so no record may hold it
    keys = {"vocab_size": vocabulary, "pad_token_id": padding} | SHAPES[shape] | sizes
    if "model_type" not in keys:
        return write_tiny_config(directory, **keys)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"hidden_act": "silu", "torch_dtype": "float32"} | keys))
    return directory


def write_model(directory: Path, vocabulary: int, shape: str = "small", seed: int = 0, **sizes: int) -> Path:
    """Save the model with weights drawn in fp32."""
    config, model_dir = write_config(directory / "config_only", vocabulary, shape, **sizes), directory / "model"
    model_dir.mkdir()
    save_policy(load_policy(config, dtype="float32", init_weights="random", seed=seed), model_dir)
    return model_dir


def choose_clearly(policy: Policy, vocabulary: int, factor: float = 4.0) -> None:
    """Widen the drawn head, so that tokens are chosen clearly. Logits of EOS become 0, so that it never comes out."""
    with torch.no_grad():
        head = policy.model.get_output_embeddings().weight
        head.mul_(factor)
        head[special_ids(vocabulary)[1]] = 0


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


def noisy_row(document: AlignedDocument, view: View, factor_P: np.ndarray) -> NoisyRow:
    """A view as a row of the opponent's; `factor_P` counts at its targets."""
    clean_L = torch.from_numpy(document.input_ids_T).long()
    position_P, target_P = (torch.from_numpy(array) for array in (view.position_P, view.target_P))
    noisy_L, target_L, factor_L = (
        clean_L.clone(),
        torch.zeros(len(clean_L), dtype=torch.bool),
        torch.zeros(len(clean_L)),
    )
    noisy_L[position_P] = torch.from_numpy(view.input_ids_P).long()
    target_L[position_P] = target_P
    factor_L[position_P] = torch.from_numpy(factor_P).float() * target_P
    return NoisyRow(clean_L, noisy_L, target_L, factor_L)


class Records:
    """A recipe's windows of one micro-batch, and the same documents in the opponent's rows."""

    def __init__(self, recipe: Recipe, rank: int = 0, world_size: int = 1):
        inputs = read_inputs(recipe)
        self.recipe, self.examples, self.eos = recipe, inputs.train, inputs.special.eos
        self.make_views = make_views(recipe, inputs)
        self.source: RecordSource = make_source(recipe, inputs, rank, world_size)
        self.index_of = {int(name): index for index, name in enumerate(self.examples.document_id_E)}

    def example(self, name: int) -> Example:
        """By the document's id."""
        return self.examples[self.index_of[name]]

    def noisy_rows(self, batch: ViewBatch, elbo: bool = False) -> list[NoisyRow]:
        """The batch's documents, a row a view, for the opponent. Factors make the mean over all targets; with `elbo` the
        negative ELBO of each document, as the mean over its views."""
        rows = []
        visits = zip(batch.document_id_D.tolist(), batch.columns["visit_D"].tolist(), strict=True)
        for document, visit in ((align(self.example(name), BLOCK, self.eos), visit) for name, visit in visits):
            views = self.make_views(document, visit)
            factors = [view.elbo_weight_P / len(views) if elbo else view.target_P for view in views]
            rows += [noisy_row(document, *pair) for pair in zip(views, factors, strict=True)]
        count = 1 if elbo else sum(int(row.target_L.sum()) for row in rows)
        return [row._replace(factor_L=row.factor_L / count) for row in rows]

    def real_tokens(self, batch: ViewBatch) -> int:
        """Tokens of the batch's documents, without the fill to whole blocks."""
        return sum(len(self.example(name)) for name in batch.document_id_D.tolist())


class Ours:
    """What `dfactory train` runs for a window: DeepSpeed, packed rows, scores of targets only."""

    def __init__(self, recipe: Recipe):
        policy = load_policy(recipe.model_name_or_path, revision=recipe.model_revision, dtype=recipe.dtype)
        self.parameters = list(policy.parameters())
        self.trainer, self.objective = Trainer(recipe, policy, STEPS), SFT()

    def step(self, batch: ViewBatch, rows: list[NoisyRow]) -> float:
        return self.trainer.train_window([batch], self.objective)["loss"]


class Opponent:
    """The same step by the opponent."""

    def __init__(self, recipe: Recipe):
        self.training = PeerTraining(recipe)
        self.parameters = self.training.parameters

    def step(self, batch: ViewBatch, rows: list[NoisyRow]) -> float:
        return self.training.train(rows).loss
