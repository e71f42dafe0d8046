"""The everyday requests of recipes/smollm2: prompts, all different, none held out and trained on."""

from pathlib import Path

from dfactory.data.prompts import prompt_of, read_rows

DATA = Path(__file__).parents[2] / "recipes" / "smollm2" / "data"


def plain(text: str) -> str:
    """Letters and digits alone."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split())


def test_requests_are_different_prompts():
    train, held_out = (read_rows(str(DATA / name)) for name in ("requests.jsonl", "requests_heldout.jsonl"))
    assert (len(train), len(held_out)) == (400, 60)
    texts = []
    for row in (*train, *held_out):
        (turn,) = prompt_of(row)
        assert (turn["role"], row.fields["task"]) == ("user", "everyday")
        texts.append(plain(turn["content"]))
    assert len(set(texts)) == 460
