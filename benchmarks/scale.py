"""Step time, memory and network of LLaDA2 mini and flash on 8 to 512 GPUs: a model on paper, nothing of it measured.

    python -m benchmarks.scale    # the tables of benchmarks/SCALE.md; seconds, no GPU, no weights

For each model and number of GPUs all setups are tried that dFactory's recipes can name (ZeRO stage, expert parallelism,
micro-batch, checkpointing, offload), those whose memory forecast does not fit are left out, and the fastest is
recommended; a simpler one that is at most 3 percent slower is preferred. Assumptions: `Machine` and `Row` of
dfactory/planning/costs.py. Memory: dfactory/planning/memory.py.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from dfactory.commands.checking.memory import FITS
from dfactory.engine.trainer import deepspeed_config
from dfactory.models.hub import resolve
from dfactory.models.registry import read_config
from dfactory.planning.costs import Costs, Machine, Row, Step
from dfactory.planning.memory import MemoryForecast, Setup, count_parameters, forecast_sizes, setup_of
from dfactory.recipe import load_recipe

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
MODELS = ("mini", "flash")
SIZES = (8, 16, 32, 64, 128, 256, 512)  # GPUs
COMPARED = {"mini": (8, 64), "flash": (32, 128)}  # GPUs for which other kinds of setup are shown
KINDS = 8  # of these
VARIED = 64  # GPUs for which assumptions are changed
VARIANTS = {
    "as assumed": {},
    "InfiniBand of 100 Gb/s a GPU": {"infiniband": 12.5e9},
    "nothing of ZeRO's traffic hidden": {"overlap": 0.0},
    "experts at 0.2 of the peak": {"expert_share": 0.2},
    "HBM at 0.4 of its rate": {"hbm_share": 0.4},
    "10 ms of launches a layer and pass": {"launch": 1e-2},
}
STAGES, EXPERT_GROUPS, MICRO_BATCHES = (1, 2, 3), (1, 8, 32), (1, 2, 4, 8)
ROWS_A_STEP = (128, 1024)  # at least, over all GPUs and micro-batches; at most
SIMPLER = 1.03  # times the fastest step's seconds a row that a simpler setup may take
HOST_LEFT = 0.9  # of host memory


class Model(NamedTuple):
    name: str
    costs: Costs  # of the recipe as it is shipped

    @classmethod
    def named(cls, name: str) -> "Model":
        recipe = load_recipe(RECIPES / f"llada2_{name}" / "sft.yaml")
        directory = resolve(recipe.model_name_or_path, recipe.model_revision, weights=False)
        setup = setup_of(recipe, deepspeed_config(recipe), {"mini": 8, "flash": 32}[name])  # its header's
        row = Row(length=setup.row_length, block=recipe.block_size, views=recipe.views_per_document)
        counts, config = count_parameters(directory), read_config(directory)
        return cls(name, Costs(config, counts, setup, row, recipe.gradient_accumulation_steps))


@dataclasses.dataclass(frozen=True)
class Plan:
    """A setup with its forecast and its step."""

    costs: Costs
    memory: MemoryForecast
    step: Step

    @classmethod
    def of(cls, costs: Costs) -> "Plan":
        return cls(costs, forecast_sizes(costs.config, costs.counts, costs.setup), costs.step())

    @property
    def setup(self) -> Setup:
        return self.costs.setup

    @property
    def fits(self) -> bool:
        machine = self.costs.machine
        host = self.memory.host_bytes * min(machine.gpus, self.setup.world_size)
        return self.memory.device_bytes < FITS and host < HOST_LEFT * machine.host_memory

    @property
    def rows_a_step(self) -> int:
        return self.setup.world_size * self.setup.rows * self.costs.accumulation

    @property
    def tokens_a_second(self) -> float:
        """Of documents: clean tokens, once each."""
        row = self.costs.row
        return self.rows_a_step * row.documents * row.document / self.step.seconds

    @property
    def complexity(self) -> tuple:
        """What a user has to understand and to trust, least first."""
        setup = self.setup
        return (setup.offload_optimizer, setup.expert_parallel_size, setup.zero_stage, setup.rows)

    @property
    def kind(self) -> tuple[int, int, bool]:
        """What is compared: micro-batch and checkpointing are chosen for each."""
        return self.setup.zero_stage, self.setup.expert_parallel_size, self.setup.offload_optimizer


def plans(costs: Costs, gpus: int) -> Iterator[Plan]:
    """All setups that fit; the rest is as in `costs`."""
    low, high = ROWS_A_STEP
    groups = [m for m in EXPERT_GROUPS if m <= gpus]
    for stage, m, rows, checkpointing, offload in itertools.product(
        STAGES, groups, MICRO_BATCHES, (True, False), (False, True)
    ):
        accumulation = max(1, low // (gpus * rows))
        if gpus * rows * accumulation > high:
            continue
        setup = dataclasses.replace(
            costs.setup,
            world_size=gpus,
            zero_stage=stage,
            expert_parallel_size=m,
            rows=rows,
            gradient_checkpointing=checkpointing,
            offload_optimizer=offload,
        )
        plan = Plan.of(dataclasses.replace(costs, setup=setup, accumulation=accumulation))
        if plan.fits:
            yield plan


def recommend(found: Iterable[Plan]) -> Plan | None:
    """The simplest of those that are hardly slower than the fastest. None where nothing fits."""
    found = list(found)
    if not found:
        return None
    best = max(plan.tokens_a_second for plan in found)
    return min((plan for plan in found if plan.tokens_a_second * SIMPLER >= best), key=lambda plan: plan.complexity)


def words(plan: Plan) -> str:
    """The overrides to add to the command, relative to the shipped recipe."""
    setup = plan.setup
    file = "zero3_offload" if setup.offload_optimizer and setup.zero_stage == 3 else f"zero{setup.zero_stage}"
    keys = {
        "deepspeed": f"recipes/deepspeed/{file}.json",
        "expert_parallel_size": setup.expert_parallel_size,
        "per_device_train_batch_size": setup.rows,
        "row_length": setup.row_length,
        "gradient_checkpointing": str(setup.gradient_checkpointing).lower(),
        "gradient_accumulation_steps": plan.costs.accumulation,
    }
    if setup.offload_optimizer and setup.zero_stage < 3:
        keys["deepspeed_overrides.zero_optimization.offload_optimizer.device"] = "cpu"
    return " ".join(f"{name}={value}" for name, value in keys.items())


def table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *([str(cell) for cell in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def assumption_tables(row: Row) -> list[str]:
    machine = Machine()
    values = [
        (f"`{f.name}`", f"{getattr(machine, f.name):g}", f.metadata["unit"], f.metadata["source"])
        for f in dataclasses.fields(machine)
    ]
    workload = [
        ("row", f"{row.length:,} positions; {row.documents} documents take {row.positions:,} of them"),
        ("document", f"{row.document:,} tokens, {row.prompt} of them prompt, {row.views} views, blocks of {row.block}"),
        ("targets of a row", f"{row.targets:,}: each response token once"),
        ("visible pairs of a row", f"{row.pairs:,}"),
        ("rows of a step", f"{ROWS_A_STEP[0]} to {ROWS_A_STEP[1]:,}, over all GPUs and micro-batches"),
    ]
    return [*table(("rate", "value", "unit", "where from"), values), *table(("workload", "assumed"), workload)]


def flops_table(models: Iterable[Model]) -> list[str]:
    parts: dict[str, list[str]] = {}
    for model in models:
        setup = dataclasses.replace(model.costs.setup, rows=1, gradient_checkpointing=True)
        flops = dataclasses.replace(model.costs, setup=setup).flops()
        total = sum(flops.values())
        for part, work in (flops | {"all": total}).items():
            parts.setdefault(part, []).append(f"{work / 1e12:.1f} ({work / total:.0%})")
    return table(("part", *MODELS), ([part, *cells] for part, cells in parts.items()))


def setup_cells(plan: Plan) -> list[str]:
    setup = plan.setup
    yes_no = {True: "yes", False: "no"}
    return [
        f"{setup.zero_stage}",
        f"{setup.expert_parallel_size}",
        f"{setup.rows} x {setup.row_length:,} x {plan.costs.accumulation}",
        yes_no[setup.gradient_checkpointing],
        yes_no[setup.offload_optimizer],
    ]


def result_cells(plan: Plan) -> list[str]:
    machine, step = plan.costs.machine, plan.step
    host = plan.memory.host_bytes * min(machine.gpus, plan.setup.world_size)
    return [
        f"{plan.memory.device_bytes / 1e9:.0f}",
        f"{host / 1e9:.0f}",
        f"{step.seconds:.2f}",
        *(f"{seconds:.2f}" for seconds in (step.compute, step.hbm, step.launch)),
        f"{step.zero:.2f} of {plan.costs.zero_seconds()[1]:.2f}",
        *(f"{seconds:.2f}" for seconds in (step.all_to_all, step.host)),
        step.bottleneck,
        f"{plan.tokens_a_second / 1e3:,.0f}",
    ]


SETUP_COLUMNS = ("ZeRO", "EP", "rows x length x accumulation", "checkpointing", "offload")
RESULT_COLUMNS = (
    *("GB a GPU", "GB host", "s a step", "compute", "HBM", "launch", "ZeRO", "all-to-all", "host"),
    *("bottleneck", "k tokens/s"),
)


def plan_table(first: str, plans_by_name: Iterable[tuple[object, Plan | None]]) -> list[str]:
    columns = (first, *SETUP_COLUMNS, *RESULT_COLUMNS)
    rows = [
        [name, *setup_cells(plan), *result_cells(plan)] if plan else [name, "nothing fits", *[""] * (len(columns) - 2)]
        for name, plan in plans_by_name
    ]
    return table(columns, rows)


def best_of_each_kind(found: Iterable[Plan]) -> list[Plan]:
    kinds: dict[tuple, list[Plan]] = {}
    for plan in found:
        kinds.setdefault(plan.kind, []).append(plan)
    best = [recommend(group) for group in kinds.values()]
    return sorted(best, key=lambda plan: -plan.tokens_a_second)[:KINDS]


def model_tables(model: Model) -> list[str]:
    found = {gpus: list(plans(model.costs, gpus)) for gpus in SIZES}
    advised = {gpus: recommend(setups) for gpus, setups in found.items()}
    shipped = Plan.of(model.costs)
    lines = [f"## LLaDA2 {model.name}", "", "Recommended by the model, on paper:", ""]
    lines += plan_table("GPUs", advised.items())
    lines += [f"The same as overrides of `recipes/llada2_{model.name}/sft.yaml`:", ""]
    lines += table(("GPUs", "key=value"), [(n, f"`{words(plan)}`") for n, plan in advised.items() if plan])
    lines += ["The recipe as it is shipped:", "", *plan_table("GPUs", [(shipped.setup.world_size, shipped)])]
    for gpus in COMPARED[model.name]:
        lines += [f"The {KINDS} fastest kinds of setup on {gpus} GPUs, of those that fit:", ""]
        lines += plan_table("GPUs", ((gpus, plan) for plan in best_of_each_kind(found[gpus])))
    lines += [f"What is recommended on {VARIED} GPUs if an assumption is wrong:", ""]
    varied = {
        name: dataclasses.replace(model.costs, machine=dataclasses.replace(Machine(), **change))
        for name, change in VARIANTS.items()
    }
    return lines + plan_table("if", ((name, recommend(plans(costs, VARIED))) for name, costs in varied.items()))


def report() -> list[str]:
    """All tables as Markdown."""
    models = [Model.named(name) for name in MODELS]
    lines = ["## Assumptions", "", *assumption_tables(models[0].costs.row)]
    lines += ["## Operations of a row", "", "TFLOP of forward and backward with checkpointing, by part:", ""]
    lines += flops_table(models)
    for model in models:
        lines += model_tables(model)
    return lines[:-1]


def main(arguments: list[str] | None = None) -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(arguments)
    print(*report(), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
