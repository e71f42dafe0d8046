"""Recipe keys: which records, and how they are packed."""

from dataclasses import dataclass
from typing import Optional

from dfactory.config.keys import key
from dfactory.config.words import RECORD_FILES


@dataclass
class DatasetKeys:
    path: Optional[str] = key(None, f"{RECORD_FILES} file (relative to the recipe); or give name")
    weight: float = key(
        1.0, "how often an epoch sees each record; a fraction draws other records in each epoch", low=0.0
    )
    name: Optional[str] = key(None, "dataset on the hub, `org/name`, instead of a path")
    split: str = key("train", "with name: the split, as the datasets library writes it: train, train[:1000], ...")
    config: Optional[str] = key(None, "with name: which configuration (subset) of the dataset; null: its default")
    revision: Optional[str] = key(None, "with name: branch, tag or commit; null: the newest version, which may change")
    data_files: list[str] = key(
        [], "with name: patterns of its files, such as data/*.parquet; empty: those of the split"
    )
    rename_columns: dict[str, str] = key(
        {}, "columns under the names that the readers know, {theirs: ours}: {question_text: question, reply: response}"
    )
    tool_calls: str = key(
        "text",
        "calls that an answer spells out in <tool_call> tags (Hermes, Qwen) stay text, or are parsed, with the tools of the "
        "system message and <tool_response>: the chat template then writes them in its own form",
        choices=("text", "parse"),
    )
    reasoning: str = key(
        "keep",
        "what an answer thinks first, in <think> tags or in reasoning_content, is kept as it is, moved into tags or into "
        "the field, or stripped",
        choices=("keep", "tags", "field", "strip"),
    )
    system_prompt: Optional[str] = key(
        None, "system message of every record, in place of its own; empty text: none; null: each record's own"
    )
    trained_turns: str = key(
        "all",
        "which answers of a conversation are trained: all, or the last one; one with `weight: 0` never is",
        choices=("all", "last"),
    )

    @property
    def label(self) -> str:
        """How messages call the entry; a row's address is label:number."""
        return self.path or f"{self.name}[{f'{self.config}/' if self.config else ''}{self.split}]"


@dataclass
class DataKeys:
    datasets: list[DatasetKeys] = key([], "training records with their weights: files, or datasets of the hub")
    mixing_temperature: float = key(
        1.0,
        "flatten how much of an epoch each entry of datasets gets: shares to the power of 1 / this, the epoch as long as "
        "before; 1: records times weight; large: every entry the same",
        low=1.0,
    )
    curriculum: str = key(
        "none",
        "order of the first epoch: random as all others, or records from short to long",
        choices=("none", "length"),
    )
    eval_datasets: list[DatasetKeys] = key([], "held-out records for the evaluation loss")
    max_length: int = key(2048, "longest document in tokens, EOS fill included; a multiple of block_size", low=1)
    row_length: Optional[int] = key(
        None, "positions of a packed sequence, clean streams and views; null: room for one document of max_length"
    )
    packing: bool = key(True, "put several documents into a packed sequence; attention never crosses them")
    streaming: bool = key(
        False,
        "tokenise records while training goes on, not before: start-up and memory stay small however many there are; "
        "needs max_steps",
    )
    overlong: str = key(
        "refuse",
        "a document longer than max_length is refused (counted), cut (it gets no EOS), or split: a text without a prompt "
        "continues in further documents",
        choices=("refuse", "truncate", "split"),
    )
    on_bad_row: str = key("error", "an unusable record stops the run, or is counted", choices=("error", "skip"))
    max_bad_fraction: float = key(0.01, "with on_bad_row: skip, the largest share of bad rows", low=0.0, high=1.0)
    chat_template_path: Optional[str] = key(
        None,
        "chat template used instead of the tokenizer's own: a Jinja file, a name (`chatml`, or one of trl's such as "
        "`qwen3_training`), or the model that has it, a directory or `org/name`",
    )
