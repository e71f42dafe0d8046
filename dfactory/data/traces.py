"""Decoder traces -> TokenIds with the step at which each token was committed: lines of `dfactory generate --keep-trace`.

Steps are counted in each block from the first forward that committed something there. Which traces a run may use is
TraceRules.
"""

import dataclasses

import numpy as np

from dfactory.data import fields
from dfactory.data.columns import Format
from dfactory.data.fields import BadRow, Fault, TokenIds, Trace


@dataclasses.dataclass(frozen=True)
class TraceRules:
    """What the records of a run need of a trace."""

    block_size: int | None = None  # the recipe's, where views are made from traces; None: a record needs none
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
        if trace.block_size != self.block_size:
            return BadRow(
                Fault.TRACE,
                f"block_size is {trace.block_size}, the recipe's is {self.block_size}: decode with "
                f"decode.block_size={self.block_size}, or train with the trace's",
            )
        if trace.edited:
            return BadRow(
                Fault.TRACE, "the trace has edits: views would show the new tokens too early; decode without editing"
            )
        return None


NO_TRACES = TraceRules()


def _read_trace(row: dict) -> TokenIds:
    prompt, response = (fields.integers(row[name], name) for name in ("prompt_ids", "token_ids"))
    size, edits, correct = row.get("block_size"), row.get("edits"), row.get("correct")
    if type(size) is not int or size < 1:
        raise BadRow(
            Fault.FIELD, f"block_size is {fields.show(size)}: it must be the integer that the trace was decoded with"
        )
    if (len(prompt) + len(response)) % size:
        raise BadRow(
            Fault.FIELD,
            f"prompt_ids and token_ids have {len(prompt)} + {len(response)} tokens: a trace runs to the end of a block "
            f"of block_size {size}",
        )
    if edits is not None and not isinstance(edits, list):
        raise BadRow(Fault.FIELD, f"edits is {fields.show(edits)}: it must be a list")
    if correct is not None and not isinstance(correct, bool):
        raise BadRow(Fault.FIELD, f"correct is {fields.show(correct)}: it must be true or false")
    steps_T = _steps_of_blocks(
        fields.integers(row["commit_step"], "commit_step", "steps"), len(prompt), len(response), size
    )
    return TokenIds(prompt + response, len(prompt), Trace(steps_T, size, bool(edits), correct))


def _steps_of_blocks(commit_step: list[int], num_prompt: int, num_response: int, block_size: int) -> np.ndarray:
    """Forwards of the response -> those forwards of each block that committed something: see Trace."""
    if len(commit_step) != num_response:
        raise BadRow(
            Fault.FIELD,
            f"commit_step has {len(commit_step)} numbers for {num_response} token_ids: it needs one for each",
        )
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
