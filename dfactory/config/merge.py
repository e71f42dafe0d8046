"""Keys of `dfactory export --merge`: which checkpoints of a run are averaged."""

from dataclasses import dataclass
from typing import Optional

from dfactory.config.keys import REQUIRED, key


def small_is_good(metric: str) -> bool:
    """What its name says."""
    return any(word in metric.lower() for word in ("loss", "nll", "perplexity"))


@dataclass
class MergeKeys:
    topk: int = key(REQUIRED, "average so many checkpoints of the run, the best by `metric`", low=1)
    metric: str = key("eval/loss", "a name of metrics.jsonl that has a value at the steps of the checkpoints")
    mode: Optional[str] = key(
        None,
        "whether a small or a large value is good; null: min for a loss, nll or perplexity, else max",
        choices=("min", "max"),
    )

    @property
    def smaller_is_better(self) -> bool:
        return small_is_good(self.metric) if self.mode is None else self.mode == "min"
