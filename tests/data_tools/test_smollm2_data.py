"""The records of recipes/smollm2: solutions worked out by hand, files that share no question, equal bytes."""

import json
from datetime import datetime
from pathlib import Path

import pytest
from reasoning_gym import get_score_answer_fn

from data_tools.make_smollm2_data import LeftOut, main, solved_gsm, subtracted_times
from data_tools.worked import interval, running_sums

HOURS, SECONDS = ("Hours", "Minutes"), ("Hours", "Minutes", "Seconds")
SMALL = [
    *("--validation", "2"),
    *("--train", "60", "--heldout", "3", "--rl-prompts", "8", "--rl-heldout", "2"),
    *("--preference-prompts", "12", "--preference-heldout", "6"),
]


def at(text: str) -> datetime:
    return datetime.fromisoformat(text)


def test_sums_from_left_to_right():
    assert running_sums("12 + 30 - 7") == "12 + 30 = 42\n42 - 7 = 35"
    assert running_sums("2 - 9 - 1") == "2 - 9 = -7\n-7 - 1 = -8"


@pytest.mark.parametrize(
    "start, end, units, days, lines, values",
    [
        (
            *("2000-01-01T11:24:08", "2000-01-01T14:55:05", SECONDS, False),
            "Seconds: 5 - 8 + 60 = 57, borrow 1\nMinutes: 55 - 24 - 1 = 30\nHours: 14 - 11 = 3",
            [3, 30, 57],
        ),
        ("2023-12-30", "2023-12-31", (), True, "December: 31 - 30 = 1", [1]),
        (
            *("2023-12-30", "2024-03-01", (), True),  # over a leap year's February
            "December: 31 - 30 = 1\nJanuary: 1 + 31 = 32\nFebruary: 32 + 29 = 61\nMarch: 61 + 1 = 62",
            [62],
        ),
        (
            *("2024-05-01T20:30", "2024-05-03T06:15", HOURS, True),
            "Minutes: 15 - 30 + 60 = 45, borrow 1\nHours: 6 - 20 - 1 + 24 = 9, borrow 1\nMay: 3 - 1 = 2\nDays: 2 - 1 = 1",
            [1, 9, 45],
        ),
        (
            *("2024-05-01T19:00-11:00", "2024-05-03T12:00+11:00", HOURS, True),  # 06:00 on the 2nd to 01:00 on the 3rd
            "Zones: -11 - 11 = -22\nMinutes: 0 - 0 = 0\nHours: 12 - 19 - 22 + 48 = 19, borrow 2\n"
            "May: 3 - 1 = 2\nDays: 2 - 2 = 0",
            [0, 19, 0],
        ),
        (
            *("2024-05-01T06:00+11:00", "2024-05-01T20:00-11:00", HOURS, True),  # the other way: a carry
            "Zones: 11 + 11 = 22\nMinutes: 0 - 0 = 0\nHours: 20 - 6 + 22 - 24 = 12, carry 1\n"
            "May: 1 - 1 = 0\nDays: 0 + 1 = 1",
            [1, 12, 0],
        ),
    ],
)
def test_intervals(start, end, units, days, lines, values):
    assert interval(at(start), at(end), units, days) == (lines, values)
    seconds = sum(n * size for n, size in zip(values, (86400, 3600, 60, 1)[1 - days :], strict=False))
    assert (at(end) - at(start)).total_seconds() == seconds


def test_a_solution_of_gsm_symbolic_ends_in_its_answer():
    entry = {"question": "?", "answer": "15", "metadata": {"answer_cot": "He has 3 * 5.0 = 15.0 of 3.05\n\n#### 15.0"}}
    assert solved_gsm(entry) == "He has 3 * 5 = 15 of 3.05\nThe answer is 15."
    entry["metadata"]["answer_cot"] = "1 / 3 = 0.3333333333333333\n#### 0"
    with pytest.raises(LeftOut, match="noise"):
        solved_gsm(entry)


def test_wrong_answers_of_reasoning_gym_are_left_out():
    told = {"start_time": "2026-11-30 09:43:58.821000", "end_time": "2026-11-30 22:11:11.690000"}
    told |= {"format": "%H:%M:%S.%f", "expected_format": "HH:MM:SS.mmm"}
    with pytest.raises(LeftOut, match="wrong answer"):
        subtracted_times({"answer": "12:27:12.868", "metadata": told})
    last = subtracted_times({"answer": "12:27:12.869", "metadata": told}).splitlines()[-1]
    assert last == "The answer is 12:27:12.869."


def rows_of(folder: Path) -> dict[str, list[dict]]:
    return {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in folder.glob("*")}


def test_files(tmp_path, capsys):
    for name, words in (("one", SMALL), ("again", SMALL), ("more", [*SMALL, "--train", "90"])):
        assert main(["--output", str(tmp_path / name), *words]) == 0
    assert "gsm_symbolic: left out" in capsys.readouterr().out
    files = rows_of(tmp_path / "one")
    assert files == rows_of(tmp_path / "again")
    assert {name: len(rows) for name, rows in files.items()} == {
        **{"train": 60, "heldout": 12, "preference_prompts": 12, "preference_heldout": 6},
        **{"rl_train": 8, "rl_heldout": 2, "validation": 8},
    }
    longer = rows_of(tmp_path / "more")
    assert longer.pop("train") != files["train"]
    assert longer == {name: rows for name, rows in files.items() if name != "train"}

    questions = [row["messages"][0]["content"] for rows in files.values() for row in rows]
    assert len(set(questions)) == len(questions)
    for row in (*files["train"], *files["heldout"], *files["preference_prompts"]):
        response = row["messages"][1]["content"]
        assert response.splitlines()[-1].removeprefix("The answer is ").removesuffix(".") == row["answer"].removesuffix(
            "."
        )
    assert sum(row["task"] == "gsm_symbolic" for row in files["train"]) == 30
    for row in files["rl_train"]:
        assert [message["role"] for message in row["messages"]] == ["user"]
        assert get_score_answer_fn(row["task"])(row["answer"], row) == 1.0
