"""One response while it is being decoded: its document so far, its trace, its rules' bookkeeping.

Formulas: docs/method.md#decoding.

    document    p p p p | p p . . | . . . . | . . . .        block size 4, prompt of 6, at most 9 new tokens
    block       0         1         2         3              10 positions are decoded, 9 are the answer at most

Blocks are counted from the start of the document, so the first one may begin with prompt tokens; those are never masked,
edited or scored. On a canvas (canvas.py) they are counted from the end of the prompt, and with `blocks_from: prompt` such
that one begins there; then the first and the last one may be short. A response ends after the first block that holds EOS
with no mask before it; with `early_stop` at once. It starts from masks, or from a draft followed by masks; a block that has
neither masks nor edits to hope for takes no forward.

With `sub_block_size` a block has parts, whose masks are committed one part after another.

With shifted logits over a cache the first token of a block, its *lead*, is predicted by the last position of the block
before, in the forward that writes that one's clean keys. It is drawn there, before the block's first denoising forward. Its
draw is a step of the response, but no denoising forward:

    . . . .    step 0: lead    a . . .    step 1: forward    a b . d    step 2: forward    a b c d

Letters: B block size, T document length. Everything lives on the host, in numpy.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from dfactory.decoding.cache import Span
from dfactory.decoding.decisions import DecodeRules
from dfactory.decoding.distribution import CHANCES, uniform_numbers
from dfactory.types import GIVEN, NEVER, Edit, EmbeddingInputs, FinishReason, Rollout


def document_length(prompt_length: int, rules: DecodeRules) -> int:
    """Tokens of the longest document: prompt and max_new_tokens, rounded up to the block where blocks are counted from the
    start, or where a block is written at once; else the last block may be short."""
    exact = (rules.canvas or rules.blocks_from_prompt) and not rules.rule.renoises
    return prompt_length + rules.max_new_tokens if exact else _whole_blocks(prompt_length, rules)


def _whole_blocks(prompt_length: int, rules: DecodeRules) -> int:
    origin = block_origin(prompt_length, rules)
    blocks = -(-(prompt_length - origin + rules.max_new_tokens) // rules.block_size)
    return origin + blocks * rules.block_size


def block_origin(prompt_length: int, rules: DecodeRules) -> int:
    """The position from which blocks are counted: the start of the document, or on a canvas the end of the prompt. Below 0
    where the first block is short, so that another one begins where the prompt ends."""
    if rules.canvas:
        return prompt_length
    return -(-prompt_length % rules.block_size) if rules.blocks_from_prompt else 0


class Outcome(NamedTuple):
    """What a forward decided about the block of a response."""

    token_B: np.ndarray  # int64, proposed
    logprob_B: np.ndarray  # their log-probabilities
    commit_B: np.ndarray  # bool: masks that become the tokens proposed
    edit_B: np.ndarray  # bool: tokens that become the tokens proposed
    remask_B: np.ndarray  # bool: tokens that become masks again
    memory: Mapping[str, torch.Tensor]  # what the rule wants at the block's next forward, each [B]


class Response:
    """A response in its slot: the document so far, its trace, and where its cache stands."""

    def __init__(
        self,
        index: int,
        prompt: Sequence[int],
        draft: Sequence[int],
        noise_id: int,
        slot: int,
        rules: DecodeRules,
        has_leads: bool = False,
    ):
        self.index, self.noise_id, self.slot, self.rules, self.has_leads = index, noise_id, slot, rules, has_leads
        self.start = len(prompt)  # position of the first response token
        self.origin = block_origin(self.start, rules)
        self.stop = document_length(self.start, rules)  # positions from here on do not exist
        self.tokens_T = np.full(_whole_blocks(self.start, rules), rules.mask_token_id, dtype=np.int64)
        self.tokens_T[: self.start + len(draft)] = [*prompt, *draft]
        self.first_step_T = np.where(self.tokens_T == rules.mask_token_id, NEVER, GIVEN)
        self.step_T = self.first_step_T.copy()
        self.logprob_T = np.zeros(len(self.tokens_T))
        self.edits: list[Edit] = []
        self.steps = self.leads = 0  # steps: forwards over masks or a whole block, and leads
        self.block_forwards: list[int] = []
        self.cached = 0  # blocks whose clean keys are in the cache
        self.mask_steps = self.post_steps = 0  # forwards of this part of the block with masks; of the block without
        self.is_complete = not self._enter(self.prompt_blocks)  # before any forward

    def _enter(self, block: int) -> bool:
        """Move to `block`, or to the first one after it that has open positions. False if there is none before the end."""
        editing = self.rules.editing
        self._go_to(block)
        while not self.masked_B.any() and (editing is None or editing.max_post_steps == 0):
            if self._ends_here():
                return False
            self._go_to(self.block + 1)
        return True

    def _go_to(self, block: int) -> None:
        size = self.rules.block_size
        self.block = block
        self.block_forwards.append(0)
        self.here = slice(self.origin + block * size, self.origin + (block + 1) * size)
        position_B = np.arange(self.here.start, self.here.stop)
        self.is_response_B = (position_B >= self.start) & (position_B < self.stop)
        self.part = self.mask_steps = self.post_steps = 0
        self._enter_part(0)
        self._forget()

    def _enter_part(self, first: int) -> bool:
        """Move to the first part of the block that has masks, from part `first` on. False if none has."""
        for part in range(first, self.rules.block_size // self._part_size):
            if self.masked_B[self._tokens_of(part)].any():
                self.part, self.mask_steps = part, 0
                return True
        return False

    @property
    def _part_size(self) -> int:
        return self.rules.sub_block_size or self.rules.block_size

    def _tokens_of(self, part: int) -> slice:
        return slice(part * self._part_size, (part + 1) * self._part_size)

    def _forget(self) -> None:
        self.memory: Mapping[str, torch.Tensor] = {}  # of the rule, about this block
        self.last_logprob_BV: torch.Tensor | None = None  # of the block's last forward, where the rule compares with it

    def change_rules(self, rules: DecodeRules) -> None:
        """Decode on by other rules; what the former one remembered is forgotten."""
        parts_change = rules.sub_block_size != self.rules.sub_block_size
        self.rules = rules
        self._forget()
        if parts_change:
            self.part = 0
            self._enter_part(0)

    @property
    def decoded(self) -> slice:
        """The positions of the response to the end of the block."""
        return slice(self.start, min(self.here.stop, self.stop))

    @property
    def tokens_B(self) -> np.ndarray:
        return self.tokens_T[self.here]

    @property
    def masked_B(self) -> np.ndarray:
        return (self.tokens_B == self.rules.mask_token_id) & self.is_response_B

    @property
    def group_B(self) -> np.ndarray:
        """The token range that each position of the block holds (ranges.py)."""
        groups = self.rules.answer_groups
        index_B = np.arange(self.here.start, self.here.stop) - self.start
        return np.array([groups[index] if 0 <= index < len(groups) else 0 for index in index_B])

    @property
    def due_B(self) -> np.ndarray:
        """The masks that the next forward may commit: those of one part of the block."""
        return self.masked_B & self._in_part_B

    @property
    def _in_part_B(self) -> np.ndarray:
        return np.arange(self.rules.block_size) // self._part_size == self.part

    @property
    def open_B(self) -> np.ndarray:
        """The positions of the block that the next forward decides about: masks, or all of the response but its lead."""
        if not self.rules.all_is_open:
            return self.due_B
        visible_B = self.is_response_B & ~self.masked_B
        if self.rules.rule.revises:
            visible_B &= self._in_part_B
        visible_B[0] &= not self._begins_with_lead
        return visible_B | self.due_B

    @property
    def forwards(self) -> int:
        """Denoising forwards so far."""
        return self.steps - self.leads

    @property
    def _begins_with_lead(self) -> bool:
        return self.has_leads and self.block > 0

    @property
    def awaits_lead(self) -> bool:
        """Whether the block's first token has to be drawn before the next forward."""
        return self._begins_with_lead and bool(self.masked_B[0])

    @property
    def pending(self) -> int:
        """Clean blocks that are not in the cache yet."""
        return self.block - self.cached

    @property
    def prompt_blocks(self) -> int:
        """Blocks that hold nothing but prompt."""
        return (self.start - self.origin) // self.rules.block_size

    def embedding_inputs(self, positions: slice) -> EmbeddingInputs:
        """Of some of its tokens, as they stand."""
        return EmbeddingInputs(self.tokens_T[positions], noise=None)

    @property
    def prompt_key(self) -> tuple:
        """Equal for two responses whose `prompt_blocks` are the same, in all that enters an embedding."""
        whole = self.clean_span(0, self.prompt_blocks).positions(self.rules.block_size)
        return self.prompt_blocks, self.embedding_inputs(whole).key

    def clean_span(self, first: int, stop: int) -> Span:
        """The forward over some finished blocks."""
        return Span(self.slot, first, stop, False, self.origin)

    @property
    def span(self) -> Span:
        """The next denoising forward."""
        within = None
        if self._keeps_other_parts:
            part = self._tokens_of(self.part)
            within = slice(self.here.start + part.start, min(self.here.start + part.stop, self.stop))
        return Span(self.slot, self.cached, self.block + 1, True, self.origin, self.stop, within)

    @property
    def _keeps_other_parts(self) -> bool:
        """Whether it runs over one part of the block: a forward ran over all of it, and that part predicts its own masks."""
        if not self.rules.sub_block_cache or self.mask_steps == 0:
            return False
        return not (self.has_leads and self.masked_B[self._tokens_of(self.part)][0])

    def uniform_B(self) -> np.ndarray:
        return uniform_numbers(self.rules.seed, self.noise_id, self.steps, self.rules.block_size)

    def chance_B(self) -> np.ndarray:
        """What the rule leaves to chance at the next forward."""
        return uniform_numbers(self.rules.seed, self.noise_id, self.steps, self.rules.block_size, CHANCES)

    @property
    def early_B(self) -> np.ndarray:
        """Where no token may come out that ends the response."""
        return np.arange(self.here.start, self.here.stop) < self.start + self.rules.min_new_tokens

    def apply(self, outcome: Outcome) -> bool:
        """Write what a forward decided, and enter the next block if this one is finished. False: the response is."""
        had_masks = self.masked_B.any()
        old_B = self.tokens_B.copy()
        token_B = np.where(outcome.remask_B, self.rules.mask_token_id, outcome.token_B)
        written_B = outcome.commit_B | outcome.edit_B | outcome.remask_B
        self._record(written_B & (token_B != old_B), old_B, token_B)
        self.tokens_B[written_B] = token_B[written_B]
        self.step_T[self.here][written_B] = self.steps
        self.logprob_T[self.here][written_B] = outcome.logprob_B[written_B]
        self.memory = outcome.memory
        self.steps += 1
        self.block_forwards[-1] += 1
        self.mask_steps += had_masks
        self.post_steps += not had_masks

        changed = (self.tokens_B != old_B).any()
        self.cached = self.block
        if self._stops_early():
            return False
        if not self._block_is_finished(bool(had_masks), bool(changed)):
            return True
        if not changed:
            self.cached += 1  # this pass ran over the block's final tokens: the keys that it wrote are the clean ones
        return not self._ends_here() and self._enter(self.block + 1)

    def lead(self, token: int, logprob: float) -> bool:
        """Write the first token of the block, which the block before it predicts. False: the response is finished."""
        first = self.here.start
        self.tokens_T[first], self.logprob_T[first] = token, logprob
        self.first_step_T[first] = self.step_T[first] = self.steps
        self.steps += 1
        self.leads += 1
        self.block_forwards[-1] += 1
        self.cached = self.block
        if self._stops_early():
            return False
        if self.due_B.any() or self._enter_part(self.part + 1):
            return True
        may_edit = self.rules.editing is not None and self.rules.editing.max_post_steps > 0
        return may_edit or (not self._ends_here() and self._enter(self.block + 1))

    def _stops_early(self) -> bool:
        """Whether the answer stands already: there is no mask before its end."""
        if not self.rules.early_stop:
            return False
        answer = self.tokens_T[self.start : min(self.start + self.rules.max_new_tokens, self.stop)]
        ends = np.flatnonzero(np.isin(answer, self.rules.end_ids))
        until = ends[0] if len(ends) else len(answer)
        return not (answer[:until] == self.rules.mask_token_id).any()

    def _ends_here(self) -> bool:
        return self.here.stop >= self.stop or self._eos() is not None

    def _record(self, changed_B: np.ndarray, old_B: np.ndarray, token_B: np.ndarray) -> None:
        """Note the changes of a forward: a first token at its position, or an edit of an earlier one. Masking a token again
        is an edit to the mask."""
        first_B = self.first_step_T[self.here]
        for offset in np.flatnonzero(changed_B & (first_B != NEVER)):
            index = self.here.start + int(offset) - self.start
            self.edits.append(Edit(index, self.steps, int(old_B[offset]), int(token_B[offset])))
        first_B[changed_B & (first_B == NEVER)] = self.steps

    def _block_is_finished(self, had_masks: bool, changed: bool) -> bool:
        # The steps bind only if the mask itself may be "committed": LLaDA2's own code then runs out of steps as well.
        if self.due_B.any() and self.mask_steps < self.rules.most_steps:
            return False
        if had_masks and self._enter_part(self.part + 1):
            return False
        if self.masked_B.any():
            return True
        editing = self.rules.editing
        if editing is None or self.post_steps >= editing.max_post_steps:
            return True
        return not had_masks and not changed

    def _eos(self) -> int | None:
        """Offset of the first token of the response that ends it, if no mask is before it."""
        response = self.tokens_T[self.decoded]
        ends = np.flatnonzero(np.isin(response, (*self.rules.end_ids, self.rules.mask_token_id)))
        if len(ends) and response[ends[0]] != self.rules.mask_token_id:
            return int(ends[0])
        return None

    def rollout(self) -> Rollout:
        response = self.decoded
        token_ids = self.tokens_T[response].tolist()
        eos = self._eos()
        ended = eos is not None and eos < self.rules.max_new_tokens
        left_masked = self.tokens_T == self.rules.mask_token_id
        return Rollout(
            prompt_ids=self.tokens_T[: self.start].tolist(),
            token_ids=token_ids,
            commit_step=np.where(left_masked, NEVER, self.step_T)[response].tolist(),
            commit_logprob=np.where(left_masked, 0.0, self.logprob_T)[response].tolist(),
            first_commit_step=self.first_step_T[response].tolist(),
            edits=self.edits,
            block_size=self.rules.block_size,
            block_origin=self.origin,
            masks_left=tuple(self.tokens_T[response.stop : self.stop].tolist()) if self.rules.canvas else (),
            block_forwards=self.block_forwards,
            output_ids=token_ids[: eos + 1] if ended else token_ids[: self.rules.max_new_tokens],
            forwards=self.forwards,
            finish_reason=FinishReason.EOS if ended else FinishReason.LENGTH,
        )
