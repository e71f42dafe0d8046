"""benchmarks/scale.py: its operations are torch's, its rows are the data layer's, and SCALE.md says what it prints."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from benchmarks import growth, parts, scale
from benchmarks.workload import BLOCK, Records, write_model
from dfactory.engine.trainer import deepspeed_config
from dfactory.models.registry import load_policy, read_config
from dfactory.planning.costs import Costs, Row, Work, forward_flops, step_flops
from dfactory.planning.memory import count_parameters, setup_of
from dfactory.recipe import load_recipe
from dfactory.visibility import dense_mask

ROOT = Path(__file__).parents[1]
POINT = growth.Point(length=128, views=3, batch=2, experts=8, vocabulary=512)


@pytest.fixture(scope="module")
def batch_and_model(tmp_path_factory):
    """Two documents of 128 tokens with three views each, as the data layer packs them, and a small model."""
    model_dir = write_model(tmp_path_factory.mktemp("model"), POINT.vocabulary, num_experts=POINT.experts)
    (batch,) = Records(growth.point_recipe(POINT, model_dir, 1)).source.next_window()
    return batch, model_dir


def test_positions_and_visible_pairs_are_those_of_a_packed_row(batch_and_model):
    batch, _ = batch_and_model
    row = Row(length=512, document=128, prompt=64, views=3, block=BLOCK)
    assert row.documents == 1
    assert 2 * row.positions == growth.positions_of(batch)
    assert 2 * row.pairs == int(dense_mask(batch.place_RS).sum())


def test_operations_are_those_that_torch_counts(batch_and_model):
    """By FlopCounterMode, over forward and backward. A dense mask computes all pairs of a row, so all are told."""
    batch, model_dir = batch_and_model
    policy, config = load_policy(model_dir, dtype="float32"), read_config(model_dir)
    assert torch.ops.aten._grouped_mm in flop_registry, f"{parts.__name__} registers what torch does not count on CPUs"
    with FlopCounterMode(display=False) as counter:
        policy(batch).logprob_N.sum().backward()
    rows, length = batch.place_RS.document.shape
    targets = len(batch.target_ids_N)
    forward = forward_flops(config, Work(rows * length, rows * length**2, targets, targets * length))
    assert sum(step_flops(forward, checkpointing=False).values()) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.fixture(scope="module")
def mini() -> Costs:
    return scale.Model.named("mini").costs


def test_a_row_of_the_real_model_takes_six_operations_a_weight_and_token(mini):
    """[Kaplan et al., arXiv 2001.08361, 2.1]: without attention, embedding and head, if the last layer ran everywhere."""
    weights = count_parameters(ROOT / "recipes/llada2_mini/model")
    everywhere = Work(mini.row.positions, mini.row.pairs, mini.row.positions, mini.row.pairs)
    forward = forward_flops(mini.config, everywhere)
    flops = step_flops(forward, checkpointing=False)
    body = sum(work for part, work in flops.items() if part not in ("attention", "head"))
    assert body == pytest.approx(6 * (weights.active - weights.vocabulary) * mini.row.positions, rel=0.01)


def of(costs: Costs, accumulation: int = 1, **setup) -> Costs:
    changed = dataclasses.replace(costs.setup, gradient_checkpointing=True, **setup)
    return dataclasses.replace(costs, setup=changed, accumulation=accumulation)


def test_traffic_by_hand(mini):
    """16.26 B parameters in bfloat16 over adapters of 40 GB/s and NVLink of 337.5 GB/s a GPU."""
    one_machine = of(mini, world_size=8).collective_seconds()
    assert one_machine == pytest.approx(32.511 * 7 / 8 / 337.5, rel=0.01)
    two = of(mini, world_size=16).collective_seconds()
    assert two == pytest.approx(32.511 * 15 / 16 / 337.5, rel=0.01)  # 32.511 / 2 / 320 between them is less
    shared = of(mini, world_size=64, expert_parallel_size=8).collective_seconds()
    assert shared == pytest.approx(32.511 * 7 / 8 / 320, rel=0.03)  # each machine still takes in all experts
    alone = of(mini, world_size=64, expert_parallel_size=64).collective_seconds()
    assert alone == pytest.approx(1.91 * 7 / 8 / 320, rel=0.4)  # experts stay where they are; the rest is latency
    copies = 8 * mini.row.positions * 2048 * 2 * 1.2  # of tokens to their experts
    there_and_back = of(mini, world_size=8, expert_parallel_size=8).all_to_all_seconds()
    assert there_and_back == pytest.approx(2 * 3 * 19 * copies * 7 / 8 / 337.5e9, rel=0.01)


def test_parts_add_up_and_accumulation_repeats_what_a_micro_batch_costs(mini):
    once, four = of(mini, world_size=16).step(), of(mini, accumulation=4, world_size=16).step()
    assert four.compute == pytest.approx(4 * once.compute)
    assert four.zero == pytest.approx(4 * once.zero)
    assert once.seconds == pytest.approx(sum(once))
    hidden, total = of(mini, world_size=16, zero_stage=1).zero_seconds()
    assert total == pytest.approx(2 * of(mini, world_size=16).collective_seconds())  # reduced once, gathered once
    assert 0 < hidden < total
    far = of(mini, world_size=16, offload_optimizer=True).step()
    assert far.host > 0 < once.hbm - far.hbm


def test_a_simpler_setup_is_preferred_if_it_is_hardly_slower(mini):
    plans = [scale.Plan.of(of(mini, world_size=8, rows=rows)) for rows in (1, 2, 4)]
    best = max(plans, key=lambda plan: plan.tokens_a_second)
    chosen = scale.recommend(plans)
    assert chosen.tokens_a_second * scale.SIMPLER >= best.tokens_a_second
    assert chosen.complexity <= best.complexity
    assert scale.recommend([]) is None


@pytest.mark.parametrize("name, gpus", [("mini", 8), ("mini", 64), ("flash", 32), ("flash", 256)])
def test_what_is_recommended_is_a_recipe_that_loads(name, gpus):
    """The overrides make the setup that was forecast, and it fits."""
    plan = scale.recommend(scale.plans(scale.Model.named(name).costs, gpus))
    recipe = load_recipe(ROOT / f"recipes/llada2_{name}/sft.yaml", [*scale.words(plan).split()])
    assert setup_of(recipe, deepspeed_config(recipe), gpus) == plan.setup
    assert recipe.gradient_accumulation_steps == plan.costs.accumulation
    assert plan.fits


@pytest.mark.slow
def test_scale_md_is_what_is_printed(capsys):
    assert scale.main([]) == 0
    assert capsys.readouterr().out in (ROOT / "benchmarks/SCALE.md").read_text()
