"""The numbers of a stage that matter, from its first steps or evaluation to its last; and which curves show them.

What matters depends on what the stage learns from: records, pairs, or its own answers to prompts.
"""

import math
from typing import NamedTuple

import yaml

from dfactory.algorithms.base import Data, choices_of
from dfactory.commands.reporting.runs import Run

EDGE_SHARE = 10  # of training metrics the mean over the first and the last 1/10 of the steps


class Metric(NamedTuple):
    title: str
    name: str  # in metrics.jsonl; eval/... is one value an evaluation
    percent: bool = False


TOKENS_PER_FORWARD = Metric("tokens per forward", "eval/tokens_per_forward")
EXACT_MATCH = Metric("exact match", "eval/exact_match", percent=True)
MAIN: dict[Data, tuple[Metric, ...]] = {
    Data.RECORDS: (Metric("held-out loss", "eval/loss"), EXACT_MATCH, TOKENS_PER_FORWARD),
    Data.PAIRS: (
        Metric("held-out chosen above rejected", "eval/rewards/accuracies", percent=True),
        EXACT_MATCH,
        TOKENS_PER_FORWARD,
    ),
    Data.PROMPTS: (Metric("reward", "reward"), EXACT_MATCH, TOKENS_PER_FORWARD),
}
CURVES: dict[Data, tuple[str, ...]] = {  # names of figures.FIGURES
    Data.RECORDS: ("loss", "hit_rate", "confidence", "decoding"),
    Data.PAIRS: ("preferences", "loss", "decoding"),
    Data.PROMPTS: ("rewards", "decoding"),
}
HOW_IT_RAN = ("optimiser", "rollouts", "phases", "speed")


def data_of(run: Run) -> Data:
    """What a run learns from; of a stage that is not known here, records."""
    algorithm = choices_of("stage").get(run.stage)
    return algorithm.data if algorithm is not None else Data.RECORDS


def changes(run: Run) -> dict[str, tuple[str, str]]:
    """Title -> (first, last) as text, of the main numbers that the run has; of a single one the first is empty."""
    found = {}
    for metric in MAIN[data_of(run)]:
        values = run.curve(metric.name)[1]
        if len(values):
            edge = 1 if metric.name.startswith("eval/") else math.ceil(len(values) / EDGE_SHARE)
            first, last = (_shown(metric, part.mean()) for part in (values[:edge], values[-edge:]))
            found[metric.title] = (first if len(values) > 1 else "", last)
    return found


def _shown(metric: Metric, value: float) -> str:
    return f"{value:.1%}" if metric.percent else f"{value:.3f}"


def keys_of(run: Run) -> dict:
    keys = yaml.safe_load(run.config)
    return keys if isinstance(keys, dict) else {}
