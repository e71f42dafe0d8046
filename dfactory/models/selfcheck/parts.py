"""The parts of the self-check: its rows, its two models, and the cache of a decoder in small."""

import copy
import dataclasses
import math
from typing import NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from dfactory.models.attention import MaskPlan
from dfactory.types import PADDING, Place, TokenScores
from dfactory.visibility import dense_mask

BLOCK = 4

# What a class raises when it is built or run in a way that it was not made for.
UNFIT = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError),
    StrictDataclassError,
)


class Unfit(Exception):
    """Why a decoder is refused."""


class Stream(NamedTuple):
    """Neighbouring blocks of a row."""

    document: int
    view: int
    trunk: int
    first: int  # block
    blocks: int


# Two documents that share a prefix (number 9), and one alone: [shared | clean | view | clean | view | clean | view].
PACKED = (
    Stream(9, 0, 9, 0, 2),
    Stream(0, 0, 9, 2, 1),
    Stream(0, 1, 9, 2, 2),
    Stream(1, 0, 9, 2, 1),
    Stream(1, 1, 9, 2, 2),
    Stream(2, 0, 2, 0, 1),
    Stream(2, 1, 2, 0, 2),
    Stream(PADDING, 0, PADDING, 0, 1),
)


class Row(NamedTuple):
    """A packed sequence, [1, S], and where it is scored."""

    place_RS: Place
    position_RS: torch.Tensor
    ids_RS: torch.Tensor
    target_N: torch.Tensor  # ascending
    wanted_N: torch.Tensor  # the tokens to predict there

    @classmethod
    def of(cls, streams: tuple[Stream, ...], vocabulary: int, block: int = BLOCK) -> "Row":
        """The streams with random tokens. Half of the tokens in views are scored."""
        fields = [
            torch.cat([torch.full((s.blocks * block,), value) for s, value in _labelled(streams, f)]) for f in range(3)
        ]
        blocks = torch.cat([torch.arange(s.first, s.first + s.blocks).repeat_interleave(block) for s in streams])
        inside = torch.cat([torch.arange(block).repeat(s.blocks) for s in streams])
        document, view, trunk = fields
        place_RS = Place(document[None], view[None], blocks[None], trunk[None])
        targets = ((view > 0) & (torch.rand(len(view)) < 0.5)).nonzero()[:, 0]
        ids = torch.randint(vocabulary, (2, len(view)))
        return cls(place_RS, (blocks * block + inside)[None], ids[:1], targets, ids[1][targets])

    @property
    def mask_RSS(self) -> torch.Tensor:
        """The dense rule. A token of padding sees itself: transformers' own attention gives NaN where nothing is seen."""
        return dense_mask(self.place_RS) | torch.eye(self.ids_RS.shape[1], dtype=torch.bool)


def _labelled(streams: tuple[Stream, ...], field: int):
    return [(stream, (stream.document, stream.view, stream.trunk)[field]) for stream in streams]


def draw(model_class: type[PreTrainedModel], config: PreTrainedConfig, **options: str) -> PreTrainedModel:
    return model_class._from_config(copy.deepcopy(config), dtype=torch.float32, **options)


@torch.no_grad()
def randomise(model: PreTrainedModel) -> None:
    """Weights that look at their inputs: with the initial ones all logits are nearly equal. Norms differ from 1, and biases
    from 0, so that one that is left out shows."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=1.5 / math.sqrt(parameter.shape[-1]))
        else:
            parameter.add_(0.2 * torch.randn_like(parameter))
    for name, buffer in model.named_buffers():
        if name in model.state_dict() and buffer.is_floating_point():
            buffer.add_(0.1 * torch.randn_like(buffer))


def moe_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that hold routed experts."""
    return [module for module in model.modules() if isinstance(getattr(module, "experts", None), nn.Module)]


def watch_experts(model: nn.Module) -> None:
    """Let a forward raise Unfit where experts are not run as the coverage of experts reads it: tokens, and the numbers of
    the experts that each takes."""
    for block in moe_blocks(model):
        block.experts.register_forward_pre_hook(_require_routing)


def _require_routing(experts: nn.Module, arguments: tuple) -> None:
    routed = len(arguments) > 1 and isinstance(arguments[1], torch.Tensor) and not arguments[1].is_floating_point()
    if not routed or not hasattr(experts, "num_experts"):
        raise Unfit(
            f"{type(experts).__name__} is not given its tokens and the numbers of their experts, which the coverage of "
            "experts is counted from here"
        )


def require_structure(model: PreTrainedModel) -> None:
    """Raise Unfit unless backbone, layers and head are where Policy looks for them."""
    if not model._supports_attention_backend:
        raise Unfit(
            f"the layers of {type(model).__name__} do not attend through transformers' attention interface, so the "
            "visibility rule does not reach them"
        )
    backbone, head = getattr(model, "model", None), getattr(model, "lm_head", None)
    if not isinstance(getattr(backbone, "layers", None), nn.ModuleList):
        raise Unfit(
            f"the layers of {type(model).__name__} are not at model.layers, where adapters, checkpoints and ZeRO look for "
            "them here"
        )
    if type(head) is not nn.Linear or head.bias is not None:
        raise Unfit(
            f"the head of {type(model).__name__} is not a linear layer `lm_head` without a bias, which scores are computed "
            "from in tiles here"
        )


def scores_of_logits(logits_NV: torch.Tensor, wanted_N: torch.Tensor) -> TokenScores:
    """From whole logits, by torch alone."""
    log_p = logits_NV.log_softmax(-1)
    best = log_p.max(-1)
    return TokenScores(
        log_p.gather(1, wanted_N[:, None])[:, 0],
        -(log_p.exp() * log_p).sum(-1),
        best.indices == wanted_N,
        best.indices,
        best.values,
    )


class Slots(Cache):
    """Keys and values of two documents, of which one is decoded: layers get those of both, as the decoder's cache has it."""

    def __init__(self, capacity: int):
        super().__init__(layers=[])
        self.capacity, self.position_N = capacity, None
        self.stored: dict[tuple[int, int], torch.Tensor] = {}

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        return tuple(self._written(layer_idx, part, new) for part, new in enumerate((key_states, value_states)))

    def _written(self, layer: int, part: int, new: torch.Tensor) -> torch.Tensor:
        _, heads, _, width = new.shape
        stored = self.stored.setdefault((layer, part), torch.zeros(2, heads, self.capacity, width))
        stored[1, :, self.position_N] = new[0]
        return stored

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class OfSlot:
    """The plan of queries that see the first keys of the second slot."""

    keys: int

    def attend(self, query, key, value, scaling):
        everything = torch.ones(1, query.shape[2], self.keys, dtype=torch.bool)
        return MaskPlan(everything).attend(query, key[1:, :, : self.keys], value[1:, :, : self.keys], scaling)

    def at(self, chosen_N, shape):
        return self
