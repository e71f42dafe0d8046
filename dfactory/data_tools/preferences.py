"""Preference pairs from a model's own answers, ranked by a reward.

    dfactory data preferences --model DIR --input PROMPTS.jsonl --output PAIRS.jsonl --reward exact_match \\
        --num-generations 8 decode.temperature=1.0

Of each prompt's answers the one with the highest reward is chosen and the one with the lowest rejected (the first of
equals), if their rewards differ by more than --margin and their texts differ. A line has `prompt`, `chosen` and `rejected`
in the form of the prompt (messages or text), `chosen_reward` and `rejected_reward`, and the prompt's further columns.

With --recorded-answers the answer that a row has itself is scored with the model's, after them: a model that is rarely
right gets a pair of every prompt where it is wrong. With that, one answer a prompt is enough (--num-generations 1).
"""

from typing import Any

from dfactory.data_tools.command import parser_of, say, split_overrides
from dfactory.data_tools.files import writing
from dfactory.data_tools.sampling import Group, add_arguments, sample
from dfactory.decoding.keys import load_decode_keys
from dfactory.errors import RolloutError

PROMPT_COLUMNS = {"messages", "prompt", "prompt_ids", "completion", "chosen", "rejected"}


def main(words: list[str] | None = None) -> int:
    parser = parser_of("preferences", epilog="further words: decode.key=value ...")
    add_arguments(parser, generations=8)
    parser.add_argument(
        "--margin", type=float, default=0.0, help="the rewards must differ by more (default: %(default)s)"
    )
    parser.add_argument(
        "--recorded-answers",
        action="store_true",
        help="the answer that a row has itself is scored, too, after the model's own",
    )
    options, overrides = split_overrides(parser, words)

    prompts = pairs = 0
    with writing(options.output) as write:
        for group in sample(options, load_decode_keys(overrides), options.recorded_answers):
            prompts += 1
            row = pair_of(group, options.margin)
            if row is not None:
                pairs += 1
                write(row)
        if not pairs:
            raise RolloutError(
                f"no prompt of {options.input} has two answers whose rewards differ by more than {options.margin:g}: raise "
                "--num-generations or decode.temperature, add --recorded-answers, or take another reward"
            )
    say(f"{pairs:,} pairs of {prompts:,} prompts, the others' answers do not differ enough: {options.output}")
    return 0


def pair_of(group: Group, margin: float) -> dict[str, Any] | None:
    """The row of a group; None without two answers that differ."""
    answers = zip(group.rewards, group.answers, strict=True)
    scored = [(reward, answer.text) for reward, answer in answers if reward is not None and answer.text.strip()]
    if not scored:
        return None
    best, worst = max(scored, key=lambda answer: answer[0]), min(scored, key=lambda answer: answer[0])
    if not best[0] - worst[0] > margin or best[1] == worst[1]:
        return None
    sides = (best[1], worst[1])
    if not isinstance(group.prompt, str):
        sides = tuple([{"role": "assistant", "content": text}] for text in sides)
    further = {name: value for name, value in group.row.fields.items() if name not in PROMPT_COLUMNS}
    rewards = {"chosen_reward": best[0], "rejected_reward": worst[0]}
    return {"prompt": group.prompt, "chosen": sides[0], "rejected": sides[1]} | rewards | further
