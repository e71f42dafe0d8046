"""Rules between the recipe keys of reinforcement learning."""

import pytest

from dfactory.errors import ConfigError
from dfactory.recipe import load_recipe
from tests.engine.conftest import ROOT

RECIPE = ROOT / "recipes/quickstart/rl.yaml"
EBPO = ["policy_loss=ebpo", "noise_range_low=0"]


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["reward_funcs=[]"], "reward_funcs is empty with stage rl"),
        (["max_steps=null"], "max_steps null with stage rl"),
        (["decode.temperature=0"], "decode.temperature 0 with stage rl"),
        (["decode.acceptance=sampled"], "decode.acceptance sampled with stage rl starves rare tokens"),
        (["decode.editing_threshold=0.5"], "decode.editing_threshold 0.5 with policy_loss trace"),
        (["decode.top_k=5"], "decode.temperature, top_k or top_p other than"),
        (["decode.temperature=0.7", "importance_cap=null"], "decode.temperature 0.7 .* and importance_cap None"),
        (["decode.temperature=0.7", "policy_loss=diffu_grpo"], "only policy_loss trace with an importance_cap weighs"),
        (
            ["decode.temperature=0.7", "trace_stride=2"],
            "decode.temperature 0.7 with policy_loss trace and trace_stride 2",
        ),
        (["decode.cfg_scale=1"], "decode.cfg_scale 1 with policy_loss trace: the likelihood of a guided distribution"),
        (["decode.cfg_scale=1", "policy_loss=ebpo"], "decode.cfg_scale 1 with stage rl: the learner's likelihood is"),
        (["decode.block_size=8"], "decode.block_size with stage rl"),
        (["decode.max_new_tokens=64"], "decode.max_new_tokens 64 leaves no room for a prompt in max_length 64"),
        (["expert_parallel_size=2"], "expert_parallel_size 2 with stage rl"),
        (["edit_share=0.1"], "edit_share or num_turns with stage rl"),
        (["view_source=trace", "complementary=false"], "view_source trace with stage rl: say policy_loss trace"),
        (EBPO, "noise_range_low 0 with policy_loss ebpo divides by zero"),
        (["row_length=127"], "row_length 127 cannot hold a rollout of max_length with one view: raise it to 128"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_mistakes(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(RECIPE, overrides)


def test_what_is_allowed():
    """Rollouts are cut between views, so a row need not hold all of them; the trace does not draw mask ratios."""
    assert load_recipe(RECIPE, ["row_length=128", "num_views=16"]).row_length == 128
    assert not load_recipe(RECIPE, ["max_staleness=1"]).actors_score
    assert load_recipe(RECIPE, ["max_staleness=1", "decode.temperature=0.7"]).actors_score
    assert load_recipe(RECIPE, ["max_staleness=1", "trace_stride=2"]).actors_score  # the decoder recorded single steps
    assert load_recipe(RECIPE, ["noise_range_low=0"]).noise_range_low == 0
    canvas = load_recipe(
        RECIPE, ["block_size=null", "decode.block_size=8", "row_length=64"]
    )  # one view, no clean stream
    assert canvas.decode_keys.block_size == 8
    assert canvas.algorithm.importance_cap(canvas) == 2.0
    assert load_recipe(RECIPE, [*EBPO, "noise_range_high=1", "mask_count=exact"]).mask_count == "exact"
