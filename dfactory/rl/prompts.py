"""The endless stream of prompts: group n answers prompt n of an order that is shuffled again in every epoch."""

import bisect

import numpy as np

from dfactory.config.data import DatasetKeys
from dfactory.data.examples import DataReport
from dfactory.data.fields import BadRow, Fault
from dfactory.data.order import EpochOrder, tempered
from dfactory.data.prompts import Row, encode_prompt, prompt_of, rows_of
from dfactory.errors import DataError
from dfactory.recipe import Recipe
from dfactory.rl.rollouts import GroupCall
from dfactory.vocabulary import recipe_vocabulary

GROUP_BITS = 16  # of a rollout's noise id: its index within the group


class PromptStream:
    """Prompts by group number. A row that cannot be answered, or is too long, is a bad row: on_bad_row and
    max_bad_fraction decide, and DataError names file:line."""

    def __init__(self, recipe: Recipe):
        self.vocabulary = recipe_vocabulary(recipe)
        self.rows: list[Row] = []
        self.prompt_ids: list[list[int]] = []
        self.report = DataReport([entry.label for entry in recipe.datasets])
        self._on_bad_row, self._room = recipe.on_bad_row, recipe.max_length - recipe.decode.max_new_tokens
        counts: list[int] = []
        for entry in recipe.datasets:
            before = len(self.rows)
            self._read(entry)
            counts.append(len(self.rows) - before)
        self._check_report(recipe.max_bad_fraction)
        weights = tempered([entry.weight for entry in recipe.datasets], counts, recipe.mixing_temperature)
        self._order = EpochOrder(np.repeat(weights, counts), recipe.seed)
        self._starts = [0]  # the first group of each epoch, as far as they are known
        self._num_generations = recipe.num_generations

    def call(self, group: int) -> GroupCall:
        noise = [group << GROUP_BITS | index for index in range(self._num_generations)]
        return GroupCall(group, self.prompt_ids[self._index(group)], noise)

    def row(self, group: int) -> Row:
        return self.rows[self._index(group)]

    def origin(self, group: int) -> str:
        return self.row(group).origin

    def prompt(self, group: int) -> str | list[dict]:
        """As TRL hands it to rewards: messages, or text."""
        return prompt_of(self.row(group))

    def epoch(self, group: int) -> float:
        """Passes over the prompts before a group."""
        epoch, offset, length = self._place(group)
        return epoch + offset / length

    def _index(self, group: int) -> int:
        epoch, offset, _ = self._place(group)
        return int(self._order.visits(epoch)[0][offset])

    def _place(self, group: int) -> tuple[int, int, int]:
        """(epoch, place in it, its length) of a group."""
        while group >= self._starts[-1]:
            self._starts.append(self._starts[-1] + len(self._order.visits(len(self._starts) - 1)[0]))
        epoch = bisect.bisect_right(self._starts, group) - 1
        return epoch, group - self._starts[epoch], self._starts[epoch + 1] - self._starts[epoch]

    def _read(self, entry: DatasetKeys) -> None:
        """Take the rows of an entry that can be answered."""
        for origin, fields in rows_of(entry):
            try:
                if isinstance(fields, BadRow):
                    raise BadRow(fields.fault, f"{origin}: {fields}")
                row = Row(origin, fields)
                ids = encode_prompt(row, self.vocabulary.encoder)
                self._refuse_long(row, ids)
                prompt_of(row)
            except BadRow as bad:
                if self._on_bad_row == "error":
                    raise DataError(f"{bad}; or set on_bad_row: skip to go on without such rows") from bad
                self.report.refuse_told(bad)
                continue
            self.rows.append(row)
            self.prompt_ids.append(ids)
            self.report.kept += 1

    def _refuse_long(self, row: Row, ids: list[int]) -> None:
        if len(ids) > self._room:
            raise BadRow(
                Fault.TOO_LONG,
                f"{row.origin}: the prompt has {len(ids)} tokens, max_length less decode.max_new_tokens leaves "
                f"{self._room}: raise max_length or leave the prompt out",
            )

    def _check_report(self, max_bad_fraction: float) -> None:
        self.report.refuse_share_above(max_bad_fraction)
        if not self.rows:
            raise DataError(
                f"no row of {', '.join(self.report.files)} is a prompt:\n" + "\n".join(self.report.tell_refused())
            )
