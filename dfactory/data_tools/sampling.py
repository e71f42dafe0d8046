"""Answers of a model to the prompts of a file, each with a reward: what `preferences` and `rollouts` have in common."""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dfactory.commands.generate import Answerer
from dfactory.config.words import MODEL_HELP
from dfactory.data.prompts import Row, encode_prompt, prompt_of, read_rows
from dfactory.data_tools.command import say
from dfactory.decoding import decode
from dfactory.decoding.keys import DecodeKeys
from dfactory.errors import ConfigError, RolloutError
from dfactory.rl.rewards.pool import RewardGroup, RewardPool, failure_messages
from dfactory.rl.rewards.specs import parse_rewards
from dfactory.types import Rollout

GROUP_BITS = 16  # of a rollout's noise id: its index within the group, as in reinforcement learning
PROMPTS_AT_ONCE = 64


class Group(NamedTuple):
    """The answers to one prompt; a reward is None where the function would not score or failed."""

    row: Row
    prompt: str | list[dict[str, Any]]
    rollouts: list[Rollout]
    texts: list[str]
    rewards: list[float | None]


def add_arguments(parser: argparse.ArgumentParser, generations: int) -> None:
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_argument("--init-weights", default="pretrained", choices=("pretrained", "random"))
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="auto: the checkpoint's"
    )
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument(
        "--input", required=True, help=".jsonl, .jsonl.gz or .parquet: prompts, and what the reward reads"
    )
    parser.add_argument("--output", required=True, help=".jsonl, .jsonl.gz or .parquet")
    parser.add_argument("--reward", action="append", required=True, help="as in reward_funcs; several are added up")
    parser.add_argument(
        "--num-generations", type=int, default=generations, help="answers a prompt (default: %(default)s)"
    )
    parser.add_argument("--allow-code-execution", action="store_true", help="for reward code_tests")
    parser.add_argument("--reward-workers", type=int, default=1, help="processes that score (default: %(default)s)")


def sample(options: argparse.Namespace, keys: DecodeKeys) -> Iterator[Group]:
    """Decode and score group after group, in the order of the prompts. Raises RolloutError if no answer could be scored."""
    count = options.num_generations
    if not 1 <= count < 1 << GROUP_BITS:
        raise ConfigError(f"--num-generations {count}: give a number from 1 to {(1 << GROUP_BITS) - 1}")
    if count > 1 and keys.temperature == 0:
        raise ConfigError("decode.temperature 0 gives the same answer every time: set decode.temperature=1.0")
    specs = parse_rewards(options.reward, allow_code_execution=options.allow_code_execution)
    rows = read_rows(options.input)
    answerer = Answerer(options, keys)
    if answerer.vocabulary.tokenizer is None:
        raise ConfigError(f"{options.model} has no tokenizer, but rewards read text: give one")
    scored = 0
    with RewardPool(specs, workers=options.reward_workers) as pool:
        for start in range(0, len(rows), PROMPTS_AT_ONCE):
            groups = _decode(answerer, rows[start : start + PROMPTS_AT_ONCE], start, count)
            results = pool.score(RewardGroup.of(*answered, row.fields) for row, *answered in groups)
            for message, number in failure_messages(results).items():
                say(f"{number} times: {message}")
            for group, result in zip(groups, results, strict=True):
                scored += sum(reward is not None for reward in result.reward_G)
                yield Group(*group, result.reward_G)
            say(f"{start + len(groups):,} of {len(rows):,} prompts answered")
    if not scored:
        raise RolloutError(f"{', '.join(options.reward)} scored none of the answers to {options.input}: see above")


def _decode(answerer: Answerer, rows: Sequence[Row], start: int, count: int) -> list[tuple]:
    prompts = [ids for ids in (encode_prompt(row, answerer.vocabulary.encoder) for row in rows) for _ in range(count)]
    noise = [(start + index) << GROUP_BITS | member for index in range(len(rows)) for member in range(count)]
    rollouts = decode(answerer.policy, prompts, answerer.rules, noise_ids=noise)
    groups = []
    for index, row in enumerate(rows):
        mine = rollouts[index * count : (index + 1) * count]
        groups.append((row, prompt_of(row), mine, [answerer.vocabulary.text(rollout.output_ids) for rollout in mine]))
    return groups
