"""Decoder traces -> TokenIds with the step at which each token was committed: lines of `dfactory generate --keep-trace`.

Steps are counted in each block from the first forward that committed something there; on a canvas, where every forward
sees all blocks, over the whole response. Which traces a run may use is TraceRules.
"""

import dataclasses

import numpy as np

from dfactory.data import fields
from dfactory.data.columns import Format
from dfactory.data.fields import BadRow, Fault, TokenIds, Trace
from dfactory.types import NEVER, UNDECODED, WHOLE, steps_in_order


@dataclasses.dataclass(frozen=True)
class TraceRules:
    """What the records of a run need of a trace."""

    block_size: int | None = None  # where views are made from traces, the recipe's, or WHOLE; None: a record needs none
    only_correct: bool = True

    def leave_out(self, trace: Trace | None) -> bool:
        return self.only_correct and trace is not None and trace.correct is False

    def find_fault(self, trace: Trace | None) -> BadRow | None:
        if self.block_size is None:
            return None
        if trace is None:
            return BadRow(
                Fault.TRACE,
                "the record has no commit_step: view_source trace needs what `dfactory generate --keep-trace` wrote",
            )
        if wrong := self._wrong_pattern(trace):
            return BadRow(Fault.TRACE, wrong)
        if trace.edited:
            return BadRow(
                Fault.TRACE, "the trace has edits: views would show the new tokens too early; decode without editing"
            )
        return None

    def _wrong_pattern(self, trace: Trace) -> str | None:
        """Where the decoder saw something else than the views of this run can show."""
        canvas = self.block_size == WHOLE
        if canvas and not trace.canvas:
            return (
                f"the trace was decoded block by block (block_size {trace.block_size}, block_origin 0): a model with full "
                "attention sees a whole canvas; decode the prompts with this model"
            )
        if trace.canvas and not canvas:
            return (
                "the trace was decoded on a canvas (its block_origin is the length of the prompt): a block-causal model "
                "never sees later masks; decode the prompts with this model"
            )
        if not canvas and trace.block_size != self.block_size:
            return (
                f"block_size is {trace.block_size}, the recipe's is {self.block_size}: decode with "
                f"decode.block_size={self.block_size}, or train with the trace's"
            )
        return None

    def whole_canvas(
        self, trace: Trace | None, ids: np.ndarray, trainable: np.ndarray, mask_id: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """-> input_ids, trainable: with the masks after a response on a canvas, where views are made from it."""
        if self.block_size != WHOLE:
            return ids, trainable
        masks = np.full(trace.masks_left, mask_id, ids.dtype)
        return np.concatenate([ids, masks]), np.concatenate([trainable, np.zeros(len(masks), trainable.dtype)])


NO_TRACES = TraceRules()


def _read_trace(row: dict) -> TokenIds:
    prompt, response = (fields.integers(row[name], name) for name in ("prompt_ids", "token_ids"))
    edits, correct = row.get("edits"), row.get("correct")
    size, canvas = _layout(row, len(prompt), len(response))
    if edits is not None and not isinstance(edits, list):
        raise BadRow(Fault.FIELD, f"edits is {fields.show(edits)}: it must be a list")
    if correct is not None and not isinstance(correct, bool):
        raise BadRow(Fault.FIELD, f"correct is {fields.show(correct)}: it must be true or false")
    if isinstance(row["commit_step"], list) and NEVER in row["commit_step"]:
        raise BadRow(
            Fault.TRACE,
            f"commit_step[{row['commit_step'].index(NEVER)}] is {NEVER}: a mask was left there; decode with "
            "decode.early_stop=false and decode.suppress_special=true",
        )
    commit_step = fields.integers(row["commit_step"], "commit_step", "steps")
    if len(commit_step) != len(response):
        raise BadRow(
            Fault.FIELD,
            f"commit_step has {len(commit_step)} numbers for {len(response)} token_ids: it needs one for each",
        )
    masks_left = _count(row, "masks_left")
    if canvas:
        steps_T = _steps_of_canvas(commit_step, len(prompt), masks_left)
    else:
        steps_T = _steps_of_blocks(commit_step, len(prompt), size)
    return TokenIds(prompt + response, len(prompt), Trace(steps_T, size, bool(edits), correct, canvas, masks_left))


def _layout(row: dict, num_prompt: int, num_response: int) -> tuple[int, bool]:
    """The block size, and whether blocks are counted from the end of the prompt, as on a canvas."""
    size, origin = row.get("block_size"), _count(row, "block_origin")
    if type(size) is not int or size < 1:
        raise BadRow(
            Fault.FIELD, f"block_size is {fields.show(size)}: it must be the integer that the trace was decoded with"
        )
    if origin not in (0, num_prompt):
        raise BadRow(
            Fault.FIELD,
            f"block_origin is {origin}: blocks begin at 0, or on a canvas after the prompt, at {num_prompt}",
        )
    if not origin and (num_prompt + num_response) % size:  # the last block of a canvas may be short
        raise BadRow(
            Fault.FIELD,
            f"prompt_ids and token_ids have {num_prompt} + {num_response} tokens: a trace runs to the end of a block "
            f"of block_size {size}",
        )
    return size, origin > 0


def _count(row: dict, name: str) -> int:
    """A number of tokens that is 0 where the row does not have it."""
    value = row.get(name, 0)
    if type(value) is not int or not 0 <= value < UNDECODED:
        raise BadRow(Fault.FIELD, f"{name} is {fields.show(value)}: it must be a number of tokens")
    return value


def _steps_of_canvas(commit_step: list[int], num_prompt: int, masks_left: int) -> np.ndarray:
    """Forwards of the response -> those that committed something, over prompt, response and the masks after it."""
    prompt, masks = np.full(num_prompt, -1), np.full(masks_left, UNDECODED)
    return np.concatenate([prompt, steps_in_order(np.array(commit_step)), masks]).astype(np.int16)


def _steps_of_blocks(commit_step: list[int], num_prompt: int, block_size: int) -> np.ndarray:
    """Forwards of the response -> those forwards of each block that committed something: see Trace."""
    num_response = len(commit_step)
    rank = np.unique(commit_step, return_inverse=True)[1]  # a forward that committed nothing leaves no gap
    prompt_blocks = num_prompt // block_size
    step_CB = np.concatenate([np.full(num_prompt, -1), rank]).reshape(-1, block_size)[prompt_blocks:]
    first_C = np.where(step_CB >= 0, step_CB, num_response).min(axis=1)
    if (step_CB.max(axis=1)[:-1] >= first_C[1:]).any():
        raise BadRow(
            Fault.FIELD, "commit_step goes back from one block to the next: blocks are decoded one after another"
        )
    relative_CB = np.where(step_CB >= 0, step_CB - first_C[:, None], -1)
    return np.concatenate([np.full(prompt_blocks * block_size, -1), relative_CB.flatten()]).astype(np.int16)


TRACE_FORMATS: dict[tuple[str, ...], Format] = {
    ("prompt_ids", "token_ids", "commit_step"): Format(_read_trace, strict=False),
}
