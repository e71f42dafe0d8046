"""Infilling: what stands in a template stays, its blanks are filled, the answer ends where it ends."""

import dataclasses

import pytest

from dfactory.decoding import decode
from dfactory.decoding.rules.base import RULES
from dfactory.decoding.templates import fill_in
from dfactory.errors import ConfigError, DataError
from dfactory.types import GIVEN, FinishReason
from tests.decoding.conftest import EOS, MASK
from tests.decoding.test_decoder import random_prompts
from tests.decoding.test_joining import make_rules


def test_a_draft_of_blanks_and_text():
    """A prompt of 3 in blocks of 8: the document ends at 16, with room for 13."""
    draft, rules = fill_in([[7, 8], 2, [9]], 3, make_rules(editing_threshold=0.5, max_new_tokens=500))
    assert draft == (7, 8, MASK, MASK, 9, *[EOS] * 8)
    assert (rules.max_new_tokens, rules.editing) == (6, None)
    longer, _ = fill_in([[7] * 6, 1], 3, make_rules())
    assert longer == (*[7] * 6, MASK, *[EOS] * 6)


def test_the_blanks_are_filled_and_the_text_stays(policy):
    (prompt,) = random_prompts(5)
    draft, rules = fill_in([[11, 12, 13], 4, [14, 15], 3, [16]], len(prompt), make_rules(threshold=0.5))
    (rollout,) = decode(policy, [prompt], rules, drafts=[draft])
    answer = rollout.output_ids
    assert (answer[:3], answer[7:9], answer[12:]) == ([11, 12, 13], [14, 15], [16, EOS])
    assert not {MASK, EOS} & {*answer[3:7], *answer[9:12]}
    assert rollout.finish_reason is FinishReason.EOS
    blanks = {*range(3, 7), *range(9, 12)}
    assert all((step == GIVEN) == (place not in blanks) for place, step in enumerate(rollout.commit_step))


def test_no_blank_holds_what_it_must_not(policy):
    """The token that would come first without that."""
    (prompt,) = random_prompts(5)
    draft, rules = fill_in([[11], 4, [14]], len(prompt), make_rules(threshold=0.5))
    first = decode(policy, [prompt], rules, drafts=[draft])[0].output_ids[1]
    draft, rules = fill_in([[11], 4, [14]], len(prompt), make_rules(threshold=0.5), never=[first])
    assert first not in decode(policy, [prompt], rules, drafts=[draft])[0].output_ids


@pytest.mark.parametrize(
    "template, message",
    [
        ([[7]], "without a blank"),
        ([[7], 0], "a blank of 0 tokens"),
        ([[7, MASK], 2], "holds the mask token"),
    ],
)
def test_templates_that_cannot_be(template, message):
    with pytest.raises(DataError, match=message):
        fill_in(template, 3, make_rules())


def test_a_rule_that_may_replace_text_is_refused():
    renoising = next(rule for rule in RULES if rule.renoises)
    with pytest.raises(ConfigError, match=f"decode.rule {renoising.name}, which may replace its text"):
        fill_in([[7], 2], 3, dataclasses.replace(make_rules(), rule=renoising()))
