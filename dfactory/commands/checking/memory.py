"""Section `memory`: the forecast for a rank, by number of ranks and ZeRO stage, with its formulas."""

from dataclasses import replace

from rich.table import Table
from rich.text import Text

from dfactory.commands.checking.model import Model
from dfactory.commands.checking.page import Page, in_bytes
from dfactory.engine.trainer import deepspeed_config
from dfactory.planning.fit import FITS, at_stage, remedy_of
from dfactory.planning.memory import MemoryForecast, Setup, expert_sizes, forecast, head_size, key_heads, setup_of
from dfactory.recipe import Recipe


def tell_memory(
    page: Page, recipe: Recipe, model: Model, ranks: tuple[int, ...], most_targets: int | None = None
) -> None:
    """`most_targets`: of a micro-batch, as measured; None: every position may be one."""
    deepspeed = deepspeed_config(recipe)
    setups = {n: replace(setup_of(recipe, deepspeed, n, model.new_rows), targets=most_targets) for n in ranks}
    own = setups[ranks[0]].zero_stage
    table = Table("ranks", box=None, padding=(0, 1))
    for stage in range(4):
        mine = {"header": f"> ZeRO {stage} <", "style": "bold"} if stage == own else {"header": f"ZeRO {stage}"}
        table.add_column(**mine, no_wrap=True)
    for column in table.columns:
        column.justify = "right"
    forecasts = {}
    for count in ranks:
        forecasts[count] = [forecast(model.path, at_stage(setups[count], stage)) for stage in range(4)]
        table.add_row(f"{count}", *map(_peak, forecasts[count]))
    page.line("GPU of a rank", table)
    page.line("", "> the recipe's <; forecast, not measured; leave 10% for the CUDA context, NCCL and fragments")
    shown = next((n for n in ranks if forecasts[n][own].device_bytes < FITS), ranks[-1])
    if forecasts[shown][own].device_bytes >= FITS:
        _warn_of_size(page, recipe, model, setups[shown])
    page.line(f"on {shown} rank(s)", _breakdown(forecasts[shown][own]), _letters(recipe, model, setups[shown]))


def _warn_of_size(page: Page, recipe: Recipe, model: Model, setup: Setup) -> None:
    """That it does not fit, and the first change that would make it."""
    found = remedy_of(model.path, recipe, setup)
    remedy = "more ranks, or shorter rows" if found is None else f"{found[0]} takes {_peak(found[1])}"
    page.warn(f"the forecast for {setup.world_size} rank(s) is more than a GPU of 80 GB holds: {remedy}")


def _peak(memory: MemoryForecast) -> str:
    host = f" (host {in_bytes(memory.host_bytes)})" if memory.host_bytes else ""
    return in_bytes(memory.device_bytes) + host


def _breakdown(memory: MemoryForecast) -> Table:
    table = Table.grid(padding=(0, 2))
    for line in memory.lines:
        table.add_row(
            line.name, Text(in_bytes(line.bytes), justify="right"), line.formula, Text(f"{line.phase}", "dim")
        )
    return table


def _letters(recipe: Recipe, model: Model, setup: Setup) -> str:
    """What the letters of the formulas stand for here."""
    sizes = model.config
    head = head_size(sizes)
    letters = {
        "P parameters": model.counts.total + (model.trained if recipe.use_peft else 0),
        "T trained": model.trained,
        "n ranks": setup.world_size,
        "L layers": sizes.num_hidden_layers,
        "t positions": setup.rows * setup.row_length,
        "H hidden": sizes.hidden_size,
        "A query heads": head * sizes.num_attention_heads,
        "C key heads": head * key_heads(sizes),
        "V vocabulary": sizes.vocab_size,
    }
    if setup.expert_parallel_size > 1:
        letters |= {"X routed experts": model.counts.experts, "m sharing a layer": setup.expert_parallel_size}
    if model.counts.experts:
        experts = expert_sizes(sizes)
        letters |= {"I expert": experts.inner, "k chosen": experts.chosen, "E experts": experts.experts}
    else:
        letters["D feed-forward"] = sizes.intermediate_size
    return ", ".join(f"{name} {value:,}" for name, value in letters.items())
