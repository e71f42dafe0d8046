"""Infilling: a template of an answer, whose blanks the decoder fills in, as a draft with the rules that keep the rest.

    ["The", 2, "sat."]    ->    The . . sat . EOS EOS EOS       blanks are masks; EOS to the end of the document

What stands in a template stays: rules that would edit or remask it are refused or switched off, and no blank becomes the
end of the answer. With full attention a blank sees the whole template. A block-causal model sees it to the end of the block
that the blank is in.
"""

import dataclasses
from collections.abc import Sequence

from dfactory.decoding.decisions import DecodeRules
from dfactory.decoding.response import document_length
from dfactory.errors import ConfigError, DataError

EVERYWHERE = 2**30  # tokens
Part = int | Sequence[int]
"""A blank of so many tokens, or the ids of a text."""


def fill_in(
    template: Sequence[Part], prompt_length: int, rules: DecodeRules, never: Sequence[int] = ()
) -> tuple[tuple[int, ...], DecodeRules]:
    """The draft of a template, and the rules with which the answer ends where the template ends. `never` are ids that no
    blank may hold, beside those that no answer may: special ones, such as the end of a turn. Raises DataError for a
    template without a blank or with the mask in a text, ConfigError for a rule that would not leave it alone."""
    rules = fixed_text(rules, never)
    ids: list[int] = []
    for part in template:
        if isinstance(part, int):
            if part < 1:
                raise DataError(f"a template has a blank of {part} tokens: it must have at least one")
            ids += [rules.mask_token_id] * part
        elif rules.mask_token_id in part:
            raise DataError("a text of a template holds the mask token: a blank is a number of tokens")
        else:
            ids += part
    if rules.mask_token_id not in ids:
        raise DataError("a template without a blank: give a number of tokens to fill in")
    most = len(ids) + 1  # EOS
    rules = dataclasses.replace(rules, max_new_tokens=most)
    fill = document_length(prompt_length, rules) - prompt_length - len(ids)
    return (*ids, *[rules.eos_token_id] * fill), rules


def fixed_text(rules: DecodeRules, never: Sequence[int] = ()) -> DecodeRules:
    """The rules without what would replace the text of a template, or write an end or another special token into a
    blank."""
    if rules.rule.renoises or rules.rule.revises:
        raise ConfigError(f"a template with {rules.rule.selector}, which may replace its text: take another rule")
    suppressed = tuple(sorted({*rules.distribution.suppressed_ids, *never}))
    distribution = dataclasses.replace(rules.distribution, suppressed_ids=suppressed)
    return dataclasses.replace(
        rules, distribution=distribution, min_new_tokens=EVERYWHERE, editing=None, answer_groups=()
    )
