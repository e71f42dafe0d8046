"""Every recipe parses; rules between keys that no other test breaks."""

import pytest

from dfactory.cli import main
from dfactory.errors import ConfigError
from dfactory.recipe import load_recipe
from tests.commands.conftest import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: str(file.relative_to(ROOT / "recipes")))
def test_every_recipe_parses(file):
    assert load_recipe(file).output_dir.startswith("runs/")


@pytest.mark.parametrize(
    "override, message",
    [
        ("complementary=true", "complementary true with view_source trace: a transition has no twin"),
        ("stage=dpo", "view_source trace with stage dpo: a pair has no trace"),
        ("edit_share=0.1", "view_source trace with edit_share 0.1"),
        ("block_size_schedule=[[0,4],[9,16]]", r"block_size_schedule \[\[0, 4\], \[9, 16\]\] with view_source trace"),
        ("trace_stride=0", "trace_stride 0 in .*: it must be at least 1"),
        ("trace_filter=wrong", "trace_filter wrong .* one of correct, all"),
        ("view_source=traces", "view_source traces .* did you mean trace"),
    ],
)
def test_rules_of_trace_views(override, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(ROOT / "recipes/quickstart/trajectory.yaml", [override])


UNIFORM = ["view_source=uniform", "complementary=false"]


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["decode.compile=true", "torch_compile=true"], r"decode\.compile true with torch_compile true: .*leave one"),
        (["self_conditioning=0.5"], "self_conditioning 0.5 with view_source mask: only uniform noise has it"),
        (["context_loss_weight=1"], "context_loss_weight 1 with view_source mask: only uniform noise has it"),
        (["view_source=uniform"], "complementary true with view_source uniform: a view has no twin"),
        ([*UNIFORM, "stage=dpo"], "view_source uniform with stage dpo: .* uniform noise has no mask"),
        ([*UNIFORM, "stage=rl"], "view_source uniform with stage rl"),
        ([*UNIFORM, "loss_weight=elbo"], "loss_weight elbo with view_source uniform: .* none is weighed by 1/t"),
        ([*UNIFORM, "mask_token_id=5"], "mask_token_id 5 with view_source uniform: there is no mask"),
        ([*UNIFORM, "edit_share=0.1"], "edit_share 0.1, num_turns 1 with view_source uniform"),
        ([*UNIFORM, "block_size=null"], "view_source uniform with block_size null: a canvas has a length"),
        ([*UNIFORM, "after_answer=text"], "after_answer text with view_source uniform: a canvas ends in EOS"),
    ],
)
def test_rules_of_uniform_noise(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(ROOT / "recipes/quickstart/sft.yaml", overrides)


def test_a_canvas_may_go_beyond_max_length():
    """A row holds the clean text and a view of as many tokens, and one canvas less a token besides. Blocks need not divide
    max_length."""
    recipe = load_recipe(ROOT / "recipes/quickstart/sft.yaml", [*UNIFORM, "block_size=24"])
    assert recipe.longest_record == 64 + 64 + 23


MISSING_AT_HOME = (
    "jsonl",
    "model.safetensors",
    "runs/",
    "tokenizer",
)  # what a recipe waits for: data, weights, an earlier run


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: str(file.relative_to(ROOT / "recipes")))
def test_every_recipe_is_checked(file, capsys, monkeypatch, tmp_path):
    """A dry run of each: those that start from the embedded model would start; the others lack what is not in the
    repository, and nothing else."""
    monkeypatch.chdir(tmp_path)
    status = main(["check", str(file), "--gpus", "8"])
    told = capsys.readouterr().out
    assert "keys ─" in told
    assert "output_dir" in told
    if status == 0:
        assert "training would start" in told
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert bool(errors) == (status != 0)
    assert all(any(word in line for word in MISSING_AT_HOME) for line in errors), errors


@pytest.mark.parametrize("written", ["off", "'off'", "no", "false"])
def test_off_is_a_choice_although_yaml_reads_a_boolean(tmp_path, written):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"model_name_or_path: tiny\noutput_dir: x\ndatasets: [{{path: x.jsonl}}]\nfirst_loss_check: {written}\n"
    )
    assert load_recipe(file, []).first_loss_check == "off"
    assert load_recipe(file, [f"first_loss_check={written}"]).first_loss_check == "off"
    with pytest.raises(ConfigError, match=r"first_loss_check True in .*: it must be one of warn, stop, off"):
        load_recipe(file, ["first_loss_check=true"])
