"""Make the corpus that the embedded base model is pre-trained on: plain text, no instructions, no turns.

    python -m data_tools.make_base_corpus --output runs/quickstart_base/corpus.jsonl

Most lines are a statement with its end to be written, `{"prompt": "STONE backwards: ", "completion": "ENOTS."}`; the
others are running text, `{"text": ...}`: statements, or a piece of the story that reasoning-gym carries. (Random letters
cannot be predicted, so statements as text alone teach several times slower.) A subject that a held-out record asks about
does not occur. Equal arguments give equal bytes.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from reasoning_gym.data import read_data_file

from data_tools.make_quickstart_data import write_jsonl
from data_tools.quickstart_tasks import STORY, TASKS, Task
from data_tools.train_tokenizer import RECORDS

DOCUMENTS = 100_000
KINDS = {"completion": 0.92, "text": 0.06, "story": 0.02}  # shares of the documents
STORY_WORDS = 45  # in a piece
SAME_SUBJECT = 0.6  # probability that the next statement of a text says something else about the same subject


def documents(rng: random.Random, count: int, held_out: set[str]) -> Iterator[dict[str, str]]:
    story = read_data_file(STORY).split()
    for _ in range(count):
        (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
        if kind == "story":
            start = rng.randrange(len(story) - STORY_WORDS)
            yield {"text": " ".join(story[start : start + STORY_WORDS])}
        elif kind == "text":
            yield {"text": " ".join("".join(parts) for parts in statements(rng, rng.randint(1, 3), held_out))}
        else:
            ((prompt, completion),) = statements(rng, 1, held_out)
            yield {"prompt": prompt, "completion": completion}


def statements(rng: random.Random, count: int, held_out: set[str]) -> Iterator[tuple[str, str]]:
    """(up to the answer, the answer and a full stop), by the tasks' weights; of neighbours many have one subject."""
    task, subject = draw_subject(rng, held_out)
    for _ in range(count):
        problem = task.problem(subject, rng.choice(list(task.changes)))
        yield rng.choice(task.statements).format(it=problem.subject, how=problem.how), f"{problem.answer}."
        if rng.random() < SAME_SUBJECT:
            task = rng.choice([other for other in TASKS if other.kind == task.kind])
        else:
            task, subject = draw_subject(rng, held_out)


def draw_subject(rng: random.Random, held_out: set[str]) -> tuple[Task, list]:
    while True:
        (task,) = rng.choices(TASKS, [task.weight for task in TASKS])
        subject = task.draw(rng)
        if task.show(subject) not in held_out:
            return task, subject


def held_out_subjects(path: Path) -> set[str]:
    return {json.loads(line)["subject"] for line in path.read_text(encoding="utf-8").splitlines()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSONL file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--documents", type=int, default=DOCUMENTS, help="default: %(default)s")
    parser.add_argument(
        "--held-out", type=Path, default=RECORDS.with_name("heldout.jsonl"), help="records to keep out of the corpus"
    )
    options = parser.parse_args(arguments)

    rng = random.Random(f"{options.seed}/corpus")
    write_jsonl(options.output, documents(rng, options.documents, held_out_subjects(options.held_out)))
    print(f"{options.documents} documents, {options.output.stat().st_size / 1e6:.1f} MB: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
