"""`dfactory bench ar train`: next-token training of an autoregressive model on the records of a recipe's steps."""

import argparse
import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track
from transformers import PreTrainedModel

from benchmarks.autoregressive import (
    BATCH_TOKENS,
    Text,
    by_length,
    check_head,
    read_model,
    scores,
    text_of,
    vocabulary_of,
)
from dfactory import distributed
from dfactory.algorithms import Data
from dfactory.allocator import bound_freed_memory
from dfactory.assembly import Inputs, document_rules, make_source
from dfactory.console import plain_console
from dfactory.data.examples import load_examples
from dfactory.engine.trainer import learning_rate_schedule
from dfactory.errors import ConfigError
from dfactory.models.hub import resolve
from dfactory.models.saving import carried_files
from dfactory.recipe import Recipe, load_recipe
from dfactory.runs.precision import settled

STATE, SETTINGS, METRICS, WEIGHTS = "state.pt", "training.json", "metrics.jsonl", "model.safetensors"
SAID_EVERY = 10  # steps, where no progress bar is shown


class Plan(NamedTuple):
    """Which texts each step trains on, known before the first one."""

    texts: dict[int, Text]  # by their number among the examples
    steps: list[list[int]]

    def positions_of(self, step: int) -> int:
        """Response tokens that a step predicts."""
        return sum(int(self.texts[index].scored_T.sum()) for index in self.steps[step])


def add_parser(commands) -> None:
    parser = commands.add_parser("train", help="fine-tune on a recipe's records", description=__doc__)
    parser.add_argument("recipe", type=Path, help="of dfactory: its records, steps, schedule and seed count")
    parser.add_argument("--model", type=Path, required=True, help="the autoregressive model's directory")
    parser.add_argument("--output", type=Path, required=True, help="directory for the trained model")
    parser.add_argument("--positions", type=int, help="response tokens to train on, instead of the recipe's steps")
    parser.add_argument("--save-steps", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument(
        "--batch-tokens", type=int, default=BATCH_TOKENS, help="of a micro-batch (default: %(default)s)"
    )
    parser.epilog = "Further words are recipe keys, such as learning_rate=1e-4."
    parser.set_defaults(run=train)


def train(options: argparse.Namespace) -> int:
    """Train, or go on with training, and write the model. Raises ConfigError for a run of other settings."""
    console = plain_console()
    recipe = load_recipe(options.recipe, [*options.overrides, f"model_name_or_path={options.model}"])
    if recipe.algorithm.data is not Data.RECORDS:
        raise ConfigError(f"stage {recipe.stage} does not train on records: take a recipe of sft or cpt")
    recipe = settled(recipe, distributed.device().type).recipe(recipe)
    plan = make_plan(recipe, options.positions)
    check_settings(options.output, settings_of(recipe, options, plan))
    if (options.output / WEIGHTS).is_file():
        console.print(f"{options.output} is complete: nothing to do", soft_wrap=True)
        return 0
    run = Training(recipe, plan, read_model(resolve(options.model)), options.output, options.batch_tokens)
    run.load()
    positions = sum(map(plan.positions_of, range(len(plan.steps))))
    console.print(f"{len(plan.steps)} steps, {positions:,} response tokens, {run.finished} steps done")
    steps = range(run.finished, len(plan.steps))
    for step in track(steps, "training", console=console, disable=not console.is_terminal):
        row = run.step(step)
        if not console.is_terminal and (step + 1) % SAID_EVERY == 0:
            console.print(
                f"step {run.finished}/{len(plan.steps)}  loss {row['loss']:.4f}  {row['cpu_seconds']:.2f} s of CPU"
            )
        bound_freed_memory()
        if run.finished % options.save_steps == 0 and run.finished < len(plan.steps):
            run.save()
    run.write(resolve(options.model))
    console.print(f"written: {options.output}", soft_wrap=True)
    return 0


# --- what is trained on ------------------------------------------------------------------------------------------------


def make_plan(recipe: Recipe, positions: int | None) -> Plan:
    """The documents of the steps of dfactory's own training, to the recipe's end or to so many response tokens."""
    vocabulary = vocabulary_of(resolve(recipe.model_name_or_path), recipe.chat_template_path)
    examples = load_examples(
        recipe.datasets,
        vocabulary.encoder,
        **vars(document_rules(recipe, vocabulary, None)),
        on_bad_row=recipe.on_bad_row,
        max_bad_fraction=recipe.max_bad_fraction,
        block_size=recipe.aligned_block_size,
        fill_unit=recipe.fill_unit,
    )
    source = make_source(recipe, Inputs(vocabulary, examples, None), rank=0, world_size=1)
    texts: dict[int, Text] = {}
    steps, seen = [], 0
    while (positions is None and len(steps) != recipe.max_steps) or (positions is not None and seen < positions):
        units = source.next_units()
        if units is None:
            break
        texts |= {index: text_of(examples[index], vocabulary.special.eos) for index in units if index not in texts}
        steps.append(units)
        seen += sum(int(texts[index].scored_T.sum()) for index in units)
    return Plan(texts, steps)


def settings_of(recipe: Recipe, options: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    """What the weights depend on."""
    names = ("seed", "learning_rate", "lr_scheduler_type", "lr_min", "warmup_steps", "weight_decay", "max_grad_norm")
    positions = sum(map(plan.positions_of, range(len(plan.steps))))
    keys = {name: getattr(recipe, name) for name in (*names, "adam_beta1", "adam_beta2", "adam_epsilon", "dtype")}
    return {"model": str(options.model), "steps": len(plan.steps), "response_tokens": positions, **keys}


def check_settings(output: Path, settings: dict[str, Any]) -> None:
    """Write them for a new run. Raises ConfigError where the directory has those of another one."""
    file = output / SETTINGS
    if file.is_file():
        found = json.loads(file.read_text())
        for name, value in settings.items():
            if found[name] != value:
                raise ConfigError(
                    f"{output} was trained with {name} {found[name]}, and this is {value}: take another --output"
                )
        return
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=2) + "\n")


# --- steps -------------------------------------------------------------------------------------------------------------


class Training:
    """A model, its optimiser, and how many steps of the plan are finished."""

    def __init__(self, recipe: Recipe, plan: Plan, model: PreTrainedModel, folder: Path, batch_tokens: int):
        self.recipe, self.plan, self.model, self.folder = recipe, plan, model.train(), folder
        self.batch_tokens, self.finished = batch_tokens, 0
        check_head(model, plan.texts[plan.steps[0][0]])
        self.optimizer = torch.optim.AdamW(
            _groups(model, recipe.weight_decay),
            lr=recipe.learning_rate,
            betas=(recipe.adam_beta1, recipe.adam_beta2),
            eps=recipe.adam_epsilon,
            fused=True,
        )
        self.schedule = learning_rate_schedule(recipe, self.optimizer, len(plan.steps))

    def step(self, step: int) -> dict[str, float]:
        """One optimiser step -> its line of metrics."""
        started = time.process_time()
        texts, count = [self.plan.texts[index] for index in self.plan.steps[step]], self.plan.positions_of(step)
        total = 0.0
        for batch in by_length(texts, self.batch_tokens):
            with self._precision():
                logprob_N, _ = scores(self.model, [texts[index] for index in batch])
            loss = -logprob_N.sum() / count
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm or float("inf"))
        learning_rate = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.finished = step + 1
        seconds = time.process_time() - started
        row = {"step": self.finished, "loss": total, "grad_norm": norm.item(), "learning_rate": learning_rate}
        row |= {"response_tokens": count, "tokens": sum(map(len, texts)), "cpu_seconds": seconds}
        with (self.folder / METRICS).open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def _precision(self) -> contextlib.AbstractContextManager:
        bf16 = self.recipe.dtype == "bfloat16"
        return torch.autocast(self.model.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()

    def save(self) -> None:
        parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        state = {name: part.state_dict() for name, part in parts.items()} | {"finished": self.finished}
        torch.save(state, self.folder / f"{STATE}.partial")
        (self.folder / f"{STATE}.partial").replace(self.folder / STATE)

    def load(self) -> None:
        """Go on from the last save, and drop the metrics of later steps."""
        if (self.folder / STATE).is_file():
            state = torch.load(self.folder / STATE, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.finished = state["finished"]
        rows = [row for row in _lines(self.folder / METRICS) if json.loads(row)["step"] <= self.finished]
        (self.folder / METRICS).write_text("".join(rows))

    def write(self, source: Path) -> None:
        """The model directory, with the tokenizer's files of its source."""
        for file in carried_files(source):
            shutil.copyfile(file, self.folder / file.name)
        written = self.folder / "written"
        self.model.save_pretrained(written)
        for file in sorted(written.iterdir(), key=lambda file: file.name == WEIGHTS):  # the weights last
            file.replace(self.folder / file.name)
        written.rmdir()
        (self.folder / STATE).unlink(missing_ok=True)


def _lines(file: Path) -> Iterator[str]:
    return iter(file.read_text().splitlines(keepends=True) if file.is_file() else [])


def _groups(model: PreTrainedModel, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, vectors do not, as in dfactory's training."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
