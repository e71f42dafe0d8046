"""`dfactory check`: what a recipe would do, told before anything is loaded or written.

Sections are printed in the order in which `train` would meet them: model, tokens, data, an example, rows and steps,
memory, output. A section that fails prints its error and those that do not need it go on; the first error's status is
the command's. Nothing here computes what training computes: the builders are train.py's own.
"""

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from dfactory.assembly import Inputs, make_source, read_inputs
from dfactory.commands import preview
from dfactory.config.load import Loaded
from dfactory.config.recipe import Recipe
from dfactory.data.chat import GENERATION_MARKER, PROBE_TURN, ChatEncoder, SpecialIds, read_chat_template, special_ids
from dfactory.data.examples import DataReport, Examples
from dfactory.data.pack import align
from dfactory.data.pairs import SIDES
from dfactory.data.records import BadRow
from dfactory.data.source import RecordSource
from dfactory.engine.expert_parallel import check_ranks
from dfactory.engine.memory import (
    MemoryForecast,
    ParameterCounts,
    Setup,
    count_adapters,
    count_parameters,
    forecast,
    setup_of,
)
from dfactory.engine.runfolder import RunFolder
from dfactory.engine.trainer import deepspeed_config
from dfactory.errors import ConfigError, DataError, DFactoryError
from dfactory.models.headers import weight_files
from dfactory.models.registry import (
    check_tensors,
    known_mask_id,
    read_config,
    read_tokenizer,
    resolve_model_dir,
    trained_block_size,
)
from dfactory.rl.prompts import PromptStream
from dfactory.rl.rewards.specs import load_reward, parse_rewards, required_columns

RANK_COUNTS = (1, 8, 16, 32, 64, 128)
MEASURED_ROWS = 64  # rows that are really built, to measure how full they are
LITERALS_SHOWN = 8
PLAIN_WIDTH = 120  # of the output where there is no terminal


def check(loaded: Loaded, gpus: int | None) -> int:
    """Print the dry run. Returns 0 if the recipe would start, else the exit status of the first error."""
    recipe = loaded.recipe
    if gpus is not None and gpus < 1:
        raise ConfigError(f"--gpus {gpus}: give the number of ranks, 1 or more")
    shared = recipe.expert_parallel_size
    ranks = tuple(n for n in RANK_COUNTS if n % shared == 0) or (shared,) if gpus is None else (gpus,)
    check_ranks(recipe, ranks[0])
    page = Page()
    model = page.section("model", _model, recipe)
    if model is not None:
        if recipe.init_weights == "pretrained":
            page.section("weights", _weights, model)
        special = page.section("tokens", _tokens, recipe, model)
        if recipe.stage == "rl":
            page.section("rollouts", _rollouts, recipe)
        inputs = page.section("data", _data, recipe) if special is not None else None
        if inputs is not None and inputs.train is not None:
            page.section("example", _example, recipe, inputs)
            page.section("rows and steps", _rows_and_steps, recipe, inputs, ranks)
        page.section("memory", _memory, recipe, model, ranks)
    page.section("output", _output, recipe, model)
    return page.verdict()


class Page:
    """Where sections print, and what they find wrong."""

    def __init__(self):
        self.console = Console(highlight=False)
        if not self.console.is_terminal:
            self.console.width = PLAIN_WIDTH
        self.problems: list[DFactoryError] = []
        self.warnings: list[str] = []

    def section(self, title: str, tell: Callable[..., Any], *arguments: Any) -> Any:
        """Run one section; None where it fails."""
        self.console.rule(Text(title, "bold"), align="left", style="dim")
        try:
            return tell(self, *arguments)
        except DFactoryError as problem:
            self.problem(problem)
            return None

    def problem(self, problem: DFactoryError) -> None:
        self.problems.append(problem)
        self.console.print(Text.assemble(("error: ", "bold red"), str(problem)), soft_wrap=True)

    def line(self, name: str, *parts: Any) -> None:
        """`name   text`, the texts of a section under each other."""
        grid = Table.grid(padding=(0, 2))
        grid.add_column(width=16, style="dim")
        grid.add_column(overflow="fold")
        grid.add_row(name, parts[0] if len(parts) == 1 else Group(*parts))
        self.console.print(grid)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def verdict(self) -> int:
        self.console.rule(style="dim")
        for warning in self.warnings:
            self.console.print(Text.assemble(("warning: ", "bold yellow"), warning), soft_wrap=True)
        if self.problems:
            count = f"{len(self.problems)} error{'s' * (len(self.problems) > 1)}"
            self.console.print(Text(f"{count}: training would not start", "bold red"))
            return self.problems[0].exit_status
        self.console.print(Text("training would start", "bold green"))
        return 0


# --- model and tokens -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Model:
    """What config.json tells."""

    path: Path
    config: PreTrainedConfig
    counts: ParameterCounts
    trained: int  # parameters: all of them, or the adapters'


def _model(page: Page, recipe: Recipe) -> Model:
    path = resolve_model_dir(recipe.model_name_or_path)
    config, counts = read_config(path), count_parameters(path)
    adapters = count_adapters(path, recipe.lora_r, tuple(recipe.lora_target_modules)) if recipe.use_peft else None
    model = Model(path, config, counts, counts.total if adapters is None else adapters)
    page.line("directory", f"{path}, model_type {config.model_type}")
    page.line(
        "parameters",
        f"{_count(counts.total)}, of which {_count(counts.active)} active for a token: experts {_count(counts.experts)}, "
        f"vocabulary {_count(counts.vocabulary)}, other {_count(counts.other)}",
    )
    lora = f" by LoRA, r {recipe.lora_r}, on {', '.join(recipe.lora_target_modules)}" if recipe.use_peft else ", all"
    page.line("trained", f"{_count(model.trained)}{lora}; {recipe.dtype}; {recipe.init_weights} weights")
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and recipe.max_length > limit:
        page.warn(f"max_length {recipe.max_length} is beyond the model's max_position_embeddings {limit}: lower it")
    recorded = trained_block_size(path)
    if recipe.init_weights == "pretrained" and config.model_type.startswith("llada2") and recorded != recipe.block_size:
        page.warn(f"block_size {recipe.block_size}, but the model was trained with {recorded}")
    return model


def _weights(page: Page, model: Model) -> None:
    files = weight_files(model.path)
    check_tensors(model.path, model.config)
    size = sum(file.stat().st_size for file in files)
    page.line(
        "files", f"{len(files)} with {_bytes(size)}; every tensor has the name and shape that config.json asks for"
    )
    left_out = model.config.to_dict().get("mtp_layers_left_out", 0)
    if left_out:
        page.warn(
            f"{left_out} multi-token-prediction layer(s) are neither read nor saved: they predict "
            "beyond the next token, which block diffusion does not"
        )


def _tokens(page: Page, recipe: Recipe, model: Model) -> SpecialIds:
    tokenizer = read_tokenizer(model.path)
    template = read_chat_template(recipe.chat_template_path)
    if tokenizer is None:
        page.line("tokenizer", "none in the directory: records have to come tokenised (input_ids, prompt_lengths)")
    else:
        page.line("tokenizer", f"{type(tokenizer).__name__}, {len(tokenizer)} tokens")
    vocab_size = model.config.vocab_size
    recorded = known_mask_id(model.path, None)
    mask_id = known_mask_id(model.path, recipe.mask_token_id)
    if recorded is not None and mask_id != recorded:
        page.warn(f"mask_token_id {mask_id}, but the model was trained with {recorded}: leave the key out")
    special = special_ids(tokenizer, mask_id, recipe.eos_token_id, vocab_size, template)
    page.line("mask, EOS", f"{_token(tokenizer, special.mask)}, {_token(tokenizer, special.eos)}")
    page.line("never decoded", _suppressed(tokenizer, special))
    if tokenizer is not None:
        _template(page, recipe, tokenizer, template, special)
    return special


def _token(tokenizer: PreTrainedTokenizerBase | None, index: int) -> str:
    literal = None if tokenizer is None else tokenizer.convert_ids_to_tokens(index)
    return f"{index} {literal}" if literal is not None else f"{index}"


def _suppressed(tokenizer: PreTrainedTokenizerBase | None, special: SpecialIds) -> str:
    if tokenizer is None:
        return _token(None, special.mask)
    named = [_token(tokenizer, index) for index in special.suppressed if tokenizer.convert_ids_to_tokens(index)]
    unnamed = len(special.suppressed) - len(named)
    more = [f"{len(named) - LITERALS_SHOWN} more special tokens"] if len(named) > LITERALS_SHOWN else []
    more += [f"{unnamed} ids that name no token"] if unnamed else []
    return ", ".join(named[:LITERALS_SHOWN] + more)


def _template(
    page: Page, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, own: str | None, special: SpecialIds
) -> None:
    text = own if own is not None else tokenizer.chat_template
    if not text:
        page.line("chat template", "none: records with messages or instruction need chat_template_path")
        return
    origin = recipe.chat_template_path or "the tokenizer's own"
    marked = bool(GENERATION_MARKER.search(str(text)))
    page.line("chat template", f"{origin}, {'with' if marked else 'without'} generation markers")
    if not marked:
        page.warn(
            "the chat template has no {% generation %} markers: assistant turns are found by rendering each conversation "
            "turn by turn; look at the example above"
        )
    try:
        ids_T, trainable_T = ChatEncoder(tokenizer, own, special).encode_messages(PROBE_TURN)
    except BadRow as bad:
        page.warn(f"the chat template refuses a conversation of one question and one answer: {bad}")
        return
    if ids_T[-1] == special.eos:
        page.line("ends an answer", "with EOS")
    else:
        last = _token(tokenizer, int(ids_T[trainable_T][-1]))
        page.line("ends an answer", f"with {last}; EOS is not in the template and is added behind the last turn")


# --- data -------------------------------------------------------------------------------------------------------------


def _data(page: Page, recipe: Recipe) -> Inputs:
    """The records. After a bad row has been told, the rest is read without it, so that all of them are counted."""
    try:
        inputs = read_inputs(recipe)
    except DataError as problem:
        if recipe.on_bad_row == "skip" and recipe.max_bad_fraction == 1:
            raise
        lenient = dataclasses.replace(recipe, on_bad_row="skip", max_bad_fraction=1.0)
        try:
            inputs = read_inputs(lenient)
        except DataError:
            raise problem from None
        page.problem(problem)
    if inputs.train is not None:
        _tell_documents(page, "training", inputs.train.report)
        _warn_of_lengths(page, recipe, inputs.train.report)
    if inputs.held_out is None:
        page.warn("eval_datasets is empty: nothing will tell whether the model learns or memorises")
    else:
        _tell_documents(page, "held out", inputs.held_out.report)
        if inputs.train is not None:
            _warn_of_leak(page, inputs)
    return inputs


def _rollouts(page: Page, recipe: Recipe) -> None:
    """Prompts, rewards and processes of reinforcement learning. The rewards are imported, as they would be."""
    prompts = PromptStream(recipe)
    longest = max(map(len, prompts.prompt_ids))
    page.line(
        "prompts", f"{len(prompts.rows):,}, the longest of {longest} tokens; {recipe.decode.max_new_tokens} new ones"
    )
    rewards = parse_rewards(
        recipe.reward_funcs, recipe.reward_weights, allow_code_execution=recipe.allow_code_execution
    )
    for reward in rewards:
        columns = required_columns(load_reward(reward))
        asks = f"asks for the columns {', '.join(columns)}" if columns else "asks for no column"
        page.line("reward", f"{reward.name}, weight {reward.weight:g}; {asks}")
        if missing := [name for name in columns if name not in prompts.rows[0].fields]:
            page.warn(f"reward {reward.name} asks for {missing}, but {prompts.rows[0].origin} has no such column")
    page.line(
        "a step",
        f"{recipe.prompts_per_step} prompts x {recipe.num_generations} rollouts = "
        f"{recipe.prompts_per_step * recipe.num_generations}, {recipe.num_iterations} optimiser step(s) on them",
        f"rollouts at most {recipe.max_staleness} policy version(s) old",
    )
    page.line(
        "processes",
        f"{recipe.num_learners} learner(s) and {recipe.num_rollout_workers} rollout actor(s) with the model, a GPU each; "
        f"{recipe.reward_workers} reward process(es)",
    )


def _tell_documents(page: Page, name: str, report: DataReport) -> None:
    trainable, fill = report.trainable_tokens / report.tokens, report.aligned_tokens - report.tokens
    page.line(
        name,
        f"{report.kept:,} documents of {', '.join(report.files)}"
        + f", {report.further_parts:,} of them go on with a split text" * (report.further_parts > 0),
        f"{report.tokens:,} tokens, {trainable:.1%} trainable; {fill:,} more of EOS fill; longest {report.longest:,}, "
        f"mean {report.tokens / report.kept:,.0f}; {report.truncated / report.kept:.1%} cut at max_length",
    )
    if report.left_out:
        page.line("  left out", f"{report.left_out:,} traces whose response is not correct (trace_filter)")
    for fault, refused in sorted(report.refused.items(), key=lambda item: -item[1].count):
        page.line("  refused", f"{refused.count:,}: {fault}; first {refused.first[0]}")


def _warn_of_leak(page: Page, inputs: Inputs) -> None:
    def contents(examples: Examples) -> set[int]:
        return {hash(examples[index].input_ids_T.tobytes()) for index in range(len(examples))}

    shared = len(contents(inputs.train) & contents(inputs.held_out))
    if shared:
        page.warn(
            f"{shared:,} held-out documents are also training documents: the held-out loss will flatter the model"
        )


def _warn_of_lengths(page: Page, recipe: Recipe, report: DataReport) -> None:
    need = math.ceil(report.longest / recipe.block_size) * recipe.block_size
    if recipe.max_length >= 2 * need:
        page.warn(
            f"max_length {recipe.max_length} is {recipe.max_length / need:.1f} times the longest document; "
            f"max_length={need} is enough"
        )
    if report.truncated > 0.05 * report.kept:
        page.warn(
            f"{report.truncated / report.kept:.0%} of the documents are cut, their ends are not learnt: raise max_length"
        )
    if report.trainable_tokens < 0.05 * report.tokens:
        page.warn(
            f"only {report.trainable_tokens / report.tokens:.1%} of the tokens are trained: is the rest really prompt?"
        )


def _example(page: Page, recipe: Recipe, inputs: Inputs) -> None:
    """The first document of a readable length, or both sides of its pair, with a first training view."""
    length_E, size = inputs.train.length_E, inputs.train.unit_size
    index = int((length_E <= preview.SHOWN_TOKENS).argmax()) // size * size  # the very first if all are longer
    page.line("legend", preview.legend())
    for name, member in zip(SIDES if size == 2 else ("document",), range(index, index + size), strict=True):
        _show_example(page, recipe, inputs, name, member)


def _show_example(page: Page, recipe: Recipe, inputs: Inputs, name: str, index: int) -> None:
    example = inputs.train[index]
    decode = preview.decoder_of(inputs.vocabulary.tokenizer)
    document = align(example, recipe.block_size, inputs.special.eos)
    ids_T, trainable_T = document.input_ids_T, document.trainable_T
    views = make_source(recipe, inputs, rank=0, world_size=1).make_views(document, 0)
    page.line(name, preview.document_text(example, ids_T, trainable_T, decode))
    view_text = preview.view_text(views[0], document, len(example), inputs.special.mask, decode)
    page.line(f"view 1 of {len(views)}", view_text)
    block_t = ", ".join(f"{t:.2f}" for t in views[0].t_P[:: recipe.block_size][:LITERALS_SHOWN])
    page.line("its mask ratio", f"t {block_t}, by block; {int(views[0].target_P.sum())} targets; from {example.origin}")


# --- rows, steps, memory ----------------------------------------------------------------------------------------------


def _rows_and_steps(page: Page, recipe: Recipe, inputs: Inputs, ranks: tuple[int, ...]) -> None:
    phases = [_measure_phase(recipe, inputs, first, size) for first, size in recipe.block_phases]
    source, last = make_source(recipe, inputs, rank=0, world_size=1), phases[-1]
    page.line(
        "row",
        f"{source.row_length:,} positions: documents with {recipe.views_per_document} view(s) each, "
        f"{'packed' if recipe.packing else 'one a row, not packed'}",
        f"the first {last.rows} are {last.fill:.0%} full and hold {last.documents:.1f} documents and {last.targets:,.0f} "
        "targets each",
    )
    if len(phases) > 1:
        page.line("block sizes", _right_aligned(Phase.COLUMNS, (phase.cells for phase in phases)))
    if recipe.packing and min(phase.fill for phase in phases) < 0.7:
        page.warn(f"rows are only {min(phase.fill for phase in phases):.0%} full: choose another row_length")
    steps_of = _steps(recipe, inputs, ranks)
    cells = []
    for count, steps in steps_of.items():
        rows = count * source.rows_per_window
        numbers = (count, rows, rows * last.tokens, math.ceil(last.epoch_rows / rows), steps)
        epochs = recipe.num_train_epochs if recipe.max_steps is None else _epochs(phases, steps, rows)
        cells.append((*(f"{number:,.0f}" for number in numbers), f"{epochs:.2f}"))
    columns = ("ranks", "rows a step", "tokens a step", "steps an epoch", "steps", "epochs")
    page.line("steps", _right_aligned(columns, cells))
    rule = "ranks x per_device_train_batch_size x gradient_accumulation_steps"
    where = f", of block size {last.block_size}" if len(phases) > 1 else ""
    page.line("", f"rows a step = {rule} = ranks x {source.rows_per_window}; tokens are those of all streams{where}")
    _schedule(page, recipe, steps_of[ranks[0]])


@dataclasses.dataclass(frozen=True)
class Phase:
    """A block size of the run, and what it makes of the data."""

    COLUMNS: ClassVar = ("from step", "block size", "row full", "tokens a row", "targets a row", "rows an epoch")

    first: int
    block_size: int
    epoch_rows: int
    rows: int  # that were measured
    fill: float  # share of their positions that hold a token
    tokens: float  # a row
    targets: float
    documents: float

    @property
    def cells(self) -> tuple[str, ...]:
        numbers = (self.tokens, self.targets, self.epoch_rows)
        return f"{self.first:,}", f"{self.block_size:,}", f"{self.fill:.0%}", *(f"{number:,.0f}" for number in numbers)


def _measure_phase(recipe: Recipe, inputs: Inputs, first: int, block_size: int) -> Phase:
    """The phase alone, as if the run began with it."""
    alone = dataclasses.replace(recipe, block_size_schedule=[[0, block_size]])
    source = make_source(alone, inputs, rank=0, world_size=1)
    return Phase(first, block_size, _rows_of(alone, inputs, 1.0), *_measure_rows(source))


def _steps(recipe: Recipe, inputs: Inputs, ranks: tuple[int, ...]) -> dict[int, int]:
    """Steps of the run by number of ranks. Without a schedule rows do not depend on it, so one packing tells all."""
    if recipe.max_steps is not None:
        return dict.fromkeys(ranks, recipe.max_steps)
    if recipe.block_size_schedule is not None:
        return {count: make_source(recipe, inputs, rank=0, world_size=count).num_windows for count in ranks}
    rows = _rows_of(recipe, inputs, recipe.num_train_epochs)
    a_step = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps
    return {count: math.ceil(rows / (count * a_step)) for count in ranks}


def _epochs(phases: list[Phase], steps: int, rows_a_step: int) -> float:
    """Passes over the data in so many steps."""
    ends = [min(phase.first, steps) for phase in phases[1:]] + [steps]
    in_phase = [end - min(phase.first, steps) for phase, end in zip(phases, ends, strict=True)]
    return sum(count * rows_a_step / phase.epoch_rows for phase, count in zip(phases, in_phase, strict=True))


def _right_aligned(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    table = Table(*columns, box=None, padding=(0, 2))
    for column in table.columns:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    return table


def _measure_rows(source: RecordSource) -> tuple[int, float, float, float, float]:
    """(how many rows, share of positions that hold a token, tokens a row, targets a row, documents a row) at the start."""
    rows = positions = tokens = targets = documents = 0
    while rows < MEASURED_ROWS and (window := source.next_window()) is not None:
        for batch in window:
            filled = int((batch.document_RS >= 0).any(dim=1).sum())  # the last window has empty rows
            rows, positions = rows + filled, positions + filled * batch.document_RS.shape[1]
            tokens, targets = tokens + batch.num_tokens, targets + batch.num_targets
            documents += len(batch.document_id_D)
    return rows, tokens / positions, tokens / rows, targets / rows, documents / rows


def _rows_of(recipe: Recipe, inputs: Inputs, epochs: float) -> int:
    one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    single = dataclasses.replace(recipe, max_steps=None, num_train_epochs=epochs or 1.0, **one)
    return make_source(single, inputs, rank=0, world_size=1).num_windows


def _schedule(page: Page, recipe: Recipe, steps: int) -> None:
    rate = recipe.learning_rate
    page.line(
        "learning rate",
        f"0 to {rate:g} in {recipe.warmup_steps} steps, then {recipe.lr_scheduler_type}"
        + ("" if recipe.lr_scheduler_type == "constant" else f" to {recipe.lr_min:g}"),
    )
    if recipe.mask_embedding_noise:
        std, last = recipe.mask_embedding_noise, recipe.mask_embedding_noise_steps
        page.line(
            "noise on masks", f"in their embeddings, of standard deviation {std:g} at step 0 and 0 from step {last} on"
        )
    if recipe.warmup_steps >= steps:
        page.warn(
            f"warmup_steps {recipe.warmup_steps}, but the run has {steps}: the learning rate never reaches its peak"
        )
    fresh = recipe.init_weights == "random"
    low, high = (1e-5, 2e-3) if recipe.use_peft else (1e-5, 1e-2) if fresh else (1e-7, 1e-4)
    kind = "LoRA" if recipe.use_peft else "random weights" if fresh else "fine-tuning all weights"
    if not low <= rate <= high:
        page.warn(f"learning_rate {rate:g} is unusual for {kind}: {low:g} to {high:g} is common")
    for name in ("save_steps", "eval_steps"):
        if (every := getattr(recipe, name)) is not None and every > steps:
            page.warn(f"{name} {every} is more than the {steps} steps of the run: it will happen at the last step only")


def _memory(page: Page, recipe: Recipe, model: Model, ranks: tuple[int, ...]) -> None:
    deepspeed = deepspeed_config(recipe)
    own = setup_of(recipe, deepspeed, ranks[0]).zero_stage
    table = Table("ranks", box=None, padding=(0, 1))
    for stage in range(4):
        mine = {"header": f"> ZeRO {stage} <", "style": "bold"} if stage == own else {"header": f"ZeRO {stage}"}
        table.add_column(**mine, no_wrap=True)
    for column in table.columns:
        column.justify = "right"
    forecasts = {}
    for count in ranks:
        setup = setup_of(recipe, deepspeed, count)
        forecasts[count] = [forecast(model.path, _at_stage(setup, stage)) for stage in range(4)]
        table.add_row(f"{count}", *map(_peak, forecasts[count]))
    page.line("GPU of a rank", table)
    page.line("", "> the recipe's <; forecast, not measured; leave 10% for the CUDA context, NCCL and fragments")
    shown = next((n for n in ranks if forecasts[n][own].device_bytes < 72e9), ranks[-1])
    page.line(f"on {shown} rank(s)", _breakdown(forecasts[shown][own]), _letters(recipe, model, shown))


def _at_stage(setup: Setup, stage: int) -> Setup:
    """The same with another ZeRO stage; offload needs sharding."""
    return dataclasses.replace(
        setup,
        zero_stage=stage,
        offload_optimizer=setup.offload_optimizer and stage >= 1,
        offload_param=setup.offload_param and stage == 3,
    )


def _peak(memory: MemoryForecast) -> str:
    host = f" (host {_bytes(memory.host_bytes)})" if memory.host_bytes else ""
    return _bytes(memory.device_bytes) + host


def _breakdown(memory: MemoryForecast) -> Table:
    table = Table.grid(padding=(0, 2))
    for line in memory.lines:
        table.add_row(line.name, Text(_bytes(line.bytes), justify="right"), line.formula, Text(f"{line.phase}", "dim"))
    return table


def _letters(recipe: Recipe, model: Model, ranks: int) -> str:
    """What the letters of the formulas stand for here."""
    sizes, setup = model.config, setup_of(recipe, deepspeed_config(recipe), ranks)
    head = sizes.head_dim or sizes.hidden_size // sizes.num_attention_heads
    letters = {
        "P parameters": model.counts.total + (model.trained if recipe.use_peft else 0),
        "T trained": model.trained,
        "n ranks": ranks,
        "L layers": sizes.num_hidden_layers,
        "t positions": setup.rows * setup.row_length,
        "H hidden": sizes.hidden_size,
        "A query heads": head * sizes.num_attention_heads,
        "C key heads": head * sizes.num_key_value_heads,
        "V vocabulary": sizes.vocab_size,
    }
    if setup.expert_parallel_size > 1:
        letters |= {"X routed experts": model.counts.experts, "m sharing a layer": setup.expert_parallel_size}
    if model.counts.experts:
        letters |= {
            "I expert": sizes.moe_intermediate_size,
            "k chosen": sizes.num_experts_per_tok,
            "E experts": sizes.num_local_experts,
        }
    else:
        letters["D feed-forward"] = sizes.intermediate_size
    return ", ".join(f"{name} {value:,}" for name, value in letters.items())


# --- output -----------------------------------------------------------------------------------------------------------


def _output(page: Page, recipe: Recipe, model: Model | None) -> None:
    folder = RunFolder(recipe.output_dir)
    parent = next(path for path in (folder.path, *folder.path.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"output_dir {folder.path}: {parent} is not a directory that can be written: choose another")
    page.line("output_dir", f"{folder.path}/: config.yaml, metrics.jsonl, LATEST, checkpoint-N/")
    resumed = folder.find_resume(recipe.resume_from_checkpoint, recipe.overwrite_output_dir)
    whole = folder.checkpoints()
    if resumed is not None:
        page.line("resumes", str(resumed))
    elif whole:
        page.warn(
            f"{folder.path} holds {len(whole)} checkpoint(s) up to {whole[-1].name}, and overwrite_output_dir is true: "
            "they will be removed"
        )
    often = f"every {recipe.save_steps} steps and at the end" if recipe.save_steps else "at the end"
    kept = "all are kept" if recipe.save_total_limit is None else f"the newest {recipe.save_total_limit} are kept"
    page.line("checkpoints", f"{often}; {kept}")
    if model is not None:
        _checkpoint_size(page, recipe, model, parent)


def _checkpoint_size(page: Page, recipe: Recipe, model: Model, parent: Path) -> None:
    """Trained weights twice, once for readers and once for the engine, and the optimiser's state."""
    lines = forecast(model.path, setup_of(recipe, deepspeed_config(recipe), 1)).lines
    optimiser = next(line.bytes for line in lines if line.name == "optimiser")
    weights = model.trained * {"bfloat16": 2, "float32": 4}[recipe.dtype]
    total, free = 2 * weights + optimiser, shutil.disk_usage(parent).free
    page.line("size of one", f"about {_bytes(total)}, {_bytes(weights)} of it weights; {_bytes(free)} are free there")
    if free < total:
        page.warn(f"a checkpoint takes about {_bytes(total)}, but {parent} has {_bytes(free)} left")


def _bytes(count: float) -> str:
    unit, size = ("GB", 1e9) if count >= 1e9 else ("MB", 1e6)
    return f"{count / size:,.{0 if count >= 100 * size else 1}f} {unit}"


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:,.2f}{unit}"
    return str(number)
