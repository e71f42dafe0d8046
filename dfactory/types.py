"""The values that flow through dFactory, in the order in which they are made.

    record -> Example -> View(s) -> ViewBatch -> TokenScores -> LossTerms
                                        prompt -> Rollout

Dimension letters, used as suffixes everywhere: R packed sequences (rows), S their length (clean streams and views), N
targets, T document length, P positions held by a view, D documents in a batch, V vocabulary, H hidden, K views of a
document, B block size, G rollouts of a prompt.
"""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch

from dfactory.columns import check

NOISE_TABLE_ROWS = 1024  # vectors that the noise on mask embeddings is taken from, in one step
WHOLE = 2**30  # a block size: every document is one block, however long; full attention
NO_MASK = -1  # the mask's id of a model without one: no token's
PADDING = -1  # the document number of a position without a token: it sees nothing, and nothing sees it


class Place(NamedTuple):
    """The places of tokens: integer tensors (or arrays) of one shape, or of shapes that broadcast."""

    document: Any
    view: Any  # 0 = clean stream
    block: Any  # counted from the start of the document
    trunk: Any  # the shared prefix: the document whose clean stream comes before this one's; its own number without one

    def at(self, index) -> "Place":
        """The places of some of the tokens; `index` may be any index of the tensors."""
        return Place(*(field[index] for field in self))


class EmbeddingInputs(NamedTuple):
    """Everything that determines the input embeddings of some tokens: integer arrays or tensors of one shape, one number if
    all tokens have the same, or None if there is no such input. A policy embeds nothing else.

    Tokens may be computed once for several documents (a shared prefix, the cache of a prompt) only if all fields are equal:
    see `common_length` and `key`. A new input of the embedding becomes a field here, so that every place which makes one
    must give it, and every comparison includes it.
    """

    token: Any  # ids
    noise: Any  # decides the noise on a mask: the document's id, or in a batch a row of the noise table; -1 for none

    @property
    def key(self) -> tuple[bytes | int | None, ...]:
        """A hashable key, equal for equal inputs. For numpy arrays of one dtype."""
        return tuple(field.tobytes() if isinstance(field, np.ndarray) else field for field in self)


def common_length(one: EmbeddingInputs, other: EmbeddingInputs) -> int:
    """How many tokens two sequences have in common from their start, with all their embedding inputs. For numpy arrays."""
    length = min(len(one.token), len(other.token))
    differs: np.ndarray = np.zeros(length, bool)
    for fields in zip(one, other, strict=True):
        mine, theirs = (field[:length] if isinstance(field, np.ndarray) else field for field in fields)
        differs |= mine != theirs
    return int(differs.argmax()) if differs.any() else length


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One tokenised document, before it is aligned to blocks.

    `trainable_T` marks the response tokens: what the model has to produce, end-of-turn tokens included.

        "<role>HUMAN</role>hi<|role_end|><role>ASSISTANT</role>yo<|role_end|>"
         0      0 0        0 0           0      0        0      1 1
    """

    document_id: int  # stable name of the record: keys its noise, and leads back to file and line
    input_ids_T: np.ndarray  # int32
    trainable_T: np.ndarray  # bool
    origin: str = ""  # "file:line", for messages
    commit_step_T: np.ndarray | None = None  # as in AlignedDocument, where the record is a decoder's trace

    def __len__(self) -> int:
        return len(self.input_ids_T)


@dataclasses.dataclass(frozen=True, eq=False)
class AlignedDocument:
    """A document filled with EOS to whole blocks. Views are made from it.

    The loss covers the fill, because a decoder has to produce it. Metrics and lengths count only real tokens: the
    response up to and including the EOS that ends it. So they are comparable across block sizes.
    """

    document_id: int
    input_ids_T: np.ndarray  # int32
    trainable_T: np.ndarray  # bool, fill included
    block_size: int
    commit_step_T: np.ndarray | None = (
        None  # int16: the step of its block at which a token was committed; -1: prompt; UNDECODED: on a canvas, never
    )
    real_length: int | None = None  # tokens before the fill; None: there is no fill
    shown_ids_T: np.ndarray | None = None  # int32: the tokens that views show; None: input_ids_T
    canvas_T: np.ndarray | None = None  # int32, causal context: the first position of each one's canvas; -1: in none
    filled_T: np.ndarray | None = (
        None  # bool: where that is fill in place of a following turn, trainable too; None: nowhere
    )

    @property
    def num_blocks(self) -> int:
        return len(self.input_ids_T) // self.block_size

    def block_of(self, position_P: np.ndarray) -> np.ndarray:
        """The numbers of the blocks in which positions of a view lie."""
        return position_P // self.block_size if self.canvas_T is None else self.canvas_T[position_P]

    @property
    def view_ids_T(self) -> np.ndarray:
        """The tokens that views show and that their targets predict. The clean stream has `input_ids_T`."""
        return self.input_ids_T if self.shown_ids_T is None else self.shown_ids_T

    @property
    def embedding_inputs(self) -> EmbeddingInputs:
        """The embedding inputs of its clean stream."""
        return EmbeddingInputs(self.input_ids_T, noise=self.document_id)

    @property
    def real_T(self) -> np.ndarray:
        """bool: the response tokens without the fill."""
        length = len(self.input_ids_T) if self.real_length is None else self.real_length
        real_T = self.trainable_T & (np.arange(len(self.input_ids_T)) < length)
        return real_T if self.filled_T is None else real_T & ~self.filled_T


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A noised copy of some whole blocks of one aligned document. Positions without a target are context.

    document   The cat sat .        block size 2, response = "sat ."
    position_P          2   3
    input_ids_P        [M]  .
    target_P            1   0       position 2 predicts "sat"
    """

    position_P: np.ndarray  # int32, ascending: the document positions that the view covers
    input_ids_P: np.ndarray  # int32: tokens after noise
    target_P: np.ndarray  # bool: positions whose clean token has to be predicted
    t_P: np.ndarray  # float32 in [0, 1]: the mask ratio at which each position was noised; above 0 at targets
    elbo_weight_P: np.ndarray  # float32: -alpha'_t / (1 - alpha_t), that is 1/t; (n + 1) / l for exact counts
    columns_P: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """Extra columns of a view: `drafted` becomes the batch's column `drafted_N`, restricted to the targets."""
    after_clean: bool = False
    """Whether the left neighbour of a block is the clean token before it, as in a decoder, also where the view holds the
    block before it."""


@dataclasses.dataclass(frozen=True, eq=False)
class ViewBatch:
    """Packed sequences of documents, each `[clean | view 1 | ... | view K]`, with the targets to be scored.

    Every objective trains on this. Documents are numbered 0..D-1 over the whole batch, so that sums by document or by
    (document, view) are one `index_add`. Positions without a token have document number -1.

    The left neighbour of a target is the position before it in its own view, or where the view does not hold that one (or
    is `after_clean`, and it ends a block) the clean token at it, which may lie in a shared prefix. A document's first
    position is its own.

    Documents with equal first blocks may share the clean stream of those blocks: a shared prefix, without targets,
    before the first of them. Its number is D + that of the first document, and `trunk_RS` of their tokens names it.
    """

    input_ids_RS: torch.Tensor  # int64
    position_ids_RS: torch.Tensor  # int64: a view token has the position of its clean token
    document_RS: torch.Tensor  # int64, PADDING where there is no token, from D on in shared prefixes
    view_RS: torch.Tensor  # int64, 0 = clean stream
    block_RS: torch.Tensor  # int64, counted from the start of the document
    trunk_RS: torch.Tensor  # int64: the number of the document's shared prefix, or its own
    target_index_N: torch.Tensor  # int64 into the flattened rows, ascending
    left_index_N: torch.Tensor  # int64 into the flattened rows: the left neighbours, which predict with shifted logits
    clean_left_index_N: (
        torch.Tensor
    )  # int64: the same, but at a block's first position always the clean token before it
    target_ids_N: torch.Tensor  # int64: the token to predict there (no shift)
    real_N: torch.Tensor  # bool: whether that token is real, not fill
    t_N: torch.Tensor  # float32
    elbo_weight_N: torch.Tensor  # float32
    document_id_D: torch.Tensor  # int64
    response_length_D: torch.Tensor  # int64: response tokens of the document, fill included: what the loss covers
    answer_length_D: (
        torch.Tensor
    )  # int64: those of them that are real, up to and including EOS: what lengths compare by
    num_views_D: torch.Tensor  # int64: K of the document
    columns: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    """What sources, noise and the engine add, by name; columns.py lists all of them: `reference_elbo_D`."""

    @property
    def place_RS(self) -> Place:
        return Place(self.document_RS, self.view_RS, self.block_RS, self.trunk_RS)

    @property
    def embedding_inputs(self) -> EmbeddingInputs:
        return EmbeddingInputs(self.input_ids_RS, self.columns.get("embedding_noise_row_RS"))

    @property
    def document_N(self) -> torch.Tensor:
        """The document number of each target."""
        return self.document_RS.flatten()[self.target_index_N]

    @property
    def view_N(self) -> torch.Tensor:
        """The view number (from 1) of each target."""
        return self.view_RS.flatten()[self.target_index_N]

    @property
    def input_N(self) -> torch.Tensor:
        """The input token at each target after noise: the mask, a wrong token, or the target itself."""
        return self.input_ids_RS.flatten()[self.target_index_N]

    @property
    def num_targets(self) -> int:
        return self.target_index_N.numel()

    @property
    def num_tokens(self) -> int:
        """Positions that hold a token."""
        return int((self.document_RS != PADDING).sum())

    def to(self, device) -> "ViewBatch":
        names = [field.name for field in dataclasses.fields(self) if field.name != "columns"]
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        columns = {name: column.to(device, non_blocking=True) for name, column in self.columns.items()}
        return ViewBatch(**moved, columns=columns)

    def with_columns(self, **columns: torch.Tensor) -> "ViewBatch":
        """The same batch with further columns. Raises ValueError if dfactory/columns.py does not list one of that name, type
        and shape."""
        sizes = {
            "N": (self.num_targets,),
            "D": tuple(self.document_id_D.shape),
            "RS": tuple(self.input_ids_RS.shape),
            "1": (1,),
        }
        for name, column in columns.items():
            check(name, column, sizes)
        return dataclasses.replace(self, columns={**self.columns, **columns})

    def sum_by_document(self, value_N: torch.Tensor) -> torch.Tensor:
        """Sums of a number per target over the targets of each document, [D], in float32 and differentiable."""
        sums_D = torch.zeros(len(self.document_id_D), dtype=torch.float32, device=value_N.device)
        return sums_D.index_add(0, self.document_N, value_N.float())


class TokenScores(NamedTuple):
    """The model's scores of the targets of a ViewBatch: five numbers per target, never logits.

    A named tuple, because DeepSpeed must find the tensors in a module's output.
    """

    logprob_N: torch.Tensor  # float32, log p(target | view); carries the gradient
    entropy_N: (
        torch.Tensor
    )  # float32, entropy of p(. | view) in nats, at Policy.entropy_temperature; carries a gradient too
    hit_N: torch.Tensor  # bool, argmax p == target
    argmax_N: torch.Tensor  # int64, the most probable token: the model's draft
    argmax_logprob_N: torch.Tensor  # float32, its log-probability; no gradient


Count: TypeAlias = torch.Tensor | float
"""A number, or a scalar tensor that may be on a device. Reading its value would make the host wait."""


class Mean(NamedTuple):
    """A mean that has not been divided yet, so that it can still be summed over micro-batches and ranks."""

    total: torch.Tensor  # scalar
    count: Count  # type: ignore[assignment]  # tuples have a method of this name


@dataclasses.dataclass(frozen=True, eq=False)
class LossTerms:
    """What an objective returns for one micro-batch. The engine divides once, over the global batch and all ranks.

    `loss[name].total` carries the gradient; `loss[name].count` must equal `objective.counts(batch, scores)[name]`, which
    the engine needs before the first backward of the global batch. The loss is the sum of the terms, each times its entry in
    `weights`, or 1; terms are logged without their weight. `metrics` are means that are only logged.
    """

    loss: dict[str, Mean]
    metrics: dict[str, Mean]
    weights: dict[str, float] = dataclasses.field(default_factory=dict)


class Objective(Protocol):
    """Arithmetic on scores. No model, no communication, no division by a count. Inherit from it for the defaults."""

    counts_need_scores: bool = False
    """Whether `counts` reads the scores. If so, the engine scores a window of several micro-batches once without
    gradient before it trains on them: an exact denominator costs a forward. One micro-batch a rank costs nothing."""

    spans_micro_batches: bool = False
    """Whether a loss term joins scores of several micro-batches; the engine then replays the window in two passes."""

    def is_linear(self, batch: ViewBatch) -> bool:
        """Whether the loss terms are linear in this batch's log-probabilities and read no entropy, so that their gradient is
        known before the forward. The head then makes its own gradients in the forward (models/head.py)."""
        return False

    measure: "Callable[[ViewBatch, TokenScores], dict[str, Mean]] | None" = None
    """What an evaluation reports of a micro-batch; None: the losses of the targets, at each mask ratio of a grid."""

    def counts(self, batch: ViewBatch, scores: TokenScores | None) -> dict[str, Count]:
        """The denominators' shares of a micro-batch. `scores` is None where they are not needed."""

    def __call__(self, batch: ViewBatch, scores: TokenScores) -> LossTerms: ...


NEVER, GIVEN = -1, -2  # instead of the step of a commit: the position is still a mask; the token came with the draft
UNDECODED = 2**15 - 1  # in a document, instead of the step of a commit: a mask that every state shows


class FinishReason(enum.StrEnum):
    EOS = "eos"  # a block came to hold EOS with no mask before it
    LENGTH = "length"  # max_new_tokens were produced without EOS


class Edit(NamedTuple):
    """One replacement during decoding of a token that had been committed before.

    An id is the mask where a decoding rule masks a token again, or where decoding may emit it (decode.suppress_special
    false).
    """

    index: int  # type: ignore[assignment]  # into Rollout.token_ids; tuples have a method of this name
    step: int  # forward pass of the response, from 0
    old_id: int
    new_id: int


def steps_in_order(commit_step: np.ndarray) -> np.ndarray:
    """Steps renumbered 0, 1, ... without gaps; UNDECODED for NEVER. int64.

    >>> steps_in_order(np.array([4, 2, 4, NEVER])).tolist()
    [1, 0, 1, 32767]
    """
    committed = commit_step != NEVER
    ordered = np.full(len(commit_step), UNDECODED)
    ordered[committed] = np.unique(commit_step[committed], return_inverse=True)[1]
    return ordered


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One decoded response, with the trace that produced it: `views.state_before` rebuilds what each forward saw.

    `token_ids` runs to the end of the last decoded block, because the tokens after EOS were context of those before it
    and a likelihood needs them. `output_ids` is the answer: up to and including EOS, at most max_new_tokens.

    block size 4, prompt of 2, with editing

    token_ids           a   dog | ran  .  EOS  EOS
    first_commit_step   0    1  |  5   4   4    4
    commit_step         0    2  |  5   4   4    4      edits: (1, 2, cat, dog)
    block_forwards         4    |       3              forwards 3 and 6 changed nothing, and so ended their blocks

    A step is a denoising forward. With shifted logits over a cache, the draw of a block's first token is a step of its own.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    commit_step: list[int]  # step of the response at which each token took its final value, from 0
    commit_logprob: list[float]  # its log-probability there, under the processed distribution
    first_commit_step: list[int]  # the one at which it stopped being a mask; NEVER and GIVEN instead, in both lists
    edits: list[Edit]  # in the order of their steps
    block_size: int
    block_forwards: list[int]  # steps of each decoded block, the first one may hold prompt tokens too
    output_ids: list[int]
    forwards: int  # denoising passes that this response took part in
    finish_reason: FinishReason
    block_origin: int = 0  # the position from which blocks are counted: on a canvas the end of the prompt
    masks_left: tuple[int, ...] = ()  # on a canvas the masks after token_ids, which every forward saw

    @property
    def tokens_per_forward(self) -> float:
        return len(self.output_ids) / max(self.forwards, 1)

    @property
    def step_in_block(self) -> np.ndarray:
        """`commit_step` counted from the first forward of each token's block; UNDECODED for a mask that is left. int64."""
        prompt = len(self.prompt_ids) - self.block_origin
        block: np.ndarray = (prompt + np.arange(len(self.token_ids))) // self.block_size - prompt // self.block_size
        steps = np.array(self.commit_step)
        relative = steps - (np.cumsum(self.block_forwards) - self.block_forwards)[block]
        return np.where(steps == NEVER, UNDECODED, relative)

    @property
    def step_in_document(self) -> np.ndarray:
        """`commit_step` counted over the forwards that committed something; UNDECODED for a mask that is left. int64."""
        return steps_in_order(np.array(self.commit_step))


@dataclasses.dataclass(frozen=True)
class Answer:
    """A finished response, for people; `rollout` has the trace that produced it."""

    text: str | None  # up to EOS, without special tokens; None where the model has no tokenizer
    rollout: Rollout = dataclasses.field(repr=False)

    @property
    def token_ids(self) -> list[int]:
        """Up to and including EOS."""
        return self.rollout.output_ids

    @property
    def logprobs(self) -> list[float]:
        """Of each of `token_ids` at the forward that wrote it, under the processed distribution."""
        return self.rollout.commit_logprob[: len(self.token_ids)]

    @property
    def forwards(self) -> int:
        return self.rollout.forwards

    @property
    def tokens_per_forward(self) -> float:
        return self.rollout.tokens_per_forward

    @property
    def finish_reason(self) -> FinishReason:
        return self.rollout.finish_reason


@dataclasses.dataclass
class TrainState:
    """Where a run stands. Saved with every checkpoint; together with the recipe it determines what comes next."""

    step: int = 0  # finished optimiser steps
    source: dict[str, Any] = dataclasses.field(default_factory=dict)  # the batch source's cursor
    tokens: int = 0  # row positions with a token that were trained on
    targets: int = 0
    skipped_steps: int = 0  # of the finished ones: those that changed nothing, because a number was not finite

    def advance(self, metrics: dict[str, float]) -> None:
        """Count one finished optimiser step."""
        self.step += 1
        self.tokens += int(metrics["tokens"])
        self.targets += int(metrics["targets"])
