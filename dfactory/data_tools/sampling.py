"""Answers of a model to the prompts of a file, each with a reward: what `preferences` and `rollouts` have in common."""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import yaml

from dfactory.commands.arguments import add_model_arguments, model_of
from dfactory.config.words import RECORDS_HELP
from dfactory.data.fields import BadRow, Completion, Conversation
from dfactory.data.prompts import Row, encode_prompt, prompt_of, read_rows
from dfactory.data.records import parse_row
from dfactory.data_tools.command import say
from dfactory.decoding.keys import DecodeKeys
from dfactory.errors import ConfigError, DataError, RolloutError
from dfactory.inference import Pipeline
from dfactory.rl.rewards.pool import RewardGroup, RewardPool, failure_messages
from dfactory.rl.rewards.specs import parse_rewards
from dfactory.types import Answer, FinishReason

GROUP_BITS = 16  # of a rollout's noise id: its index within the group, as in reinforcement learning
PROMPTS_AT_ONCE = 64


class RecordedAnswer(NamedTuple):
    """The answer that a row has itself, with what rewards read of an Answer: no forward wrote it."""

    text: str
    token_ids: list[int]
    tokens_per_forward: float = 0.0
    forwards: int = 0
    finish_reason: FinishReason = FinishReason.EOS


class Group(NamedTuple):
    """The answers to one prompt; a reward is None where the function would not score or failed."""

    row: Row
    prompt: str | list[dict[str, Any]]
    answers: list[Answer | RecordedAnswer]
    rewards: list[float | None]


def add_arguments(parser: argparse.ArgumentParser, generations: int) -> None:
    add_model_arguments(parser)
    parser.add_argument("--input", required=True, help=f"{RECORDS_HELP}: prompts, and what the reward reads")
    parser.add_argument("--output", required=True, help=".jsonl, .jsonl.gz or .parquet")
    parser.add_argument(
        "--reward",
        action="append",
        required=True,
        type=reward_entry,
        metavar="REWARD",
        help="as in reward_funcs, also {name: ..., option: ...}; several are added up",
    )
    parser.add_argument(
        "--num-generations", type=int, default=generations, help="answers a prompt (default: %(default)s)"
    )
    parser.add_argument("--allow-code-execution", action="store_true", help="for reward code_tests")
    parser.add_argument("--reward-workers", type=int, default=1, help="processes that score (default: %(default)s)")


def reward_entry(word: str) -> str | dict[str, Any]:
    """A name, or a mapping in YAML with options of the reward."""
    if not word.lstrip().startswith("{"):
        return word
    try:
        return yaml.safe_load(word)
    except yaml.YAMLError as problem:
        raise argparse.ArgumentTypeError(f"{word} is not YAML: {problem}") from problem


def sample(options: argparse.Namespace, keys: DecodeKeys, with_recorded: bool = False) -> Iterator[Group]:
    """Decode and score group after group, in the order of the prompts.

    `with_recorded` scores the row's own answer, too, as the last one of its group. Raises RolloutError if no answer could
    be scored, and DataError with file:line for a row without an answer.
    """
    count = options.num_generations
    if not 1 <= count < 1 << GROUP_BITS:
        raise ConfigError(f"--num-generations {count}: give a number from 1 to {(1 << GROUP_BITS) - 1}")
    if count > 1 and keys.temperature == 0:
        raise ConfigError("decode.temperature 0 gives the same answer every time: set decode.temperature=1.0")
    specs = parse_rewards(options.reward, allow_code_execution=options.allow_code_execution)
    rows = read_rows(options.input)
    pipeline = Pipeline(**model_of(options), keys=keys)
    if pipeline.vocabulary.tokenizer is None:
        raise ConfigError(f"{options.model} has no tokenizer, but rewards read text: give one")
    recorded = [recorded_answer(row, pipeline.vocabulary.tokenizer) for row in rows] if with_recorded else None
    scored = 0
    with RewardPool(specs, workers=options.reward_workers) as pool:
        for start in range(0, len(rows), PROMPTS_AT_ONCE):
            groups = list(_answered(pipeline, rows[start : start + PROMPTS_AT_ONCE], start, count))
            for index, (_, _, answers) in enumerate(groups if recorded else ()):
                answers.append(recorded[start + index])
            results = pool.score(RewardGroup.of(prompt, answers, row.fields) for row, prompt, answers in groups)
            for message, number in failure_messages(results).items():
                say(f"{number} times: {message}")
            for group, result in zip(groups, results, strict=True):
                scored += sum(reward is not None for reward in result.reward_G)
                yield Group(*group, result.reward_G)
            say(f"{start + len(groups):,} of {len(rows):,} prompts answered")
    if not scored:
        names = ", ".join(spec.name for spec in specs)
        raise RolloutError(f"{names} scored none of the answers to {options.input}: see above")


def recorded_answer(row: Row, tokenizer: Any) -> RecordedAnswer:
    """What the row says itself in answer to its prompt. Raises DataError with file:line where it has no answer in text."""
    record = parse_row(row.fields)
    if isinstance(record, BadRow):
        raise BadRow(record.fault, f"{row.origin}: {record}") from record
    match record:
        case Conversation(messages=[*_, {"role": "assistant", "content": str(text)}]) | Completion(completion=text):
            return RecordedAnswer(text, tokenizer.encode(text, add_special_tokens=False))
    raise DataError(f"{row.origin}: the row has no answer in text: leave out --recorded-answers, or such rows")


def _answered(
    pipeline: Pipeline, rows: Sequence[Row], start: int, count: int
) -> Iterator[tuple[Row, str | list[dict[str, Any]], list[Answer | RecordedAnswer]]]:
    """Each row with its prompt and `count` answers; the row's number is the first part of their noise ids."""
    prompts = [ids for ids in (encode_prompt(row, pipeline.vocabulary.encoder) for row in rows) for _ in range(count)]
    noise = [(start + index) << GROUP_BITS | member for index in range(len(rows)) for member in range(count)]
    answers = [pipeline.vocabulary.answer(rollout) for rollout in pipeline.decode(prompts, noise_ids=noise)]
    for index, row in enumerate(rows):
        yield row, prompt_of(row), list(answers[index * count : (index + 1) * count])
