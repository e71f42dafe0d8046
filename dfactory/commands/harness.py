"""lm-eval's tasks on a checkpoint: `dfactory eval --lm-eval TASK`, or lm-eval's own command line with the model `dfactory`:

    python -m dfactory.commands.harness run --model dfactory --model_args path=runs/mine,threshold=0.9 --tasks gsm8k

`generate_until` decodes. `loglikelihood` is the ELBO of the continuation and its end, as training ends an answer: with a
conversation what the template writes after an answer, then EOS. Without an end, an answer that is cut where a block ends
would beat the whole one. It is a lower bound, from `pairs` complementary pairs of views
(docs/method.md#perplexity-bound), good for choosing among continuations: those of one question share their noise.
It does not know whether a continuation is the greedy one, and always says no. `loglikelihood_rolling` is refused.
"""

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from dfactory.commands.arguments import model_of
from dfactory.commands.elbo import estimate, read_examples
from dfactory.commands.evaluate import wilson_interval
from dfactory.commands.generate import answered
from dfactory.commands.measured import keep
from dfactory.console import plain_console
from dfactory.data.prompts import Row
from dfactory.decoding.keys import DecodeKeys, decode_keys_over
from dfactory.errors import ConfigError
from dfactory.inference import Pipeline
from dfactory.runs.lineage import Result

try:
    import lm_eval.models  # noqa: F401  its own models: lm-eval looks them up only while none is registered
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.tasks import TaskManager
except ImportError as problem:
    raise ConfigError(f"lm-eval cannot be imported ({problem}): pip install 'dfactory[eval]'") from problem

CHAT = "dfactory-messages:"  # what a conversation begins with where lm-eval wants a text
SHARES = ("acc", "acc_norm", "exact_match")  # metrics that are 0 or 1 for each question


@register_model("dfactory")
class BlockDiffusionLM(LM):
    """`path`: model directory or run folder; further arguments are decode keys, `dtype`, `device`, `pairs`."""

    def __init__(
        self,
        path: str,
        dtype: str = "auto",
        device: str | None = None,
        pairs: int = 8,
        init_weights: str = "pretrained",
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **keys: Any,
    ):
        super().__init__()
        if str(batch_size or "").isdecimal():
            keys["batch_size"] = int(batch_size)
        keys = decode_keys_over(DecodeKeys(), keys, "--model_args")
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            device = None  # lm-eval passes cuda:0 by default
        self._take(Pipeline(path, dtype=dtype, device=device, init_weights=init_weights, keys=keys), pairs)

    @classmethod
    def of(cls, pipeline: Pipeline, pairs: int = 8) -> "BlockDiffusionLM":
        """Around a model that has been loaded."""
        made = cls.__new__(cls)
        LM.__init__(made)
        made._take(pipeline, pairs)
        return made

    def _take(self, pipeline: Pipeline, pairs: int) -> None:
        if pipeline.vocabulary.encoder is None:
            raise ConfigError("the model directory has no tokenizer: lm-eval asks in text")
        self.pipeline, self.pairs = pipeline, pairs
        self.tokens = self.forwards = 0
        self.seconds = 0.0

    # --- what lm-eval asks for --------------------------------------------------------------------------------------

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Requests with equal options are decoded together."""
        texts: list[str | None] = [None] * len(requests)
        kinds: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            kinds.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        for options, indices in kinds.items():
            pipeline, stops = self._options(json.loads(options))
            rows = [Row(f"request {i}", {"prompt_ids": self._encode(requests[i].args[0])}) for i in indices]
            started = time.perf_counter()
            for index, (_, answer) in zip(indices, answered(pipeline, rows, plain_console(stderr=True)), strict=True):
                ends = [answer.text.find(stop) for stop in stops if stop in answer.text]
                texts[index] = answer.text[: min(ends, default=len(answer.text))]
                self.tokens += len(answer.token_ids)
                self.forwards += answer.forwards
            self.seconds += time.perf_counter() - started
        return texts

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "requests.jsonl"
            file.write_text("".join(json.dumps(self._record(*request.args)) + "\n" for request in requests))
            examples = read_examples(str(file), self.pipeline)
            noise_ids = _questions(requests)
            console = plain_console(stderr=True)
            bounds = estimate(self.pipeline, examples, self.pairs, self.pipeline.keys.seed, console, noise_ids)
        return [(float(elbo), False) for elbo in bounds.elbo_D]

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        raise ConfigError(
            "a task asks for the likelihood of whole texts, which a block-diffusion model only bounds: `dfactory eval "
            "--elbo-pairs N` tells the bound and its error"
        )

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation itself: the template's special tokens have to come from it, not from text."""
        return CHAT + json.dumps(chat_history)

    @property
    def tokenizer_name(self) -> str:
        return "dfactory"

    # --- text -> ids ------------------------------------------------------------------------------------------------

    def _encode(self, context: str) -> list[int]:
        vocabulary = self.pipeline.vocabulary
        if context.startswith(CHAT):
            return vocabulary.encoder.encode_prompt(json.loads(context.removeprefix(CHAT)))
        return vocabulary.encoder.encode_beginning(context) or [vocabulary.special.eos]

    def _record(self, context: str, continuation: str) -> dict[str, Any]:
        before = self._encode(context)
        answer = self.pipeline.vocabulary.encoder.encode_text(continuation)
        answer += self._end_of_turn if context.startswith(CHAT) else []
        answer += [self.pipeline.vocabulary.special.eos] * (answer[-1:] != [self.pipeline.vocabulary.special.eos])
        return {"input_ids": before + answer, "prompt_lengths": len(before)}

    @functools.cached_property
    def _end_of_turn(self) -> list[int]:
        """What the chat template writes after the text of an answer and training learns to produce."""
        encoder = self.pipeline.vocabulary.encoder
        question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
        input_ids_T, trainable_T = encoder.encode_messages([question, answer])
        produced, text = input_ids_T[trainable_T].tolist(), encoder.encode_text("!")
        starts = [at for at in range(len(produced)) if produced[at : at + len(text)] == text]
        return produced[starts[-1] + len(text) :]

    def _options(self, options: dict[str, Any]) -> tuple[Pipeline, list[str]]:
        """The pipeline by lm-eval's generation options, which have the names of transformers for some; and stop texts."""
        until = options.pop("until", [])
        if "max_gen_toks" in options:
            options["max_new_tokens"] = options.pop("max_gen_toks")
        if not options.pop("do_sample", True):
            options["temperature"] = 0.0
        return self.pipeline.over(options, "generation_kwargs"), [until] if isinstance(until, str) else until


def _questions(requests: list) -> list[int]:
    """A number from 1 for each request, the same for the choices of one question."""
    keys = [request.args[0] if request.doc_id is None else (request.task_name, request.doc_id) for request in requests]
    number_of = {key: number for number, key in enumerate(dict.fromkeys(keys), start=1)}
    return [number_of[key] for key in keys]


# --- dfactory eval --lm-eval -------------------------------------------------------------------------------------------


def evaluate_harness(arguments: argparse.Namespace, keys: DecodeKeys) -> int:
    console = plain_console()
    manager = _manager(arguments.lm_eval, arguments.include_path)
    model = BlockDiffusionLM.of(Pipeline(**model_of(arguments), keys=keys))
    results = simple_evaluate(
        model=model,
        tasks=arguments.lm_eval,
        task_manager=manager,
        limit=arguments.limit,
        apply_chat_template=arguments.chat_template,
        log_samples=bool(arguments.output),
        bootstrap_iters=1000,
    )
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(results, indent=1, default=str), encoding="utf-8")
    console.print(_table(results, model))
    keep(arguments, model.pipeline.keys, _results(results))
    return 0


def _manager(tasks: list[str], include_path: str | None) -> TaskManager:
    """Of the tasks in `include_path` where they are enough: lm-eval reads thousands of files to know its own."""
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise ConfigError(f"--include-path {include_path} is not a folder: give one with YAML tasks of lm-eval")
        manager = TaskManager(include_path=include_path, include_defaults=False)
        if all(manager.match_tasks([name]) for name in tasks):
            return manager
    manager = TaskManager(include_path=include_path)
    missing = [name for name in tasks if not manager.match_tasks([name])]
    if missing:
        raise ConfigError(f"--lm-eval {missing[0]}: lm-eval has no such task, nor has --include-path {include_path}")
    return manager


def _table(results: dict[str, Any], model: BlockDiffusionLM) -> Table:
    table = Table("task", "metric", "records", "value", "95% interval", title="lm-eval")
    for column in table.columns[2:]:
        column.justify = "right"
    for task, metric, value, count, error in _values(results):
        low, high = _interval(metric, value, count, error)
        table.add_row(task, metric, str(count), f"{value:.4f}", f"{low:.4f} .. {high:.4f}")
    if model.forwards:
        rate, speed = model.tokens / model.forwards, model.tokens / model.seconds
        table.caption = f"{rate:.2f} tokens a forward, {model.forwards} forwards, {speed:,.0f} tokens per second"
    return table


def _values(results: dict[str, Any]) -> Iterable[tuple[str, str, float, int, float]]:
    """(task, metric, value, records, standard error; nan where there is none)."""
    for task, values in results["results"].items():
        count = results["n-samples"].get(task, {}).get("effective", 0)
        for name, value in values.items():
            metric, _, kind = name.partition(",")
            if kind and not metric.endswith("_stderr") and isinstance(value, (int, float)):
                error = values.get(f"{metric}_stderr,{kind}")
                yield task, metric, value, count, error if isinstance(error, float) else float("nan")


def _results(results: dict[str, Any]) -> list[Result]:
    found = []
    for task, metric, value, count, error in _values(results):
        known = (metric in SHARES and count) or error == error  # nan: no standard error
        interval = _interval(metric, value, count, error) if known else ()
        found.append(Result(metric, float(value), task, *interval, records=count))
    return found


def _interval(metric: str, value: float, count: int, error: float) -> tuple[float, float]:
    """Wilson's for a share, else from lm-eval's own standard error."""
    if metric in SHARES and count:
        return wilson_interval(round(value * count), count)
    return value - 1.96 * error, value + 1.96 * error


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    sys.exit(cli_evaluate())
