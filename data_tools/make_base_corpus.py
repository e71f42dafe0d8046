"""Make the corpus that the embedded base model is pre-trained on: short problems and their answers as plain text.

    python -m data_tools.make_base_corpus --output runs/quickstart_base/corpus.jsonl

A line is `{"prompt": "Write backwards: STONE\\n", "completion": "ENOTS"}`, without a chat template and without turns. The
problems are those of the quickstart's tasks, drawn without end; a question of the held-out records, and a long answer of
theirs, does not occur. (Random letters cannot be predicted, so only the answers are learnt from.) Equal arguments give
equal bytes.
"""

import argparse
import itertools
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from data_tools.make_quickstart_data import TASKS, Problem, Task, write_jsonl
from data_tools.train_tokenizer import RECORDS

DOCUMENTS = 200_000
LONG_ANSWERS = {
    "reverse_letters",
    "sort_letters",
    "reverse_words",
    "sort_numbers",
    "double_letters",
    "alphabet",
}  # tasks whose answer tells the problem


def documents(seed: str, count: int, held_out: list[dict]) -> Iterator[dict[str, str]]:
    rng = random.Random(seed)
    questions = {row["messages"][0]["content"] for row in held_out}
    answers = {(row["task"], row["answer"]) for row in held_out if row["task"] in LONG_ANSWERS}
    streams = {task.name: endless(task, rng) for task in TASKS}
    while count:
        (task,) = rng.choices(TASKS, [task.weight for task in TASKS])
        fields, answer = next(streams[task.name])
        question = rng.choice(task.wordings).format(**fields)
        if question not in questions and (task.name, answer) not in answers:
            count -= 1
            yield {"prompt": f"{question}\n", "completion": answer}


def endless(task: Task, rng: random.Random) -> Iterator[Problem]:
    """A task's problems, from the start again where they end."""
    return itertools.chain.from_iterable(task.problems(rng) for _ in itertools.repeat(None))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="the corpus, .jsonl")
    parser.add_argument("--seed", default="base")
    parser.add_argument("--documents", type=int, default=DOCUMENTS, help="default: %(default)s")
    parser.add_argument("--heldout", type=Path, default=RECORDS.parent / "heldout.jsonl", help="records to keep out")
    options = parser.parse_args(arguments)
    held_out = [json.loads(line) for line in options.heldout.read_text(encoding="utf-8").splitlines()]
    write_jsonl(options.output, documents(options.seed, options.documents, held_out))
    print(f"{options.documents} documents: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
