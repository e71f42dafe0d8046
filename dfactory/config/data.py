"""Recipe keys: which records, and how they become rows."""

from dataclasses import dataclass
from typing import Optional

from dfactory.config.keys import REQUIRED, key


@dataclass
class DatasetKeys:
    path: str = key(REQUIRED, ".jsonl, .jsonl.gz or .parquet file (relative to the recipe)")
    weight: float = key(1.0, "how often an epoch sees each record; fractions are drawn anew each epoch", low=0.0)


@dataclass
class DataKeys:
    datasets: list[DatasetKeys] = key([], "training files with their weights")
    eval_datasets: list[DatasetKeys] = key([], "held-out files for the evaluation loss")
    max_length: int = key(2048, "longest document in tokens, EOS fill included; a multiple of block_size", low=1)
    row_length: Optional[int] = key(
        None, "positions of a packed row, clean stream and views; null: room for one document of max_length"
    )
    packing: bool = key(True, "put several documents into a row; attention never crosses them")
    streaming: bool = key(
        False,
        "tokenise .jsonl records while training goes on, not before: start-up and memory stay small however large the "
        "files; needs max_steps",
    )
    overlong: str = key(
        "refuse",
        "a document longer than max_length is refused (counted), cut (it gets no EOS), or split: a text without a prompt "
        "goes on in further documents",
        choices=("refuse", "truncate", "split"),
    )
    on_bad_row: str = key("error", "an unusable record stops the run, or is counted", choices=("error", "skip"))
    max_bad_fraction: float = key(0.01, "with on_bad_row: skip, the largest share of bad rows", low=0.0, high=1.0)
    chat_template_path: Optional[str] = key(None, "Jinja file used instead of the tokenizer's own chat template")
