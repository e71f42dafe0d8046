"""Make records whose answers are actions, not text: a robot on a grid fetches a box and brings it to a goal.

    python -m data_tools.make_grid_data --output recipes/actions/data

The observation is text, `robot C5 box F2 goal A7`: columns are letters, rows are digits. The answer is six tokens of the
range `action`, 17 bins:

    <|action_10|><|action_4|><|action_15|> <|action_2|><|action_12|><|action_16|>      (without the space)
    to the box: +3 columns, -3 rows, grip   to the goal: -5 columns, +5 rows, release

Bin 7 stands for no move, 0 for seven back and 14 for seven ahead. Writes `train.jsonl` and `heldout.jsonl`; an observation
is in one of them only. Equal arguments give equal bytes.
"""

import argparse
import itertools
import json
import random
import sys
from pathlib import Path

COLUMNS, ROWS = "ABCDEFGH", "12345678"
MIDDLE, GRIP, RELEASE = 7, 15, 16  # bins
TRAIN_RECORDS, HELDOUT_RECORDS = 6000, 200

Cell = tuple[int, int]


def actions(robot: Cell, box: Cell, goal: Cell) -> list[int]:
    """The bins of the six actions.

    actions((2, 4), (5, 1), (0, 6)) == [10, 4, 15, 2, 12, 16]
    """
    moves = [
        [MIDDLE + after - before for before, after in zip(one, other, strict=True)]
        for one, other in ((robot, box), (box, goal))
    ]
    return [*moves[0], GRIP, *moves[1], RELEASE]


def record(robot: Cell, box: Cell, goal: Cell) -> dict:
    cells = (COLUMNS[column] + ROWS[row] for column, row in (robot, box, goal))
    asked = " ".join(f"{name} {cell}" for name, cell in zip(("robot", "box", "goal"), cells, strict=True))
    answer = "".join(f"<|action_{bin}|>" for bin in actions(robot, box, goal))
    return {
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}],
        "answer": answer,
    }


def records(count: int, seed: int) -> list[dict]:
    """That many, all different."""
    cells = list(itertools.product(range(len(COLUMNS)), range(len(ROWS))))
    draws = random.Random(seed)
    worlds: dict[tuple[Cell, ...], None] = {}
    while len(worlds) < count:
        worlds[tuple(draws.choice(cells) for _ in range(3))] = None
    return [record(*world) for world in worlds]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory, made if missing")
    parser.add_argument("--train", type=int, default=TRAIN_RECORDS, help="records of train.jsonl")
    parser.add_argument("--heldout", type=int, default=HELDOUT_RECORDS, help="records of heldout.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    made = records(options.train + options.heldout, options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", made[: options.train]), ("heldout", made[options.train :])):
        text = "".join(json.dumps(one) + "\n" for one in part)
        (options.output / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
