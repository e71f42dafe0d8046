"""What a CUDA device alone can show. Skipped without one, and then not counted as passed."""

import pytest
import torch

from dfactory.assembly import make_objective, make_source, read_inputs
from dfactory.decoding import decode
from dfactory.engine.window import micro_loss, window_counts
from dfactory.models.registry import load_policy
from dfactory.recipe import load_recipe
from tests.decoding.conftest import sharpen
from tests.decoding.test_decoder import make_rules, random_prompts
from tests.engine.conftest import GOLDEN, read_metrics
from tests.engine.test_equality import OBJECTIVES, ZERO, plain_losses

LOGITS_ULPS = 4 * 2.0**-14  # the sharpened model's logits reach 684, where neighbouring float32 numbers are 2^-14 apart

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_of_twenty_steps_equal_plain_torch_on_a_cpu(recipe_file, dpo_keys, run_jobs, tmp_path, objective):
    """fp32 at ZeRO 0 and 3, with flex_attention, to 1e-5; and bf16 as near as its rounding lets it be: over twenty steps at
    a high learning rate 2 percent of a loss were seen, of DPO's, a function of differences of sums, 7."""
    keys = OBJECTIVES[objective] + (dpo_keys if objective == "dpo" else [])
    runs = {
        tmp_path / "zero0": [ZERO[0]],
        tmp_path / "zero3": [ZERO[3]],
        tmp_path / "bf16": [ZERO[1], "dtype=bfloat16"],
    }
    run_jobs(1, [(recipe_file, [*keys, *own, f"output_dir={run}"]) for run, own in runs.items()])
    expected = torch.tensor(plain_losses(recipe_file, keys))
    for run in runs:
        tolerance = 1e-5
        if run.name == "bf16":
            tolerance = 0.1 if objective == "dpo" else 0.03
            first = abs(read_metrics(run)[0] - expected[0].item())  # later, rounded weights go ways of their own
            assert first < 3e-2, f"bf16: first losses differ by {first:.2e}"
        difference = ((torch.tensor(read_metrics(run)) - expected) / expected).abs().max().item()
        assert difference < tolerance, f"{run.name}: losses differ by {difference:.2e}"


@pytest.mark.parametrize("objective", ["sft", "elbo", "cap"])
def test_the_host_does_not_wait_between_forward_and_step(recipe_file, objective):
    """Whatever asks the device for a value (.item(), .tolist(), a boolean index) raises here. In bf16: torch has no
    grouped matmul in fp32 on a GPU and loops over the experts there."""
    recipe = load_recipe(recipe_file, OBJECTIVES[objective])
    inputs = read_inputs(recipe)
    source = make_source(recipe, inputs, rank=0, world_size=1)
    batches = [source.next_window()[0].to("cuda") for _ in range(3)]
    policy, objective = load_policy(GOLDEN, dtype="bfloat16", device="cuda"), make_objective(recipe, inputs)
    optimiser = torch.optim.AdamW(policy.parameters(), fused=True)
    counts = window_counts(objective, batches[:1], [policy(batches[0])], lambda _: None)
    for number, batch in enumerate(batches):
        torch.cuda.set_sync_debug_mode("error" if number else "default")  # the first step compiles
        try:
            terms = objective(batch, policy(batch))
            micro_loss(terms, counts, 1).backward()
            optimiser.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("keys", [{}, {"editing_threshold": 0.7, "threshold": 0.4}, {"temperature": 1.0}])
def test_decoding_gives_the_tokens_of_a_cpu(keys):
    """Ragged prompts in fewer slots; the attention over the cache has another form there."""
    prompts, rules = random_prompts(3, 17, 8, 30, 11), make_rules(batch_size=3, **keys)
    rollouts = [
        decode(sharpen(load_policy(GOLDEN, dtype="float32", device=d)), prompts, rules) for d in ("cpu", "cuda")
    ]
    for here, there in zip(*rollouts, strict=True):
        assert there.token_ids == here.token_ids
        assert there.commit_step == here.commit_step
        torch.testing.assert_close(
            torch.tensor(there.commit_logprob), torch.tensor(here.commit_logprob), atol=LOGITS_ULPS, rtol=0
        )


@pytest.mark.parametrize("keys", [{}, {"editing_threshold": 0.7, "threshold": 0.4}, {"temperature": 1.0}])
def test_replayed_forwards_give_the_tokens_of_launched_ones(monkeypatch, keys):
    """In bf16, where forwards are replayed as CUDA graphs; more prompts than slots, so that recordings serve several."""
    prompts, keys = random_prompts(3, 17, 8, 30, 11), {"batch_size": 3, **keys}
    policy = sharpen(load_policy(GOLDEN, dtype="bfloat16", device="cuda"))
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(graph) or replay(graph))
    replayed = decode(policy, prompts, make_rules(cuda_graphs=True, **keys))
    assert len(replays) > len(set(map(id, replays))) > 1
    launched = decode(policy, prompts, make_rules(**keys))
    assert [r.token_ids for r in replayed] == [r.token_ids for r in launched]
    assert [r.commit_step for r in replayed] == [r.commit_step for r in launched]
