"""A tiny model of every family of the table, with each attention that it can have, and a recipe that trains it.

The checkpoints are those of the golden files; families without any get random weights.
"""

import dataclasses
import functools
import json
import random
import tempfile
from pathlib import Path

import torch
import yaml

from dfactory.models.families.base import FAMILIES, Family, Noise
from dfactory.models.policy import Policy
from dfactory.models.registry import load_policy, read_family
from dfactory.models.saving import GENERATION_CONFIG, LOGIT_SHIFT, save_policy
from dfactory.models.tiny import tiny_config
from dfactory.recipe import Recipe, load_recipe
from tests.families.cases import FAMILIES_WITH_GOLDENS, FOLDER, golden
from tests.models.conftest import CONFIGS, GOLDEN_DIR

IDS = {"mask_token_id": 81, "eos_token_id": 80}  # of the models without golden files
RANDOM = CONFIGS | {
    "shifted_llama": CONFIGS["llama"],
    "illada": CONFIGS["llama"] | IDS | {"model_type": "illada", "architectures": ["ILLaDAForCausalLM"]},
    "ling": tiny_config() | {"model_type": "bailing_moe", "architectures": ["BailingMoeV2ForCausalLM"]},
}
BLOCK = 4
MAX_LENGTH = 24
TOKENS = 80  # of every vocabulary, at its beginning; special ones lie after them


@dataclasses.dataclass(frozen=True)
class Model:
    """A checkpoint that is trained with one block size; None is full attention."""

    name: str
    block_size: int | None

    def __str__(self) -> str:
        return f"{self.name}-{'full' if self.block_size is None else self.block_size}"

    @property
    def directory(self) -> Path:
        if self.name in FAMILIES_WITH_GOLDENS:
            return FOLDER / self.name
        return GOLDEN_DIR / self.name if (GOLDEN_DIR / self.name).is_dir() else random_checkpoint(self.name)

    @property
    def family(self) -> Family:
        return read_family(self.directory)

    @property
    def policy(self) -> Policy:
        return policy_in(self.directory)

    @property
    def special(self) -> dict[str, int]:
        if self.name in FAMILIES_WITH_GOLDENS:
            ids = {f"{kind}_token_id": golden(self.name).expected[f"{kind}_token_id"] for kind in ("mask", "eos")}
            return {name: id[0] if isinstance(id, list) else id for name, id in ids.items() if id is not None}
        return IDS

    def recipe(self, folder: Path, *overrides: str) -> Recipe:
        return load_recipe(self.recipe_file(folder), list(overrides))

    def recipe_file(self, folder: Path) -> Path:
        """A recipe of 20 steps in fp32, whose records lie beside it."""
        file = folder / f"{self}.yaml"
        keys = {
            "model_name_or_path": str(self.directory),
            "dtype": "float32",
            "datasets": [{"path": str(records(folder))}],
            "block_size": self.block_size,
            "max_length": MAX_LENGTH,
            "row_length": 144,
            "max_steps": 20,
            "learning_rate": 1e-3,
            "warmup_steps": 3,
            "weight_decay": 0.1,
            "per_device_train_batch_size": 2,
            "output_dir": str(folder / str(self)),
        }
        file.write_text(yaml.safe_dump(keys | self.special | self._noise))
        return file

    @property
    def _noise(self) -> dict:
        """How the family is trained."""
        if self.family.noise is Noise.MASK:
            return {}
        return {"view_source": "uniform", "complementary": False, "self_conditioning": 0.5, "context_loss_weight": 1.0}


@functools.cache
def random_checkpoint(name: str) -> Path:
    """Weights large enough that a model looks at its input."""
    config, saved = (Path(tempfile.mkdtemp(prefix=f"{name}-")) for _ in range(2))
    (config / "config.json").write_text(json.dumps(RANDOM[name]))
    if name == "shifted_llama":
        (config / GENERATION_CONFIG).write_text(json.dumps({LOGIT_SHIFT: 1}))
    policy = load_policy(config, dtype="float32", init_weights="random", seed=1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    save_policy(policy, saved)
    return saved


@functools.cache
def policy_in(directory: Path) -> Policy:
    """Shared: a test that changes it loads its own."""
    return load_policy(directory, dtype="float32")


def _block_sizes(name: str) -> list[int | None]:
    """One, or both where the block size chooses the attention."""
    directory = Model(name, None).directory
    size = read_family(directory).block_size
    if name in FAMILIES_WITH_GOLDENS and hasattr(golden(name), "full_logits"):
        return [None, BLOCK]
    return [None if size is None else BLOCK]


NAMES = [*FAMILIES_WITH_GOLDENS, "llada2_tiny", *RANDOM]
MODELS = [Model(name, size) for name in NAMES for size in _block_sizes(name)]


def families_without_a_model() -> set[str]:
    return set(FAMILIES.names) - {model.family.name for model in MODELS}


def records(folder: Path, count: int = 24) -> Path:
    """Tokenised documents of 6 to 24 tokens, their first third being the prompt."""
    return _write(folder / "records.jsonl", count, lambda rng: _record(rng, rng.randint(6, MAX_LENGTH)))


def pairs(folder: Path, count: int = 12) -> Path:
    """Prompts of 2 to 8 tokens with two answers of 3 to 12."""
    lengths = {"prompt_ids": (2, 8), "chosen_ids": (3, 12), "rejected_ids": (3, 12)}
    return _write(
        folder / "pairs.jsonl", count, lambda rng: {k: _ids(rng, rng.randint(*v)) for k, v in lengths.items()}
    )


def _ids(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(3, TOKENS) for _ in range(length)]


def _record(rng: random.Random, length: int) -> dict:
    return {"input_ids": _ids(rng, length), "prompt_lengths": length // 3}


def _write(file: Path, count: int, row) -> Path:
    rng = random.Random(1)
    file.write_text("".join(json.dumps(row(rng)) + "\n" for _ in range(count)))
    return file
