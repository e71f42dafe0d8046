"""Tokens as people read them one by one: the printable text of each, in its place."""

from typing import Any

from dfactory.denoising import shown_text
from dfactory.vocabulary import INCOMPLETE, Vocabulary


class Pieces:
    """Texts of single tokens. The tokens of one character (its bytes) show it together: at the first, the others are empty.

    tokens  The  \xe2\x82 \xac 5  ->  "The", "€", "", "5"
    """

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self._alone: dict[int, str] = {}
        self._before = [] if vocabulary.encoder is None else vocabulary.encoder.encode_text("a")[-1:]

    def texts(self, token_ids: list[int | None]) -> list[str]:
        """The text of each token; None, a mask, has none and stands between two characters."""
        texts = ["" if token is None else self.alone(token) for token in token_ids]
        index = 0
        while index < len(texts):
            stop = index
            while stop < len(texts) and INCOMPLETE in texts[stop]:
                stop += 1
            if stop - index > 1 and INCOMPLETE not in (whole := shown_text(self.vocabulary, token_ids[index:stop])):
                texts[index:stop] = [whole, *[""] * (stop - index - 1)]
            index = max(stop, index + 1)
        return texts

    def alone(self, token: int) -> str:
        """The text of a token after another one, so that a space before a word is there."""
        if token not in self._alone:
            self._alone[token] = self._find(token)
        return self._alone[token]

    def _find(self, token: int) -> str:
        if not self._before or token in self._specials():
            return shown_text(self.vocabulary, [token])
        before, both = (shown_text(self.vocabulary, ids) for ids in (self._before, [*self._before, token]))
        return both[len(before) :] if both.startswith(before) else shown_text(self.vocabulary, [token])

    def _specials(self) -> set[int]:
        tokenizer: Any = self.vocabulary.tokenizer
        return {*tokenizer.all_special_ids, self.vocabulary.special.eos}
