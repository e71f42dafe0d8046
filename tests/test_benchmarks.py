"""The claims of benchmarks/ that can be shown in seconds."""

import pytest

from benchmarks import dpo_variance
from dfactory.cli import main
from dfactory.models.registry import load_policy
from tests.test_assets import DATA


@pytest.mark.slow
def test_shared_noise_and_pairs_cut_the_variance_of_a_margin_by_twenty(tmp_path, capsys):
    """The embedded model after ten steps of the quickstart's DPO against the one before."""
    keys = ["model_name_or_path=tiny", "max_steps=10", "warmup_steps=0", "eval_datasets=[]", f"output_dir={tmp_path}"]
    assert main(["train", str(DATA.parent / "dpo.yaml"), *keys]) == 0
    data = str(DATA / "pairs_heldout.jsonl")
    documents, mask_id = dpo_variance.read_pairs("tiny", data, count=8, block_size=16, max_length=64)
    models = [load_policy(path, dtype="float32") for path in (tmp_path, "tiny")]
    results = dpo_variance.compare(*models, documents, mask_id, views=2, replicates=12)
    for name in ("shared, pairs", "shared, exact, pairs"):
        assert results["naive"].variance > 20 * results[name].variance
        error = results["naive"].standard_error + results[name].standard_error
        assert abs(results[name].mean - results["naive"].mean) < 3 * error  # they estimate the same

    assert (
        dpo_variance.main(
            ["--policy", str(tmp_path), "--reference", "tiny", "--data", data, "--pairs", "2", "--replicates", "2"]
        )
        == 0
    )
    assert "naive / this" in capsys.readouterr().out
