"""An autoregressive model's own answers to prompts, as records for SFT.

    dfactory data distil --model DIR --prompts PROMPTS.jsonl --output ANSWERS.jsonl --max-new-tokens 200

A prompt is what `dfactory generate` reads: a row, whose last answer is left out. A line has `messages` (the prompt and the
answer), or `prompt` and `completion` where the prompt is plain text, and the row's further columns. Lines are in the order
of the prompts.

Interrupted work goes on with the same command and ends with the same bytes. ANSWERS.jsonl.distil.json holds the settings and
counts. SIGINT and SIGTERM keep what is done; the exit status is 130 or 75.
"""

import argparse
import collections
import contextlib
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from dfactory.allocator import bound_freed_memory, keep_freed_memory
from dfactory.commands.arguments import positive
from dfactory.config.words import MODEL_HELP, RECORDS_HELP, TEMPLATE_HELP
from dfactory.data.answers import ANSWER_PATTERN_HELP, compiled_pattern
from dfactory.data.chat import ChatEncoder
from dfactory.data.entries import paths_of
from dfactory.data.named_templates import read_chat_template
from dfactory.data.progress import reading
from dfactory.data_tools.asked import Prompt, read_prompts
from dfactory.data_tools.command import fraction, parser_of, say
from dfactory.data_tools.identity import content_of
from dfactory.data_tools.interrupts import status_of, terminable
from dfactory.data_tools.journal import Journal
from dfactory.data_tools.meter import Meter
from dfactory.data_tools.sampling import reward_entry
from dfactory.data_tools.teacher import Reply, Request, Teacher, is_diffusion_model
from dfactory.data_tools.verdicts import REPEATED, Judge, Verdict
from dfactory.decoding.distribution import Distribution
from dfactory.errors import ConfigError, RolloutError
from dfactory.models.hub import SMALL_FILES, WEIGHT_FILES, hub_name, resolve
from dfactory.models.manifest import hash_files, manifest_text
from dfactory.models.precision import faster_precision
from dfactory.rl.rewards.pool import RewardPool
from dfactory.rl.rewards.specs import parse_rewards

BATCHES = 8  # of a window, within which prompts are sorted by length
PROMPTS, TOO_LONG, TOKENS = "prompts", "prompts too long", "tokens"  # counts beside those of the verdicts


def main(words: list[str] | None = None) -> int:
    options = _parser().parse_args(words)
    _check(options)
    model_dir = resolve(options.model, options.revision, key="--model")
    if is_diffusion_model(model_dir):
        raise ConfigError(
            f"--model {options.model} is a diffusion model: `dfactory generate` and `dfactory data rollouts` sample from it"
        )
    journal = Journal.of(Path(options.output), "distil", _settings(options, model_dir))
    journal.source = _source(options, model_dir) | journal.source
    if journal.is_finished:
        say(f"finished before, with {journal.counts[Verdict.WRITTEN]:,} answers: {options.output}")
        return 0
    keep_freed_memory()
    try:
        with terminable(), journal:
            Distillation(options, model_dir, journal).run()
    except KeyboardInterrupt as interrupt:
        say(
            f"interrupted: {journal.counts[Verdict.WRITTEN]:,} answers to {journal.counts[PROMPTS]:,} prompts are in "
            f"{journal.partial}; the same command goes on"
        )
        return status_of(interrupt)
    return 0


class Distillation:
    """One process's work on an output, from where its journal stands to the end."""

    def __init__(self, options: argparse.Namespace, model_dir: Path, journal: Journal):
        self.options, self.journal = options, journal
        self.teacher = Teacher(
            model_dir,
            dtype=getattr(torch, options.dtype),
            device=options.device,
            max_new_tokens=options.max_new_tokens,
            distribution=Distribution(options.temperature, top_p=options.top_p),
            seed=options.seed,
        )
        template = read_chat_template(options.chat_template)
        self.encoder = ChatEncoder(self.teacher.tokenizer, template, template_origin=options.chat_template)
        bounds = [bound for bound in (options.max_prompt_tokens, self.teacher.max_prompt_tokens) if bound is not None]
        self.longest_prompt = min(bounds, default=None)
        self.replies = {int(number): Reply(*reply) for number, reply in journal.state.get("replies", {}).items()}

    def run(self) -> None:
        """Raises RolloutError if no answer is left to write."""
        journal, first = self.journal, next(self._prompts())
        if "total" not in journal.source:  # so that a bad row is an error before the first answer
            with reading(paths_of(self.options.prompts), "checking prompts"):
                journal.source |= {"total": sum(1 for _ in self._prompts())}
            journal.save()
        with _judge(self.options, first) as judge, Meter(journal.source["total"], self._answered) as meter:
            size = max(1, self.options.batch_size * BATCHES // self.options.num_samples)
            prompts = self._prompts(start=journal.state.get("window", 0))
            while window := list(itertools.islice(prompts, size)):
                self._answer(window, judge, meter)
        for message, number in judge.failures.items():
            say(f"{number} times: {message}")
        if not journal.counts[Verdict.WRITTEN]:
            raise RolloutError(f"no answer is left to write: {_summary(journal)}")
        journal.finish()
        say(f"{_summary(journal)}; {meter.tokens_per_second:,.0f} tokens/s")

    def _prompts(self, start: int = 0) -> Iterator[Prompt]:
        prompts = read_prompts(self.options.prompts, self.encoder, self.options.system)
        return itertools.islice(prompts, start, self.options.limit)

    def _answer(self, window: Sequence[Prompt], judge: Judge, meter: Meter) -> None:
        """Answer and write the prompts of one window. Its batches do not depend on what an earlier process did of it."""
        waiting = collections.deque(prompt for prompt in window if prompt.number >= self.journal.counts[PROMPTS])
        for batch in self._batches(window):
            if any(self._is_open(request) for request in batch):
                replies = self.teacher.answer(batch, meter.add_tokens)
                self.replies |= {request.number: reply for request, reply in zip(batch, replies, strict=True)}
                bound_freed_memory()
            self._write_answered(waiting, judge)
            self._save(window[0].number)
            meter.show(self._answered, f"{self.journal.counts[Verdict.WRITTEN]:,} written")
        self._write_answered(waiting, judge)  # what follows the last batch is too long
        self._save(window[-1].number + 1)

    @property
    def _answered(self) -> int:
        """Prompts, those included that wait to be written behind an earlier one, which is longer and comes later."""
        return self.journal.counts[PROMPTS] + len(self.replies) // self.options.num_samples

    def _is_open(self, request: Request) -> bool:
        is_written = request.number < self.journal.counts[PROMPTS] * self.options.num_samples
        return not is_written and request.number not in self.replies

    def _batches(self, window: Sequence[Prompt]) -> Iterator[list[Request]]:
        requests = [
            Request(number, prompt.ids)
            for prompt in window
            if not self._is_too_long(prompt)
            for number in self._requests(prompt)
        ]
        requests.sort(key=lambda request: (-len(request.prompt_ids), request.number))
        size = self.options.batch_size
        return (requests[first : first + size] for first in range(0, len(requests), size))

    def _requests(self, prompt: Prompt) -> range:
        """The numbers of a prompt's requests."""
        count = self.options.num_samples
        return range(prompt.number * count, (prompt.number + 1) * count)

    def _is_too_long(self, prompt: Prompt) -> bool:
        return self.longest_prompt is not None and len(prompt.ids) > self.longest_prompt

    def _write_answered(self, waiting: collections.deque[Prompt], judge: Judge) -> None:
        """Write the prompts up to the first one that waits for an answer."""
        while waiting:
            prompt, numbers = waiting[0], self._requests(waiting[0])
            if self._is_too_long(prompt):
                self.journal.counts[TOO_LONG] += 1
            elif all(number in self.replies for number in numbers):
                self._write(prompt, [self.replies.pop(number) for number in numbers], judge)
            else:
                return
            self.journal.counts[PROMPTS] += 1
            waiting.popleft()

    def _write(self, prompt: Prompt, replies: list[Reply], judge: Judge) -> None:
        texts = [self.teacher.text(reply) for reply in replies]
        for text, verdict in zip(texts, judge.verdicts(prompt, replies, texts), strict=True):
            self.journal.counts[verdict] += 1
            if verdict is Verdict.WRITTEN:
                self.journal.write(prompt.record(text))
        self.journal.counts[TOKENS] += sum(len(reply.token_ids) for reply in replies)

    def _save(self, window: int) -> None:
        self.journal.state = {"window": window, "replies": self.replies}
        self.journal.save()


@contextlib.contextmanager
def _judge(options: argparse.Namespace, first: Prompt) -> Iterator[Judge]:
    if not options.reward:
        yield Judge(options, None)
        return
    specs = parse_rewards(options.reward, allow_code_execution=options.allow_code_execution)
    with RewardPool(specs, workers=1, rows=[(first.origin, first.fields)]) as pool:
        yield Judge(options, pool)


def _summary(journal: Journal) -> str:
    """450 answers written to 500 prompts, 61,234 tokens; left out: 40 cut at --max-new-tokens, 10 empty: answers.jsonl"""
    counts = journal.counts
    left_out = [f"{counts[name]:,} {name}" for name in (TOO_LONG, *Verdict) if counts[name] and name != Verdict.WRITTEN]
    return (
        f"{counts[Verdict.WRITTEN]:,} answers to {counts[PROMPTS]:,} prompts, {counts[TOKENS]:,} tokens"
        + (f"; left out: {', '.join(left_out)}" if left_out else "")
        + f": {journal.output}"
    )


# --- options -----------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("distil")
    add = parser.add_argument
    add("--model", required=True, help=f"{MODEL_HELP}: an autoregressive one")
    add("--revision", help="of a model on the hub")
    add(
        "--prompts",
        required=True,
        nargs="+",
        metavar="FILE",
        help=f"{RECORDS_HELP}: prompts, or records, answered again",
    )
    add("--output", required=True, help=".jsonl")
    add("--max-new-tokens", type=positive, default=256, help="of an answer (default: %(default)s)")
    add("--max-prompt-tokens", type=positive, help="longer prompts are left out (default: what the model takes)")
    add("--temperature", type=float, default=0.0, help="0: the most probable token each time (default: %(default)g)")
    add(
        "--top-p",
        type=fraction,
        default=1.0,
        help="draw from the most probable tokens that hold this share (default: 1)",
    )
    add("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    add("--num-samples", type=positive, default=1, metavar="N", help="answers a prompt (default: %(default)s)")
    add("--system", metavar="TEXT", help="system message of conversations that have none")
    add("--chat-template", metavar="FILE|NAME", help=TEMPLATE_HELP)
    add("--limit", type=positive, metavar="N", help="the first so many prompts")
    add("--batch-size", type=positive, default=32, help="answers at once (default: %(default)s)")
    add(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float32"),
        help="auto: what a short measurement finds faster; on a GPU bfloat16",
    )
    add("--device", help="default: cuda where there is one, else cpu")
    add("--keep", default="finished", choices=("finished", "all"), help="all: also answers cut at --max-new-tokens")
    add("--drop-repeats", type=positive, metavar="N", help=f"leave out what has {REPEATED} tokens more than N times")
    add(
        "--reward",
        action="append",
        type=reward_entry,
        metavar="REWARD",
        help="as in reward_funcs, also {name: ..., option: ...}; leave out what it finds wrong; several are added up",
    )
    add(
        "--correct-from",
        type=float,
        default=1.0,
        help="the reward from which an answer is right (default: %(default)g)",
    )
    add("--answer-pattern", metavar="REGEX", help=f"leave out what is not the row's `answer`; {ANSWER_PATTERN_HELP}")
    add("--allow-code-execution", action="store_true", help="for reward code_tests")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Resolve the defaults. Raises ConfigError."""
    if not options.output.endswith(".jsonl"):
        raise ConfigError(
            f"--output {options.output}: the name must end in .jsonl, because interrupted work is appended to"
        )
    if not 0 <= options.temperature < float("inf"):
        raise ConfigError(f"--temperature {options.temperature:g}: give a number from 0 on")
    if options.num_samples > 1 and options.temperature == 0:
        raise ConfigError("--temperature 0 gives the same answer every time: set --temperature 1, or --num-samples 1")
    if options.top_p == 0:
        raise ConfigError("--top-p 0 leaves no token: give a number up to 1, or --temperature 0")
    if not 0 <= options.seed < 1 << 63:
        raise ConfigError(f"--seed {options.seed}: give a number from 0 on")
    compiled_pattern(options.answer_pattern, "--answer-pattern")
    if options.reward:
        parse_rewards(options.reward, allow_code_execution=options.allow_code_execution)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.dtype == "auto":
        options.dtype, reason = faster_precision(options.device)
        say(f"dtype {options.dtype}: {reason}")


SETTINGS = (
    *("max_new_tokens", "max_prompt_tokens", "temperature", "top_p", "seed", "num_samples", "system", "limit"),
    *("batch_size", "dtype", "keep", "drop_repeats", "reward", "correct_from", "answer_pattern"),
)


def _settings(options: argparse.Namespace, model_dir: Path) -> dict[str, Any]:
    """All that an answer depends on: files by their content, so that a copy elsewhere is the same."""
    return {
        "model_sha256": _model_hash(model_dir),
        "prompts_sha256": [content_of(word) for word in options.prompts],
        "chat_template_sha256": _text_hash(read_chat_template(options.chat_template)),
        **{name: getattr(options, name) for name in SETTINGS},
    }


def _source(options: argparse.Namespace, model_dir: Path) -> dict[str, Any]:
    """Where that came from, for readers."""
    commit = hub_name(model_dir)
    return {
        "model": options.model,
        "commit": commit and commit[1],
        "prompts": options.prompts,
        "device": options.device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _model_hash(model_dir: Path) -> str:
    """Of the manifest of its weights, configuration and tokenizer."""
    patterns = {*SMALL_FILES, *WEIGHT_FILES} - {"*.py", "*.md", "LICENSE*"}
    names = {file.name for pattern in patterns for file in model_dir.glob(pattern) if file.is_file()}
    return hashlib.sha256(manifest_text(hash_files(model_dir, sorted(names))).encode()).hexdigest()


def _text_hash(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()
