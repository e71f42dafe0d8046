"""From a Policy to a model directory that transformers, the original code and the serving engines read.

Weights are written under their original names, shard by shard and layer by layer, so that neither a sharded model nor
the 100B one has to be whole in memory. config.json stays the source's own; tokenizer, chat template, code and whatever
else was next to it are copied along.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from dfactory import faults
from dfactory.errors import CheckpointError
from dfactory.models.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, whole_model_dir
from dfactory.models.headers import INDEX, WEIGHTS, meta_model, open_tensors
from dfactory.models.mask_token import tokenizer_files
from dfactory.models.policy import Policy
from dfactory.types import WHOLE

GENERATION_CONFIG = "generation_config.json"
LOGIT_SHIFT = "logit_shift"  # its key where a model was trained with another shift than its family's
CHAT_TEMPLATE = "chat_template.jinja"  # transformers prefers it to the template inside tokenizer_config.json
NAMED_TEMPLATES = "additional_chat_templates"  # folder of the others, such as tool_use.jinja
_NOT_CARRIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")

_ABOUT_THE_SOURCE = ("README.md", "provenance.json", "dfactory.json", "sglang.yaml", "sglang.sh")
"""Its card, what it was made from, the files of a server; a saved model has its own (runs/lineage.py)."""

Gather = Callable[[list[nn.Parameter]], contextlib.AbstractContextManager]
NamedTensors = list[tuple[str, torch.Tensor]]
Tensors = dict[str, torch.Tensor]


def save_policy(
    policy: Policy,
    directory: Path,
    *,
    gathered: Gather = contextlib.nullcontext,
    whole_layer: Callable[[NamedTensors], NamedTensors] = list,
    write: bool = True,
    block_size: int | None = None,
    mask_token_id: int | None = None,
    chat_template: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    finish: Callable[[Tensors], Tensors] = dict,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the weights, config.json and the carried files of a policy; of one with LoRA adapters, the adapters only.

    `block_size`, `mask_token_id` and `chat_template` are what it was trained with where that is not the source's own; the
    decoder and later training take them from there, and the policy's token ranges and mask. A block size of WHOLE is
    recorded as null. `finish` may replace tensors, by their original names, before they are written; `dtype` is then what
    config.json states. `gathered` makes sharded parameters whole within its context, and `whole_layer` what an engine has
    made of a layer the model's own tensors again; every rank has to call this then, and only the one with `write` touches
    the disk.
    """
    model = policy.model
    in_config = {policy.family.block_size_key: block_size} if policy.family.block_size_in_config and block_size else {}
    if write:
        _write_mask(policy, directory)
        mask_token_id = mask_token_id if policy.mask is None else policy.mask.id
        ranges, stated = policy.ranges.stated or None, {} if in_config else {"block_size": block_size}
        stated |= {"mask_token_id": mask_token_id, "token_ranges": ranges, LOGIT_SHIFT: _shift_to_record(policy)}
        _record(policy.source_dir, directory, **stated)
    if write and chat_template is not None:
        write_chat_template(directory, chat_template)
    if policy.has_adapters:
        _save_adapters(policy, directory, gathered, write)
        return
    dtype = dtype or model.dtype
    carried = _carried_tensors(policy) if write else {}
    shards = _Shards(directory, _plan_shards(model, dtype, max_shard_bytes, carried)) if write else None
    for group in layer_groups(model):
        parameters = [tensor for _, tensor in group if isinstance(tensor, nn.Parameter)]
        with gathered(parameters):
            tensors = whole_layer(group)
            if write:
                whole = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors}
                shards.add(finish(revert_weight_conversion(model, whole)))
    for name, file in carried.items():
        shards.add({name: file.get_tensor(name).to(dtype)})
    if write:
        shards.close()
        _write_config(policy, directory, dtype, in_config)
        carry_files(policy.source_dir, directory)


def _save_adapters(policy: Policy, directory: Path, gathered: Gather, write: bool) -> None:
    model = policy.model
    trainable = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    with gathered(list(trainable.values())):
        if write:
            whole = {name: tensor.detach().to("cpu", copy=True) for name, tensor in trainable.items()}
            faults.at("weights.writing")
            model.save_pretrained(directory, state_dict=whole, save_embedding_layers=False)
            faults.at("weights.written", directory / ADAPTER_WEIGHTS)
            carry_files(policy.source_dir, directory)
            (directory / "config.json").unlink(missing_ok=True)  # with it, transformers would look for whole weights


def layer_groups(model: PreTrainedModel) -> Iterator[NamedTensors]:
    """The saved tensors, a decoder layer at a time, then what lies outside the layers. Tied weights come once."""
    persistent = set(model.state_dict(keep_vars=True))
    seen: set[int] = set()
    groups: dict[str, NamedTensors] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in persistent and id(tensor) not in seen:
            seen.add(id(tensor))
            before, layers, rest = name.partition(".layers.")
            group = f"{before}{layers}{rest.partition('.')[0]}" if layers else ""
            groups.setdefault(group, []).append((name, tensor))
    yield from groups.values()


class _Shards:
    """safetensors files of bounded size with their index. Which tensor goes where is planned by huggingface_hub before the
    first one comes; a file is written as soon as its tensors are there."""

    def __init__(self, directory: Path, plan: StateDictSplit):
        self.directory, self.plan = directory, plan
        self.pending: dict[str, Tensors] = {name: {} for name in plan.filename_to_tensors}
        self.total = 0

    def add(self, tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            file = self.plan.tensor_to_filename[name]
            waiting = self.pending[file]
            waiting[name] = tensor.contiguous()
            self.total += tensor.nbytes
            if len(waiting) == len(self.plan.filename_to_tensors[file]):
                self._write(file)

    def _write(self, name: str) -> None:
        faults.at("weights.writing")
        save_file(self.pending.pop(name), self.directory / name, metadata={"format": "pt"})
        faults.at("weights.written", self.directory / name)

    def close(self) -> None:
        if self.pending:
            planned = self.plan.filename_to_tensors
            missing = [name for file, waiting in self.pending.items() for name in planned[file] if name not in waiting]
            raise CheckpointError(f"{self.directory} would lack {len(missing)} tensors: {', '.join(missing[:8])}")
        if self.plan.is_sharded:
            weight_map = dict(sorted(self.plan.tensor_to_filename.items()))
            index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
            _write_text(self.directory / INDEX, json.dumps(index, indent=2) + "\n")


def _carried_tensors(policy: Policy) -> dict[str, safe_open]:
    """Name -> the open file of the source's tensors that the family carries along unread."""
    source = whole_model_dir(policy.source_dir)
    if policy.family.carried is None or not any(
        source.glob("*.safetensors")
    ):  # a model drawn at random carries nothing
        return {}
    return {name: file for name, file in open_tensors(source).items() if re.search(policy.family.carried, name)}


def _plan_shards(
    model: PreTrainedModel, dtype: torch.dtype, max_bytes: int, carried: dict[str, safe_open]
) -> StateDictSplit:
    """Which file gets which tensor, by original names in the order in which they are saved. The shapes are those of a model
    without weights: ZeRO-3 and expert parallelism leave every rank a part of the model's own."""
    shapes: Tensors = {
        name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name, file in carried.items()
    }
    for group in layer_groups(meta_model(model.config)):
        shapes |= revert_weight_conversion(model, dict(group))
    return split_state_dict_into_shards_factory(
        shapes,
        get_storage_size=lambda tensor: tensor.numel() * dtype.itemsize,
        filename_pattern=WEIGHTS.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=max_bytes,
    )


def _write_config(policy: Policy, directory: Path, dtype: torch.dtype, trained_with: dict[str, int]) -> None:
    """The source's own config.json with the precision of these weights; keys that only the original code reads stay.
    The family has a say: it announces no layers that are not read."""
    config = json.loads((whole_model_dir(policy.source_dir) / "config.json").read_text())
    config = policy.family.saved_keys(config) | trained_with
    if policy.mask is not None and policy.mask.new_rows:
        config["vocab_size"] = policy.config.vocab_size
    stated = "dtype" if "dtype" in config else "torch_dtype"  # its newer name, and the older one
    config.pop("torch_dtype", None)
    config[stated] = str(dtype).removeprefix("torch.")
    _write_text(directory / "config.json", json.dumps(config, indent=2) + "\n")


def _write_mask(policy: Policy, directory: Path) -> None:
    """The tokenizer's files, with the mask token that the model was given."""
    if policy.mask is not None and policy.mask.is_special:
        for name, text in tokenizer_files(policy.source_dir, policy.mask).items():
            _write_text(directory / name, text)


def _record(source_dir: Path, directory: Path, **trained_with: int | dict[str, list[int]] | None) -> None:
    """generation_config.json is where a decoder looks for defaults; the source's other keys stay."""
    stated = {n: None if value == WHOLE else value for n, value in trained_with.items() if value is not None}
    if stated:
        source = source_dir / GENERATION_CONFIG
        keys = json.loads(source.read_text()) if source.is_file() else {}
        _write_text(directory / GENERATION_CONFIG, json.dumps(keys | stated, indent=2) + "\n")


def _shift_to_record(policy: Policy) -> int | None:
    """The family's own needs no record, unless the source records another."""
    source = policy.source_dir / GENERATION_CONFIG
    recorded = source.is_file() and LOGIT_SHIFT in json.loads(source.read_text())
    return policy.logit_shift if recorded or policy.logit_shift != policy.family.logit_shift else None


def write_chat_template(directory: Path, text: str) -> None:
    """The template that a run was trained with, in the place of the source's; its named ones are not carried then."""
    _write_text(directory / CHAT_TEMPLATE, text)


def carry_files(source_dir: Path, directory: Path) -> None:
    """Copy the carried files of the source that are not there yet."""
    has_own_template = (directory / CHAT_TEMPLATE).exists()
    for file in carried_files(source_dir):
        target = directory / file.relative_to(source_dir)
        if not target.exists() and not (has_own_template and target.parent.name == NAMED_TEMPLATES):
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
            faults.at("carried.written", target)
            _refuse_short(target, file.stat().st_size)


def carried_files(source_dir: Path) -> list[Path]:
    """Tokenizer, chat template, code, licence: every file that holds no weights, is not hidden, is not the adapters', and
    does not tell what the source was made from.

    Raises CheckpointError for a link that leads elsewhere: what it points to may not be meant for those who get the copy.
    """
    home = source_dir.resolve()
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]  # the hub's cache
    files = []
    for file in (*sorted(source_dir.iterdir()), *sorted(source_dir.glob(f"{NAMED_TEMPLATES}/*.jinja"))):
        if not file.is_file() or file.name.startswith(".") or file.name.endswith((*_NOT_CARRIED, ADAPTER_CONFIG)):
            continue
        if file.name in _ABOUT_THE_SOURCE:
            continue
        if not any(file.resolve().is_relative_to(folder) for folder in allowed):
            raise CheckpointError(
                f"{file} is a link to {file.resolve()}, outside of its directory, and would be copied along with the model: "
                "put the file itself there, or remove the link"
            )
        files.append(file)
    return files


def _write_text(file: Path, text: str) -> None:
    encoded = text.encode()
    file.write_bytes(encoded)
    faults.at(f"{file.name}.written", file)
    _refuse_short(file, len(encoded))


def _refuse_short(file: Path, size: int) -> None:
    if (found := file.stat().st_size) != size:
        raise CheckpointError(f"{file} was cut short while it was written: {found:,} bytes of {size:,}")
