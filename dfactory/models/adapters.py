"""LoRA adapters: what a directory of them may ask for, which modules take them, and the way into the weights.

An adapter adds `scale * B A` to a linear layer's weight. The sum is made in fp32 and rounded once, whether a model is
exported or a run starts from it, so both start from the same numbers.
"""

import contextlib
import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from dfactory.errors import CheckpointError, ConfigError
from dfactory.hub import is_hub_name
from dfactory.models.config_keys import POSITIVE, SWITCH, Rule, Rules, only, read_object, refuse_values, shown, size
from dfactory.models.headers import refuse_large_headers
from dfactory.models.hub import hub_name, resolve
from dfactory.models.policy import Policy
from dfactory.models.sharded import whole

ADAPTER_CONFIG = "adapter_config.json"  # peft's mark of a directory that holds adapters only
ADAPTER_WEIGHTS = "adapter_model.safetensors"
EXPERT_LAYERS = ("gate_proj", "up_proj", "down_proj")  # as dense layers and shared experts call theirs
TOLERANCE = 1e-3  # of an adapted layer's output in fp32, as a share of its largest entry

_PLAIN_NAME = re.compile(r"[\w.]{1,200}")

_RULES: Rules = {
    "peft_type": only("LORA"),
    "r": size(10_000),
    "lora_alpha": POSITIVE,
    "lora_dropout": Rule(lambda value: type(value) in (int, float) and 0 <= value < 1, "it must be from 0 to 1"),
    "use_rslora": SWITCH,
    "init_lora_weights": only(True, False, "gaussian"),  # others change the base
    "target_modules": Rule(
        lambda value: (
            isinstance(value, list) and all(isinstance(name, str) and _PLAIN_NAME.fullmatch(name) for name in value)
        ),
        "it must be a list of module names",
    ),
}
_IGNORED = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}


def is_adapters(model_dir: Path) -> bool:
    """Whether a directory holds adapters, and no whole model."""
    return (model_dir / ADAPTER_CONFIG).is_file()


def adapter_base(adapter_dir: Path) -> Path:
    """The model directory that LoRA adapters belong to. Raises CheckpointError if it is gone, or no end to them."""
    whole_model_dir(adapter_dir)
    return _stated_base(adapter_dir, weights=True)


def whole_model_dir(model_dir: Path) -> Path:
    """The directory itself, or where it holds adapters the whole model at the end of their bases. Raises CheckpointError
    as `adapter_base`."""
    base, seen = model_dir, {model_dir.resolve()}
    while is_adapters(base):
        base = _stated_base(base, weights=False)
        if base.resolve() in seen:
            raise CheckpointError(f"base_model_name_or_path {base} leads back to {model_dir}: name a whole model there")
        seen.add(base.resolve())
    return base


def _stated_base(adapter_dir: Path, weights: bool) -> Path:
    """A directory, or where a model of the hub is stated its directory in the cache."""
    file = adapter_dir / ADAPTER_CONFIG
    keys = read_object(file)
    stated, revision = keys.get("base_model_name_or_path"), keys.get("revision")
    with contextlib.suppress(OSError):  # a name that is too long
        if isinstance(stated, str) and Path(stated).is_dir():
            return Path(stated)
    if isinstance(stated, str) and is_hub_name(stated):
        named = f"base_model_name_or_path in {file}:"
        return resolve(stated, revision if isinstance(revision, str) else None, weights=weights, key=named)
    raise CheckpointError(
        f"base_model_name_or_path {str(stated)[:300]} in {file} is not a directory: adapters are nothing without their "
        "base; put it back, or correct the path there"
    )


def check_adapters(adapter_dir: Path) -> None:
    """Raise CheckpointError for adapters that are not plain LoRA, or not of the rank that their config states."""
    from peft import LoraConfig

    file, weights = adapter_dir / ADAPTER_CONFIG, adapter_dir / ADAPTER_WEIGHTS
    keys = read_object(file)
    plain = {name: only(value) for name, value in LoraConfig().to_dict().items() if name not in _IGNORED}
    refuse_values(file, keys, plain | _RULES, _IGNORED, "plain LoRA")
    if not weights.is_file():
        raise CheckpointError(f"{adapter_dir} lacks {ADAPTER_WEIGHTS}: weights are read from safetensors only")
    for name, shape in _shapes(weights).items():
        if "lora_A" in name and shape[:1] != (keys["r"],):
            raise CheckpointError(f"{name} in {weights} has shape {list(shape)}, but {file} states r {keys['r']}")


def _shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    refuse_large_headers([weights])
    try:
        with safe_open(weights, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as problem:
        raise CheckpointError(f"{weights} is not a whole safetensors file: {problem}; copy it again") from problem


def attach_adapters(policy: Policy, adapter_dir: Path) -> None:
    """Put a directory's adapters, which were checked, on the policy, in place. Raises CheckpointError where they do not
    fit."""
    from peft import PeftModel, get_peft_model_state_dict

    targets = read_object(adapter_dir / ADAPTER_CONFIG)["target_modules"]
    try:
        adapted_linears(policy.model, targets)
        policy.model = PeftModel.from_pretrained(policy.model, adapter_dir, torch_device="cpu").eval()
    except (ConfigError, ValueError, RuntimeError) as problem:  # peft's, of modules and of shapes
        raise CheckpointError(f"{adapter_dir} does not fit its base: {problem}") from problem
    wanted, found = set(get_peft_model_state_dict(policy.model)), set(_shapes(adapter_dir / ADAPTER_WEIGHTS))
    if wanted != found:
        raise CheckpointError(
            f"{adapter_dir / ADAPTER_WEIGHTS} does not fit {ADAPTER_CONFIG} and base: "
            f"missing {shown(sorted(wanted - found))}, unexpected {shown(sorted(found - wanted))}"
        )


def add_adapters(
    policy: Policy, *, r: int, alpha: int, dropout: float, target_modules: list[str], seed: int = 0
) -> Policy:
    """Freeze the policy and give it LoRA adapters drawn from `seed`, in place. Raises ConfigError as `adapted_linears`."""
    from peft import LoraConfig, get_peft_model

    adapted_linears(policy.model, target_modules)
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy.model = get_peft_model(policy.model, config)
    config.base_model_name_or_path, config.revision = hub_name(policy.source_dir) or (str(policy.source_dir), None)
    return policy


def adapted_linears(model: PreTrainedModel, target_modules: list[str]) -> dict[str, nn.Linear]:
    """The layers that get adapters, by name: all whose name ends in one of the targets. Raises ConfigError for a target
    that no module has, or that is no linear layer."""
    modules, found = dict(model.named_modules()), {}
    for target in target_modules:
        matched = {name: m for name, m in modules.items() if name == target or name.endswith(f".{target}")}
        if not matched:
            linears = {name.rpartition(".")[2] for name, m in modules.items() if isinstance(m, nn.Linear)}
            raise ConfigError(
                f"lora_target_modules {target}: the model has no such module; its linear layers are "
                f"{', '.join(sorted(linears - {'lm_head'}))}"
            )
        for name, module in matched.items():
            if name.endswith("lm_head"):
                raise ConfigError(
                    "lora_target_modules lm_head: the head is scored in chunks and takes no adapter; leave it out"
                )
            if not isinstance(module, nn.Linear):
                raise ConfigError(
                    f"lora_target_modules {target}: {name} is a {type(module).__name__}, and adapters go on linear layers "
                    "only; leave it out"
                )
        found |= matched
    return found


def unreached_experts(model: nn.Module, target_modules: list[str]) -> list[str]:
    """A warning if adapters are on layers that experts have too, but miss those of the routed experts."""
    named = [name for name in target_modules if name in EXPERT_LAYERS]
    sizes = {
        name: getattr(p, "ds_numel", p.numel()) for name, p in model.named_parameters()
    }  # of a ZeRO-3 shard: the whole
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    if not named or not routed:
        return []
    share = routed / sum(sizes.values())
    return [
        f"lora_target_modules {', '.join(named)} reach dense layers and shared experts only: the routed experts, "
        f"{share:.0%} of the parameters, get no adapters and stay as they are"
    ]


# --- into the weights -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Merge:
    """What merging has changed."""

    weights: dict[str, torch.Tensor]  # of the adapted layers, in fp32, by their names in the model
    changed: int  # of these, after rounding to the base's precision


@torch.no_grad()
def merge_into_base(policy: Policy, round_once: bool = True) -> Merge:
    """Add the active adapters' products to the weights, in place, and drop the adapters. Without `round_once` the adapted
    weights stay in fp32. Raises CheckpointError where a sum is not finite, or is not what the adapted layer computes."""
    from peft.tuners.lora import LoraLayer

    layers = {n: m for n, m in policy.model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    weights, changed = {}, 0
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight
        with whole(weight):
            merged = weight.float() + _product(layer).to(weight.device)
            _require_same_outputs(name, layer, merged)
            rounded = merged.to(weight.dtype)
            changed += not torch.equal(rounded, weight)
            weights[f"{name}.weight"] = merged.cpu()
            if round_once:
                weight.copy_(rounded)
            else:
                weight.data = merged
    policy.model = policy.model.unload()
    return Merge(weights, changed)


def _product(layer: Any) -> torch.Tensor:
    """The sum of the active adapters' products, in fp32."""
    parts = [
        layer.scaling[name] * (layer.lora_B[name].weight.float() @ layer.lora_A[name].weight.float())
        for name in layer.active_adapters
        if name in layer.lora_A
    ]
    return sum(parts)


def _require_same_outputs(name: str, layer: nn.Module, merged: torch.Tensor) -> None:
    """Feed random inputs to the layer as peft runs it, in fp32: routing, and what lies between layers, has no part in it."""
    if not merged.isfinite().all():
        raise CheckpointError(f"{name} cannot be merged: its adapter holds numbers that are not finite; train it again")
    base = layer.get_base_layer()
    inputs = torch.randn(4, merged.shape[1], generator=torch.Generator().manual_seed(0)).to(merged.device)
    was = {id(p): p.data for p in layer.parameters()}
    for parameter in layer.parameters():
        parameter.data = parameter.data.float()
    expected = layer(inputs)
    for parameter in layer.parameters():
        parameter.data = was[id(parameter)]
    bias = 0 if base.bias is None else base.bias.float()
    difference = (inputs @ merged.T + bias - expected).abs().max()
    if not difference <= TOLERANCE * expected.abs().max():
        raise CheckpointError(
            f"{name}: the merged weight's outputs are {float(difference):.3g} away from those of base and adapter, whose "
            f"largest is {float(expected.abs().max()):.3g}; nothing was merged"
        )
