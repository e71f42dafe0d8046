"""stats, token-count, sample, decontaminate and export-parquet: what they write, count and refuse, and how they go on."""

import json

import pyarrow.parquet as pq
import pytest

from dfactory.data.records import read_records
from dfactory.data_tools import decontaminate, export_parquet, rows, token_count
from dfactory.data_tools.ngrams import Ngrams, Overlap, words_of
from dfactory.errors import ConfigError, DataError

QUESTION = "How many days has the month of February in a leap year, please?"


def chat(question, answer="yes", **further):
    turns = [("user", question), ("assistant", answer)]
    return {"messages": [{"role": role, "content": text} for role, text in turns], **further}


@pytest.fixture
def interrupted(tool):
    """interrupted(at, verb, word, ...): the command is interrupted when it reads the row of this number."""

    def call(at, verb, *words):
        with pytest.MonkeyPatch.context() as patch:
            _interrupt(patch, at)
            return tool(verb, *words)

    return call


def _interrupt(patch, at):
    read = rows.read_objects

    def until(*arguments):
        for number, row in read(*arguments):
            if number == at:
                raise KeyboardInterrupt
            yield number, row

    patch.setattr(rows, "read_objects", until)


# --- stats ------------------------------------------------------------------------------------------------------------


def test_stats_tell_what_files_hold_and_what_cannot_be_read(files, tool, tmp_path):
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    with_calls = {"messages": [*chat("w?")["messages"][:1], called], "tools": [{"name": "f"}], "source": "a"}
    path = files(
        "rows.jsonl",
        *(chat("a b c", "four", source="a", n=index) for index in range(6)),
        with_calls,
        {"prompt": "p", "completion": "c", "source": "b"},
        chat("", "", source="b"),
    )
    status, shown = tool("stats", path, "--by", "source", "--json", tmp_path / "n.json", "--html", tmp_path / "n.html")
    assert status == 0
    assert "9 rows, 1 of them cannot be read" in shown
    assert "rows.jsonl:9: messages[1].content is empty" in shown
    found = json.loads((tmp_path / "n.json").read_text())
    assert found["kinds"] == {"conversation": 7, "text": 1}
    assert found["formats"] == {"messages": 6, "messages + tools": 1, "prompt + completion": 1}
    assert found["columns"]["n"] == {"int": 6}
    assert found["values"] == {"source": {"a": 7, "b": 2}}
    assert found["roles"] == {"user": 7, "assistant": 7}
    assert (found["conversations_with_tools"], found["conversations_with_calls"]) == (1, 1)
    assert found["lengths"]["prompt"]["words"]["max"] == 3
    assert found["lengths"]["answer"]["characters"]["median"] == 4
    assert found["by source"]["b"] == {"rows": 1, "characters": 2}
    assert "values of source" in (tmp_path / "n.html").read_text()


def test_stats_of_files_in_which_nothing_can_be_read_fail(files, tool):
    with pytest.raises(DataError, match="no row of"):
        tool("stats", files("rows.jsonl", {"x": 1}))


# --- token-count ------------------------------------------------------------------------------------------------------


def test_tokens_are_those_of_training_and_go_on_after_an_interruption(files, tool, interrupted, tmp_path, monkeypatch):
    """An answer of three letters has its letters, the end of its turn and EOS as trained tokens, or fewer where letters
    make one token."""
    monkeypatch.setattr(token_count, "ROWS", 2)
    paths = [
        files("a.jsonl", *(chat("hi", "abc", source=index % 2) for index in range(5)), {"x": 1}),
        files("b.jsonl", {"input_ids": [5, 6, 7], "prompt_lengths": 1}),
    ]
    words = [*paths, "--model", "tiny", "--by", "source"]
    status, shown = tool("token-count", *words)
    assert status == 0
    file = tmp_path / "counts.json"
    status, told = interrupted(4, "token-count", *words, "--json", file)
    assert (status, "interrupted after 2 rows; the same command goes on" in told) == (130, True)
    assert not json.loads(file.read_text())["is_finished"]
    assert tool("token-count", *words, "--json", file) == (0, shown)
    assert tool("token-count", *words, "--json", file) == (0, shown)  # finished: nothing is read
    counts = {(group["of"], group["value"]): group for group in json.loads(file.read_text())["groups"]}
    assert [counts["", path]["rows"] for path in paths] == [5, 1]
    assert (counts["", paths[1]]["tokens"], counts["", paths[1]]["trained"]) == (3, 2)
    assert counts["source", "0"]["tokens"] + counts["source", "1"]["tokens"] == counts["", paths[0]]["tokens"]
    assert "in 6 rows; 1 refused" in shown
    with pytest.raises(ConfigError, match="counts with pairs False, and is now asked for with True"):
        tool("token-count", *words, "--json", file, "--pairs")


# --- sample -----------------------------------------------------------------------------------------------------------


def test_a_sample_is_a_function_of_the_seed_and_grows_with_its_size(files, tool, rows_of, tmp_path):
    path = files("rows.jsonl", *({"text": str(index), "source": "ab"[index % 4 == 0]} for index in range(200)))

    def drawn(*words):
        status, shown = tool("sample", path, "--output", tmp_path / "out.jsonl", *words)
        assert status == 0
        return [int(row["text"]) for row in rows_of(tmp_path / "out.jsonl")], shown

    small, large = drawn("--count", 10)[0], drawn("--count", 50)[0]
    assert (len(small), len(large)) == (10, 50)
    assert set(small) < set(large)
    assert small == sorted(small) == drawn("--count", 10)[0]
    assert small != drawn("--count", 10, "--seed", 1)[0]
    tenth, third = drawn("--fraction", 0.1)[0], drawn("--fraction", 0.3)[0]
    assert 5 < len(tenth) < 40
    assert set(tenth) < set(third)
    each, shown = drawn("--count", 10, "--by", "source")
    assert sum(index % 4 == 0 for index in each) == 10
    assert "10 of 50 with source b" in shown
    assert len(drawn("--count", 1000)[0]) == 200


def test_a_sample_names_or_counts_lines_that_are_none(tmp_path, tool):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\nno\n[1]\n')
    words = ["sample", path, "--output", tmp_path / "out.jsonl", "--count", 5]
    with pytest.raises(DataError, match=r"rows.jsonl:2: not valid JSON.*or give --skip-bad"):
        tool(*words)
    assert "1 of 1 rows, 2 refused" in tool(*words, "--skip-bad")[1]


# --- decontaminate ----------------------------------------------------------------------------------------------------


def test_runs_of_words_by_hand():
    grams = Ngrams(3)
    grams.add("eval:1", "The quick, brown fox JUMPS!")  # 3 runs
    grams.add("eval:2", "no")
    assert grams.overlap(["a quick brown fox"]) == Overlap("eval:1", 1 / 3)
    assert grams.overlap(["So the quick brown fox", "brown fox jumps"]) == Overlap("eval:1", 1.0)
    assert grams.overlap(["the quick brown fox the quick brown fox"]).share == 2 / 3  # a run counts once
    assert grams.overlap(["quick fox brown jumps the", "no way"]) is None
    assert grams.overlap(["No."]) == Overlap("eval:2", 1.0)
    assert words_of("２月は何日? It's_x") == ["2", "月", "は", "何", "日", "it", "s", "x"]


def contaminated(files):
    train = files(
        "train.jsonl",
        chat("What is the capital of France?"),
        chat(f"Tell me: {QUESTION.upper()} Thank you."),
        chat("Go on.", answer=QUESTION),
        {"prompt": "?", "chosen": "a", "rejected": QUESTION},
        {"messages": [{"role": "system", "content": QUESTION}, *chat("Hello, how are you?")["messages"]]},
        {"text": "yes"},
    )
    return train, files("eval.jsonl", {"question": QUESTION, "answer": "29"}, chat("Is it?", "yes"))


def test_records_that_hold_a_question_of_an_evaluation_are_left_out(files, tool, rows_of, tmp_path):
    train, held_out = contaminated(files)
    output, removed = tmp_path / "clean.jsonl", tmp_path / "removed.jsonl"
    words = ["decontaminate", train, "--against", held_out, "--ngram", 5]
    shown = tool(*words)[1]
    assert "3 of 6 records stay, 3 hold 50% or more of an evaluation record" in shown
    assert f"{train}:2 holds 100% of {held_out}:1" in shown
    assert not output.exists()
    assert tool(*words, "--output", output, "--removed", removed)[0] == 0
    assert rows_of(output) == [row for index, row in enumerate(rows_of(train)) if index in (0, 4, 5)]
    assert {row["contaminated_by"] for row in rows_of(removed)} == {f"{held_out}:1"}
    assert rows_of(removed)[0]["overlap"] == 1.0
    assert "finished before" in tool(*words, "--output", output, "--removed", removed)[1]
    with pytest.raises(ConfigError, match="was started with overlap"):
        tool(*words, "--output", output, "--removed", removed, "--overlap", 0.9)
    assert "2 answers of fewer are not compared" in tool(*words, "--answers")[1]


def test_long_answers_are_compared_where_that_is_wanted(files, tool):
    held_out = files("eval.jsonl", chat("Why is it so?", answer=QUESTION))
    words = ["decontaminate", files("train.jsonl", chat("a"), {"text": QUESTION}), "--against", held_out]
    assert "2 of 2 records stay" in tool(*words)[1]
    assert "1 of 2 records stay" in tool(*words, "--answers")[1]


def test_decontamination_goes_on_with_the_same_bytes(files, tool, interrupted, tmp_path, monkeypatch):
    monkeypatch.setattr(decontaminate, "STEP", 2)
    train, held_out = contaminated(files)
    words = ["decontaminate", train, "--against", held_out, "--ngram", 5]
    outputs = [[tmp_path / name / file for file in ("clean.jsonl", "removed.jsonl")] for name in ("whole", "parts")]
    whole, parts = ([*words, "--output", clean, "--removed", removed] for clean, removed in outputs)
    assert tool(*whole)[0] == 0
    for at in (2, 4, 6):
        assert interrupted(at, *parts)[0] == 130
        assert not outputs[1][0].exists()
    with outputs[1][1].with_name("removed.jsonl.partial").open("a") as file:
        file.write("{}\n")  # written after the last state
    assert tool(*parts)[0] == 0
    for one, other in zip(*outputs, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_token_ids_cannot_be_compared(files, tool):
    train = files("train.jsonl", {"input_ids": [5, 6], "prompt_lengths": 1}, chat("a"))
    words = ["decontaminate", train, "--against", files("eval.jsonl", chat(QUESTION))]
    with pytest.raises(DataError, match=r"train.jsonl:1: token ids cannot be compared"):
        tool(*words)
    assert "1 of 1 records stay" in tool(*words, "--skip-bad")[1]


# --- export-parquet ---------------------------------------------------------------------------------------------------


def many(files):
    """Types show late: a column that is null at first, whole numbers before fractions, tools in one row."""
    rows = [chat(str(index), score=index if index < 5 else index + 0.5, note=None) for index in range(6)]
    rows += [chat("w?", tools=[{"name": "f", "parameters": {"x": 1}}], note="late")]
    return files("rows.jsonl", *rows)


def test_shards_have_one_schema_and_are_read_by_the_datasets_library(files, tool, tmp_path, monkeypatch):
    monkeypatch.setattr(export_parquet, "PARQUET_ROWS", 2)
    path, folder = many(files), tmp_path / "set"
    status, shown = tool("export-parquet", path, "--output", folder, "--rows-per-shard", 3)
    assert status == 0
    assert "7 rows in 3 shards, 4 columns" in shown
    shards = sorted(folder.rglob("*.parquet"))
    assert [shard.name for shard in shards] == [f"train-0000{index}-of-00003.parquet" for index in range(3)]
    assert len({pq.read_schema(shard) for shard in shards}) == 1
    assert [pq.read_metadata(shard).num_rows for shard in shards] == [3, 3, 1]
    before = [record for _, record in read_records(path)]
    assert [record for shard in shards for _, record in read_records(shard)] == before
    assert "path: data/train-*" in (folder / "README.md").read_text()
    assert not list(folder.glob(".*"))
    with pytest.raises(ConfigError, match="remove it, or give another --split"):
        tool("export-parquet", path, "--output", folder)
    assert tool("export-parquet", path, "--output", folder, "--split", "test")[0] == 0


def test_an_export_goes_on_after_its_last_whole_shard(files, tool, interrupted, tmp_path):
    path = files("rows.jsonl", *({"text": str(index)} for index in range(7)))
    words = ["export-parquet", path, "--rows-per-shard", 2, "--output"]
    assert tool(*words, tmp_path / "whole")[0] == 0
    folder = tmp_path / "parts"
    assert interrupted(2, *words, folder)[0] == 130  # in the first pass: nothing is kept
    find = export_parquet._find_schema
    with pytest.MonkeyPatch.context() as patch:  # in the second pass
        patch.setattr(export_parquet, "_find_schema", lambda options: (find(options), _interrupt(patch, at=6))[0])
        status, told = tool(*words, folder)
    assert (status, "interrupted after 2 whole shards" in told) == (130, True)
    with pytest.raises(ConfigError, match="was started with compression zstd"):
        tool(*words, folder, "--compression", "none")
    assert tool(*words, folder)[0] == 0
    for whole in sorted((tmp_path / "whole").rglob("*.parquet")):
        other = folder / whole.relative_to(tmp_path / "whole")
        assert pq.read_table(whole) == pq.read_table(other)


def test_a_column_of_several_types_is_named(files, tool, tmp_path):
    path = files("rows.jsonl", {"text": "a", "id": 1}, {"text": "b", "id": "x"})
    with pytest.raises(DataError, match=r"column id, from .*rows.jsonl:1 to .*:2, holds values of several types"):
        tool("export-parquet", path, "--output", tmp_path / "set")
