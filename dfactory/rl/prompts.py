"""The endless stream of prompts: group n is answered to prompt n of a shuffled order that begins anew every epoch."""

import bisect

from dfactory.config.recipe import Recipe
from dfactory.data.prompts import Row, encode_prompt, prompt_of, read_rows
from dfactory.data.source import EpochOrder
from dfactory.errors import DataError
from dfactory.rl.rollouts import GroupCall
from dfactory.vocabulary import recipe_vocabulary

GROUP_BITS = 16  # of a rollout's noise id: its index within the group


class PromptStream:
    """Prompts by group number. Raises DataError with file:line for a row that cannot be answered or is too long."""

    def __init__(self, recipe: Recipe):
        self.vocabulary = recipe_vocabulary(recipe)
        self.rows: list[Row] = []
        weights: list[float] = []
        for entry in recipe.datasets:
            rows = read_rows(entry.path)
            self.rows += rows
            weights += [entry.weight] * len(rows)
        self.prompt_ids = [encode_prompt(row, self.vocabulary.encoder) for row in self.rows]
        self._refuse_long_prompts(recipe.max_length - recipe.decode.max_new_tokens)
        self._order = EpochOrder(weights, recipe.seed)
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

    def _refuse_long_prompts(self, room: int) -> None:
        for row, ids in zip(self.rows, self.prompt_ids, strict=True):
            if len(ids) > room:
                raise DataError(
                    f"{row.origin}: the prompt has {len(ids)} tokens, max_length less decode.max_new_tokens leaves {room}: "
                    "raise max_length or leave the prompt out"
                )
