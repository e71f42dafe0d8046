"""What a model family declares, and the table of all of them (docs/families.md).

A family is what this house has to know of a checkpoint beyond what transformers knows: which config.json is one, under
which names its keys and tensors are written, who sees whom in it, from which position a token is predicted, and what
training and saving have to mind. Everybody else asks the family: `policy.family`, or `registry.read_family` of a directory.

A new family is one file here that ends in `FAMILIES.add(Family(...))`, or such a module in a package of one's own, which an
entry point of the group `dfactory.families` names.
"""

import dataclasses
import enum
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from dfactory.errors import ConfigError
from dfactory.models.config_keys import Rules
from dfactory.seams import Table


class Attention(enum.StrEnum):
    """Who sees whom in a model; visibility.py has the rule. With full attention a document is a single block: its views see
    all of themselves, and there is no clean stream. With causal context the clean stream is causal token by token, and a
    view's block sees the clean tokens before it and itself. Some models were trained either way, and the same weights serve
    both: a block size of null means full attention then, a number block-causal."""

    BLOCK_CAUSAL = "block-causal"
    FULL = "full"
    CAUSAL_CONTEXT = "causal context"
    BY_BLOCK_SIZE = "by block size"


class Noise(enum.StrEnum):
    """What stands at a position that noise has corrupted: the mask token, or any token of the vocabulary."""

    MASK = "mask"
    UNIFORM = "uniform"


class SpecialTokens(NamedTuple):
    """Ids of a family's own vocabulary, for checkpoints whose tokenizer does not name them. None: it does."""

    mask: int | None = None
    eos: int | None = None


class InSGLang(NamedTuple):
    """How SGLang decodes a family's models (`dfactory export --sglang`)."""

    architecture: str  # the first of config.json's `architectures`, by which SGLang finds its model class
    mask: int | None  # the mask token that it takes, whatever the checkpoint says; None: the noise has no mask


class Variant(NamedTuple):
    """A `model_type` of config.json, and the classes that read it: transformers' own, or subclasses with other names."""

    model_type: str
    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    architectures: tuple[str, ...] = ()  # where models of other families share the model_type; empty: any
    renames: Sequence[
        WeightConverter | WeightRenaming
    ] = ()  # original tensor names -> those of the class; saving inverts
    checkpoints: str = ""  # for the page: who has it
    in_sglang: InSGLang | None = None  # None: SGLang has no diffusion decoder for it

    def claims(self, architectures: Collection[str]) -> bool:
        return not self.architectures or bool(set(self.architectures) & set(architectures))

    def register(self) -> None:
        """Make transformers know the classes. Idempotent; its own ones it knows.

        Families may share a model_type: transformers knows a config class by the class's own one, and the renames by the
        name of the model's class.
        """
        if not self.config_class.__module__.startswith("transformers."):
            AutoConfig.register(self.config_class.model_type, self.config_class, exist_ok=True)
            AutoModelForCausalLM.register(self.config_class, self.model_class, exist_ok=True)
        if self.renames:
            register_checkpoint_conversion_mapping(self.model_class.__name__, list(self.renames), overwrite=True)

    @property
    def base_class(self) -> type[PreTrainedModel]:
        """The transformers class that computes the model."""
        return next(c for c in self.model_class.__mro__ if c.__module__.startswith("transformers."))


def _as_they_are(keys: dict[str, Any]) -> dict[str, Any]:
    return keys


@dataclasses.dataclass(frozen=True)
class Family:
    """The facts of a model family. Files beside the weights need none: `saving` carries all of them along."""

    name: str
    variants: tuple[Variant, ...]
    keys: Rules  # of config.json: what its modules compute; every other key is refused by name
    attention: Attention = Attention.BLOCK_CAUSAL
    logit_shift: int = (
        0  # 1: the hidden state at i - 1 predicts the token at i; a document's first position predicts itself
    )
    shifts_within_views: bool = (
        False  # whether a block's first token is predicted from its own view in training too; else as in decoding, from the
        # clean token before it
    )
    noise: Noise = Noise.MASK
    block_size: int | None = (
        32  # that its checkpoints were trained with, where they do not say; None: they have full attention
    )
    block_size_key: str | None = None  # of config.json, where its checkpoints state the one that they were trained with
    block_size_in_config: bool = (
        False  # whether that key is where a trained checkpoint states it; else a file of ours does
    )
    autoregressive: bool = (
        False  # its public checkpoints are no diffusion models yet: block_size is that of the conversion
    )
    special: SpecialTokens = SpecialTokens()
    token_ranges: Mapping[str, Sequence[int]] = dataclasses.field(
        default_factory=dict
    )  # name -> [start, stop]: ids of other modalities; see dfactory/ranges.py
    moe_blocks: tuple[str, ...] = ()  # module classes that ZeRO-3 gathers whole, because routing picks their children
    autoep: Mapping[str, Any] | None = None  # what DeepSpeed's AutoEP has to know of them; names as in transformers
    logit_scale: float = 1.0  # by what the class multiplies the head's logits
    routes_in_float32: bool = (
        False  # whether the router's logits are computed in float32, whatever the model's precision
    )
    last_layer_at_targets: bool = True  # whether it may run where it is scored alone; see last_layer.py
    saved_keys: Callable[[dict[str, Any]], dict[str, Any]] = (
        _as_they_are  # config.json of the source -> of what is saved
    )
    carried: str | None = None
    """A pattern of tensor names that are not computed here: they are not loaded, and saved as the source has them."""
    save_as_read: Callable[[PreTrainedModel, Collection[str]], None] | None = None
    """Where a checkpoint may have several layouts: makes a model save in that of the tensor names that were read."""
    warnings: Callable[[PreTrainedConfig], list[str]] = lambda config: []  # what `check` has to say of a config
    checked: tuple[str, ...] = ()  # of a family that no file declares: what a self-check compared, with the numbers

    def __post_init__(self):
        full = self.attention is Attention.FULL
        if self.attention is not Attention.BY_BLOCK_SIZE and full != (self.block_size is None):
            raise ConfigError(
                f"model family {self.name}: block_size {self.block_size} with {self.attention} attention; None belongs to "
                "full attention, a number to the others"
            )
        if (self.attention is Attention.CAUSAL_CONTEXT) != (self.noise is Noise.UNIFORM):
            raise ConfigError(
                f"model family {self.name}: {self.noise} noise with {self.attention} attention; uniform noise and causal "
                "context go together"
            )
        if self.logit_shift not in (0, 1):
            raise ConfigError(f"model family {self.name}: logit_shift {self.logit_shift}; it is 0 or 1")

    @property
    def sees_whole_document(self) -> bool | None:
        """Whether attention is full; None where the block size chooses."""
        return None if self.attention is Attention.BY_BLOCK_SIZE else self.attention is Attention.FULL

    def has_full_attention(self, block_size: int | None) -> bool:
        """In a run with this block size, where null stands for whole documents. Raises ConfigError for what its models have
        not."""
        whole = block_size is None
        if self.sees_whole_document not in (None, whole):
            raise ConfigError(
                f"block_size null: a model of the family {self.name} is {self.attention}; set block_size, such as to "
                f"{self.block_size}"
                if whole
                else f"block_size {block_size}: the model family {self.name} has full attention, in which a document has no "
                "blocks; set block_size to null"
            )
        return whole

    def special_tokens(self, keys: Mapping[str, Any]) -> SpecialTokens:
        """By the keys of a config.json: those that it states, else the table's where its vocabulary has them. A family
        without a table leaves them to the tokenizer."""
        stated = {
            name: keys.get(f"{name}_token_id", id) for name, id in self.special._asdict().items() if id is not None
        }
        size = (keys if "vocab_size" in keys else keys.get("text_config") or {}).get("vocab_size", 0)
        return SpecialTokens(**{name: id for name, id in stated.items() if isinstance(id, int) and 0 <= id < size})


class Others(Protocol):
    """Where families come from that no file declares."""

    def claim(self, file: Path, keys: Mapping[str, Any]) -> tuple[Family, Variant] | None:
        """Whose checkpoint has this config.json, or None. Raises CheckpointError for one that is known and refused."""

    def of(self, config: PreTrainedConfig) -> Family: ...

    def variant_of(self, config: PreTrainedConfig) -> Variant: ...


class _Families(Table[Family]):
    others: Others  # set by the file that has them

    def add(self, entry: Family) -> Family:
        for variant in entry.variants:
            variant.register()
        return super().add(entry)

    def of(self, config: PreTrainedConfig) -> Family:
        """Whose config this is, that `registry.read_config` has read."""
        declared = (family for family in self for v in family.variants if v.config_class is type(config))
        return next(declared, None) or self.others.of(config)

    def variant_of(self, config: PreTrainedConfig) -> Variant:
        declared = (v for family in self for v in family.variants if v.config_class is type(config))
        return next(declared, None) or self.others.variant_of(config)

    @property
    def model_types(self) -> list[str]:
        return [variant.model_type for family in self for variant in family.variants]

    def claiming(self, file: Path, keys: Mapping[str, Any]) -> tuple[Family, Variant]:
        """Whose checkpoint has this config.json. Raises ConfigError for nobody's."""
        model_type, architectures = keys.get("model_type"), keys.get("architectures") or []
        named = [(f, v) for f in self for v in f.variants if v.model_type == model_type]
        if not named and (other := self.others.claim(file, keys)) is not None:
            return other
        if not named:
            raise ConfigError(
                f"model_type {model_type!r} in {file} is not a known family: {', '.join(self.model_types)}; nor is it a "
                "decoder of transformers; a new one is a file in dfactory/models/families/"
            )
        for family, variant in named:
            if variant.claims(architectures):
                return family, variant
        known = ", ".join(name for _, variant in named for name in variant.architectures)
        raise ConfigError(f"architectures {architectures} in {file}: of model_type {model_type} only {known} is known")


FAMILIES = _Families("model family", __package__, "dfactory.families")
