"""`dfactory eval --elbo-pairs`: exact where it can be, the same on every call, with errors that mean something."""

import json
import math

import numpy as np
import pytest
import torch

from dfactory.cli import main
from dfactory.commands.elbo import Bounds
from tests.commands.conftest import GOLDEN, write_records
from tests.reference import one_view_nll, reference_model

MASK, EOS = 158, 156


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("elbo") / "ids.jsonl", 6, vocabulary=150)


def run(data, output, pairs: int, *keys: str) -> list[dict]:
    words = ["eval", "--model", str(GOLDEN), "--dtype", "float32", "--data", str(data), "--output", str(output)]
    words += ["--elbo-pairs", str(pairs), f"decode.mask_token_id={MASK}", f"decode.eos_token_id={EOS}", *keys]
    assert main(words) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_block_size_1_is_the_log_likelihood_of_the_reference_model(data, tmp_path, capsys):
    lines = run(data, tmp_path / "out.jsonl", 2, "decode.block_size=1")
    model, total, tokens = reference_model(GOLDEN), 0.0, 0
    for number, (line, record) in enumerate(zip(lines, map(json.loads, data.read_text().splitlines()), strict=True), 1):
        clean = torch.tensor([record["input_ids"]])
        target = (torch.arange(clean.shape[1]) >= record["prompt_lengths"])[None]
        expected = -one_view_nll(model, clean, torch.where(target, MASK, clean), target, block_size=1).sum().item()
        assert line["origin"] == f"{data}:{number}"
        assert line["tokens"] == int(target.sum())
        assert line["elbo"] == pytest.approx(expected, abs=1e-3)
        assert line["standard_error"] == pytest.approx(0, abs=1e-4)  # an exact pair leaves no noise
        total, tokens = total + expected, tokens + int(target.sum())
    told = capsys.readouterr().out
    nats, bits, perplexity = (
        float(line.split("│")[2]) for line in told.splitlines() if "ELBO" in line or "perpl" in line
    )
    assert nats == pytest.approx(total / tokens, abs=2e-4)
    assert bits == pytest.approx(nats / math.log(2), abs=2e-4)
    assert perplexity == pytest.approx(math.exp(-nats), rel=1e-3)


def test_the_seed_decides(data, tmp_path):
    def elbos(*keys: str) -> list[float]:
        return [line["elbo"] for line in run(data, tmp_path / "out.jsonl", 1, "decode.block_size=8", *keys)]

    first = elbos()
    assert elbos() == first
    assert elbos("decode.seed=1") != first


def test_more_pairs_go_where_the_standard_error_says(data, tmp_path):
    """4 pairs against 64: within four standard errors of each document and of all, which fill the last block."""
    few, many = (run(data, tmp_path / "out.jsonl", pairs, "decode.block_size=8") for pairs in (4, 64))
    for one, other in zip(few, many, strict=True):
        assert one["tokens"] == other["tokens"]
        assert abs(one["elbo"] - other["elbo"]) < 4 * math.hypot(one["standard_error"], other["standard_error"])
        assert other["standard_error"] < one["standard_error"]


def test_errors_by_hand():
    """Two documents of 2 and 4 tokens, two pairs: -4 +- 1 and -12 +- 0."""
    bounds = Bounds(np.array([0, 1]), np.array([2, 4]), np.array([6, 0]), np.array([[-3.0, -5.0], [-12.0, -12.0]]))
    assert bounds.per_token == pytest.approx(-16 / 6)
    assert bounds.standard_error_D.tolist() == [1.0, 0.0]
    assert bounds.error_of_views == pytest.approx(1 / 6)
    residual = -4 + 2 * 16 / 6
    assert bounds.error_of_documents == pytest.approx(math.sqrt(2 * 2 * residual**2) / 6)
    alone = Bounds(*(column[:1] for column in bounds[:3]), bounds.elbo_DN[:1, :1])
    assert math.isnan(alone.error_of_views)
    assert math.isnan(alone.error_of_documents)


def test_what_cannot_be_scored(tmp_path, capsys):
    for text in ("0", "-1", "many"):
        with pytest.raises(SystemExit) as ended:
            main(["eval", "--model", "tiny", "--data", "x.jsonl", "--elbo-pairs", text])
        assert ended.value.code == 2
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    words = ["eval", "--model", "tiny", "--init-weights", "random", "--data", str(prompts), "--elbo-pairs", "1"]
    assert main(words) == 1
    assert "prompts.jsonl:1" in capsys.readouterr().err
