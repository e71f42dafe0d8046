"""`dfactory eval --repair`: what is planted, what is counted, and the whole of it on the embedded model."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dfactory.cli import main
from dfactory.commands.repair import Planted, plant, summary
from dfactory.config.data import DatasetKeys
from dfactory.data.chat import SpecialIds
from dfactory.data.examples import load_examples
from dfactory.decoding.keys import DecodeKeys
from dfactory.inference import Pipeline
from dfactory.vocabulary import Vocabulary
from tests.commands.conftest import write_records

MASK, EOS = 39, 38


@pytest.fixture
def examples(tmp_path):
    """30 records of 4 prompt tokens and an answer of text; EOS follows where the record has it."""
    file = write_records(tmp_path / "ids.jsonl", 30, 30)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows[::2]:
        row["input_ids"] += [36, EOS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rules = {"max_length": 64, "overlong": "refuse", "on_bad_row": "error", "max_bad_fraction": 0.0}
    return load_examples([DatasetKeys(str(file))], None, **rules, block_size=8, eos_id=EOS, vocab_size=40, mask_id=MASK)


class Follower:
    """A model that wants token `position % 30` everywhere, whatever it sees."""

    device = torch.device("cpu")
    can_be_recorded = sees_whole_document = False
    logit_shift = 0
    config = SimpleNamespace(vocab_size=40)

    def hidden_at(self, chosen_N, inputs_RS, position_ids_RS, visibility, cache):
        return torch.nn.functional.one_hot(position_ids_RS[0, chosen_N] % 30, 40).float()

    def logits(self, hidden):
        return 10 * hidden


VOCABULARY = Vocabulary(40, SpecialIds(MASK, EOS, (35, MASK), (36,)), None, None)
PIPELINE = Pipeline.of(Follower(), VOCABULARY, DecodeKeys(block_size=8, max_new_tokens=4, editing_threshold=0.5))


def test_one_wrong_text_token_in_the_text_of_each_answer(examples):
    records = plant(PIPELINE, examples, seed=0)
    for record, example in zip(records, (examples[i] for i in range(30)), strict=True):
        assert record.prompt_ids == example.input_ids_T[:4].tolist()
        assert record.prompt_ids + record.answer_ids == example.input_ids_T.tolist()
        assert set(record.fill_ids) <= {EOS}
        right = record.draft(planted=False)
        assert (4 + len(right)) % 8 == 0
        (where,) = np.flatnonzero(np.not_equal(right, record.draft(planted=True)))
        assert where == record.index
        assert right[where] < 30  # text: neither the end of a turn nor EOS
        assert record.wrong_id not in (35, 36, MASK, EOS, right[where])
    assert records == plant(PIPELINE, examples, seed=0)
    assert records != plant(PIPELINE, examples, seed=1)
    assert len({record.index for record in records}) > 5


def test_counts_by_hand():
    """A model that wants 4 5 6 7 8 9 ...: it repairs errors in such an answer, and spoils what is another."""
    answers = {"right": [4, 5, 6, 7], "other": [4, 5, 0, 7]}
    records = [Planted(name, [0, 1, 2, 3], ids, [], index=1, wrong_id=20) for name, ids in answers.items()]
    prompts = [record.prompt_ids for record in records]
    clean, planted = (PIPELINE.decode(prompts, drafts=[r.draft(flag) for r in records]) for flag in (False, True))
    cells = [list(column.cells) for column in summary(records, clean, planted, 1.0).columns]
    assert cells[1] == ["2", "2", "8", "6"]
    assert cells[2] == ["100.00%", "50.00%", f"{1 / 8:.2%}", f"{1 / 6:.2%}"]


def test_what_stands_behind_an_early_eos_has_changed():
    record = Planted("x", [0], [4, 5, EOS], [EOS], index=0, wrong_id=9)
    ended = SimpleNamespace(output_ids=[4, EOS])
    assert record.changed(ended).tolist() == [False, True, True]
    longer = SimpleNamespace(output_ids=[4, 5, 6, 7, EOS])
    assert record.changed(longer).tolist() == [False, False, True]


def test_the_command_on_the_embedded_model(tmp_path, capsys):
    data, output = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    rows = [{"prompt": f"say {number}", "completion": f"number {number}"} for number in range(5)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["eval", "--repair", "--model", "tiny", "--init-weights", "random", "--data", str(data)]
    assert main([*words, "decode.block_size=8"]) == 2
    assert "decode.editing_threshold is null: --repair measures editing" in capsys.readouterr().err
    assert main([*words, "--output", str(output), "decode.block_size=8", "decode.editing_threshold=0.9"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 5
    for row in rows:  # random weights are sure of nothing
        assert row["output_ids_without_error"] == row["answer_ids"]
        assert row["output_ids"][row["planted"]["index"]] == row["planted"]["wrong"] != row["planted"]["right"]
    assert "one wrong token in each of 5 right answers" in told
    assert "errors repaired │ 5 │ 0.00%" in told
    tokens = sum(len(row["answer_ids"]) for row in rows)
    assert f"answers without an error │ {tokens} │ 0.00%" in told
    data.write_text(data.read_text() + '{"prompt": "a", "completion": ""}\n')
    assert main([*words, "decode.block_size=8", "decode.editing_threshold=0.9"]) == 1
    assert "data.jsonl:6" in capsys.readouterr().err
