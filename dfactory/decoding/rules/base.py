"""What a decoding rule is: it decides which masks of a block become tokens, from what a forward says of them.

    logits --Distribution--> Proposal, columns --Acceptance--> confidence --DecodingRule--> commit, edit, remask

A rule is a frozen dataclass: its fields are its keys (`decode.<field>`), its class attributes say what it needs. It lives in
one file of this package, which adds it to RULES, or in a package of one's own with an entry point in the group
`dfactory.decoding_rules`. docs/decoding.md shows how to write one.

Letters: R responses that are decoded together, B block size, N open positions of all of them, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import torch

from dfactory.seams import Table


class Proposal(NamedTuple):
    """What the model would put at each position; tensors of one shape.

    vocabulary (a b c) with p = (0.5 0.3 0.2), b drawn:  token b   logprob ln 0.3   top_token a   top_logprob ln 0.5
    """

    token: torch.Tensor  # int64
    logprob: torch.Tensor  # float32, of `token` under the processed distribution
    top_token: torch.Tensor  # int64, the most probable one
    top_logprob: torch.Tensor  # float32, its


@dataclasses.dataclass(frozen=True)
class Column:
    """A number for each open position. The decoder computes only the columns that a rule reads.

    `of` takes log-probabilities [N, V] of the processed distribution to numbers [N], on the model's device. With
    `compares` it takes those of the block's last forward too, NaN at its first one. CONFIDENCE and CHANCE have no `of`:
    they are made on the host.
    """

    name: str
    meaning: str
    of: Callable[..., torch.Tensor] | None = None
    compares: bool = False


def _entropy(logprob_NV: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(logprob_NV.exp()).sum(dim=-1)


def _margin(logprob_NV: torch.Tensor) -> torch.Tensor:
    best_N2 = logprob_NV.topk(2, dim=-1).values.exp()
    return best_N2[:, 0] - best_N2[:, 1]


def _divergence(logprob_NV: torch.Tensor, last_NV: torch.Tensor) -> torch.Tensor:
    terms_NV = logprob_NV.exp() * (logprob_NV - last_NV)
    return terms_NV.masked_fill(logprob_NV == -torch.inf, 0.0).sum(dim=-1).nan_to_num(nan=torch.inf)


CONFIDENCE = Column("confidence", "probability that `acceptance` compares, lowered by `eos_penalty`")
ENTROPY = Column("entropy", "entropy of the distribution, in nats", _entropy)
MARGIN = Column("margin", "probability of the most probable token minus that of the second", _margin)
DIVERGENCE = Column(
    "divergence",
    "KL divergence from the distribution at the block's last forward, in nats; infinite at its first",
    _divergence,
    compares=True,
)
CHANCE = Column(
    "chance", "random number in [0, 1) of the prompt, the forward and the position; independent of the tokens drawn"
)
COLUMNS = (CONFIDENCE, ENTROPY, MARGIN, DIVERGENCE, CHANCE)


@dataclasses.dataclass(frozen=True)
class Forward:
    """What a forward says of the blocks that are decided together, on the host. Numbers at positions that are neither masked
    nor editable have no meaning."""

    proposal_RB: Proposal
    tokens_RB: torch.Tensor  # int64, the tokens of the block
    masked_RB: torch.Tensor  # bool
    editable_RB: (
        torch.Tensor
    )  # bool, tokens of the response; none unless the rule revises or there is an editing_threshold
    step_R: torch.Tensor  # int64, forwards that the block of each row has taken with masks, before this one
    columns: Mapping[str, torch.Tensor]
    memory: Mapping[str, torch.Tensor]

    def __getitem__(self, column: Column) -> torch.Tensor:
        """[R, B]: a column that the rule reads."""
        return self.columns[column.name]

    def recall(self, name: str, otherwise: float) -> torch.Tensor:
        """float32 [R, B]: what the rule put into `memory` at the block's last forward; `otherwise` at its first."""
        if name not in self.memory:
            return torch.full(self.masked_RB.shape, otherwise)
        return self.memory[name].nan_to_num(nan=otherwise)


class Decision(NamedTuple):
    """What becomes of the positions of the blocks, each [R, B]."""

    commit_RB: torch.Tensor  # bool, True only at masks: they become the tokens proposed
    edit_RB: torch.Tensor | None = None  # bool, True only at editable tokens: they become the tokens proposed
    remask_RB: torch.Tensor | None = None  # bool, True only at editable tokens: they become masks again
    memory: Mapping[str, torch.Tensor] | None = None  # numbers that the rule wants at the block's next forward


class Served(NamedTuple):
    """How SGLang decodes by a rule: its --dllm-algorithm, and what --dllm-algorithm-config maps."""

    algorithm: str
    config: Mapping[str, Any]


class DecodingRule(Protocol):
    """Inherit from it for the defaults. A response may have a rule of its own; those with equal rules share a call."""

    name: ClassVar[str]
    selector: ClassVar[str]  # with `wide_selector` and `Keys` set for each rule, below
    wide_selector: ClassVar[str]
    Keys: ClassVar[type]
    reads: ClassVar[tuple[Column, ...]] = (CONFIDENCE,)
    is_default: ClassVar[bool] = False
    """True for one rule: the default of `decode.rule`."""

    keeps_distribution: ClassVar[bool] = True
    """Whether, with acceptance `top`, it chooses positions by the distributions alone. Then the product of the recorded
    probabilities is the probability of a trace, which `policy_loss: trace` needs."""

    revises: ClassVar[bool] = False
    """Whether it may edit or remask. All tokens of the response in the block are open to it then. A block's forward number
    `most_steps` commits all masks that are left and remasks nothing."""

    may_wait: ClassVar[bool] = False
    """Whether a forward may commit nothing. The block's forward number `most_steps` then commits all masks that are left."""

    renoises: ClassVar[bool] = False
    """Whether it is a rule of models with uniform noise, which have no masks: see renoising.py."""

    def commit(self, forward: Forward) -> torch.Tensor:
        """bool [R, B]: which masks become tokens. At least one of every row that has one, unless the rule revises or
        may wait."""

    def decide(self, forward: Forward) -> Decision:
        """For rules that do more than commit."""
        return Decision(self.commit(forward))

    def most_steps(self, block_size: int) -> int:
        """Forwards within which every block has lost its masks."""
        return block_size

    def problem(self, block_size: int | None) -> str | None:
        """The first rule between its keys that they break, in words. Without a block size, those that need none."""
        return None

    def in_sglang(self, editing_threshold: float | None, max_post_steps: int) -> Served | None:
        """The same decoding in SGLang; None where it has none. The arguments are the keys that every rule shares."""
        return None

    @property
    def shown(self) -> str:
        """The caption of a picture of the decoding: the first key and its value."""
        dial = self.dial()
        return self.name if dial is None else f"{dial} {getattr(self, dial):g}"

    @classmethod
    def dial(cls) -> str | None:
        """Its first key, which trades speed for accuracy; None where it has no keys."""
        return next(_key_names(cls), None)

    @classmethod
    def of(cls, keys: object) -> "DecodingRule":
        """The rule with the values that it has in `keys`."""
        return cls(**{name: getattr(keys, name) for name in _key_names(cls)})

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        cls.Keys = cls  # as config/owners.py wants an entry
        cls.selector = cls.wide_selector = f"decode.rule {getattr(cls, 'name', '')}"


def _key_names(rule: Any) -> Iterator[str]:
    """Of a rule, which is a dataclass; its Protocol is not."""
    return (field.name for field in dataclasses.fields(rule))


RULES: Table[type[DecodingRule]] = Table("decode.rule", "dfactory.decoding.rules", "dfactory.decoding_rules")


def default_rule() -> type[DecodingRule]:
    return next(rule for rule in RULES if rule.is_default)
