"""The controller with rollout actors that do not decode: order, staleness, restarts, and every prompt exactly once."""

import json
import os
import signal
from pathlib import Path

import pytest
import ray

from dfactory.errors import RolloutError
from dfactory.models.tiny import TINY_DIR
from dfactory.recipe import load_recipe
from dfactory.rl.controller import Controller
from dfactory.rl.liveness import this_process
from dfactory.rl.rollouts import DecodedGroup
from dfactory.rl.weights import WeightSet
from dfactory.types import FinishReason, Rollout

pytestmark = pytest.mark.slow

PROMPTS, BLOCK = 12, 8
REWARD = """
def by_index(prompts, completions, completion_ids, **columns):
    return [float(ids[0] % 2) for ids in completion_ids]

def never(prompts, completions, **columns):
    return [0.0] * len(prompts)

calls = []

def at_first(prompts, completions, completion_ids, **columns):
    calls.append(1)
    if len(calls) > 2:
        raise ValueError("the judge has gone")
    return [float(ids[0] % 2) for ids in completion_ids]
"""


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="error", log_to_driver=False)
    yield
    ray.shutdown()


class FakeRolloutActor:
    """Answers a group with one token a rollout: its noise id. Fails as its file of faults says, once each."""

    def __init__(self, faults: str):
        self.faults, self.version = Path(faults), -1

    def set_weights(self, weights):
        self.version = weights.version

    def process(self):
        return this_process()

    def generate(self, calls):
        for call in calls:
            fault = self.faults / str(call.number)
            if fault.exists():
                kind = fault.read_text()
                fault.unlink()
                os.kill(os.getpid(), signal.SIGKILL if kind == "die" else signal.SIGSTOP)
        return [
            DecodedGroup(call.number, self.version, [answer(call, n) for n in call.noise_ids], 0.0) for call in calls
        ]


def answer(call, noise: int) -> Rollout:
    """A token, committed in one forward with the fill to the end of its block."""
    ids = [1 + noise % 2] * (-len(call.prompt_ids) % BLOCK or BLOCK)
    one = [0] * len(ids)
    return Rollout(call.prompt_ids, ids, one, [0.0] * len(ids), one, [], BLOCK, [1], ids[:1], 1, FinishReason.EOS)


@pytest.fixture
def start(tmp_path):
    (tmp_path / "reward.py").write_text(REWARD)
    rows = [{"prompt": f"number {n}", "n": n} for n in range(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "faults").mkdir()
    controllers = []

    def make(*, reward="by_index", faults=(), actor_cpus=0, **keys):
        text = {
            "stage": "rl",
            "model_name_or_path": str(TINY_DIR),
            "dtype": "float32",
            "datasets": [{"path": "prompts.jsonl"}],
            "block_size": BLOCK,
            "max_length": 64,
            "decode": {"max_new_tokens": 16, "temperature": 1.0, "acceptance": "top"},
            "reward_funcs": [f"{tmp_path}/reward.py:{reward}"],
            "reward_workers": 1,
            "num_generations": 2,
            "prompts_per_step": 3,
            "rollout_timeout_s": 10,
            "max_steps": 4,
            "output_dir": str(tmp_path / "run"),
        }
        (tmp_path / "rl.yaml").write_text(json.dumps(text | keys))  # JSON is YAML
        for group, kind in dict(faults).items():
            (tmp_path / "faults" / str(group)).write_text(kind)
        folder = str(tmp_path / "faults")

        def make_actor(index):
            return ray.remote(FakeRolloutActor).options(num_cpus=actor_cpus).remote(folder)

        recipe = load_recipe(tmp_path / "rl.yaml")
        controller = ray.remote(Controller).options(num_cpus=0, max_concurrency=100).remote(recipe, make_actor)
        controllers.append(controller)
        return controller

    yield make
    for controller in controllers:
        ray.kill(controller)


def steps(controller, count: int, first: int = 0, next_group: int = 0):
    """Run `count` steps as a learner would -> their batches."""
    batches = []
    for version in range(first, first + count):
        ray.get(controller.publish.remote(WeightSet(version, [], 0, 0.0)))
        batch = ray.get(controller.next_batch.remote(version, next_group), timeout=120)
        next_group = batch.next_group
        batches.append(batch)
    return batches


def groups_of(batches) -> list[int]:
    return [number for batch in batches for number in dict.fromkeys(rollout.group for rollout in batch.rollouts)]


def test_steps_get_the_groups_in_order_with_fresh_weights(start):
    batches = steps(start(), 3)
    assert groups_of(batches) == list(range(9))
    assert [batch.metrics["staleness"] for batch in batches] == [0.0, 0.0, 0.0]
    assert batches[-1].epoch == pytest.approx(9 / PROMPTS)
    rewards = {(r.group, r.index): r.reward for batch in batches for r in batch.rollouts}
    assert len(rewards) == 18
    assert all(sum(r.advantage for r in batch.rollouts) == pytest.approx(0, abs=1e-6) for batch in batches)


def test_every_rank_gets_the_same_batch_whenever_it_asks(start):
    controller = start()
    batches = []
    for version in range(2):
        early = controller.next_batch.remote(version, 0)
        assert not ray.wait([early], timeout=0.5)[0]
        ray.get(controller.publish.remote(WeightSet(version, [], 0, 0.0)))
        late = controller.next_batch.remote(version, 0)
        one, other = ray.get([early, late], timeout=60)
        assert one == other
        batches.append(one)
    assert groups_of(batches) == list(range(6))


def test_a_resumed_run_goes_on_with_its_next_group(start):
    whole = steps(start(), 3)
    resumed = steps(start(), 1, first=2, next_group=whole[1].next_group)
    assert groups_of(resumed) == groups_of(whole[2:])
    assert resumed[0].rollouts == whole[2].rollouts


@pytest.mark.parametrize("kind", ["die", "stop"])
def test_a_lost_rollout_actor_is_replaced_and_no_prompt_is_lost_or_doubled(start, kind):
    controller = start(faults={1: kind, 4: kind}, num_rollout_workers=2)
    batches = steps(controller, 3)
    assert groups_of(batches) == list(range(9))
    assert ray.get(controller.faults.remote())["rollout_restarts"] >= 2


def test_asynchronous_rollouts_are_at_most_max_staleness_versions_old(start):
    batches = steps(start(max_staleness=2), 5)
    assert groups_of(batches) == list(range(15))
    assert max(batch.metrics["staleness"] for batch in batches) <= 2
    assert any(batch.metrics["staleness"] > 0 for batch in batches)


def test_rewards_that_never_differ_stop_the_run_with_what_to_look_at(start):
    controller = start(reward="never", max_steps_without_signal=2)
    with pytest.raises(
        ray.exceptions.RayTaskError, match=r"none of 6 groups had a signal.*completions\.jsonl"
    ) as caught:
        steps(controller, 1)
    assert isinstance(caught.value.cause, RolloutError)


def test_rewards_that_fail_from_a_group_on_stop_the_run_within_the_step_and_are_quoted(start):
    """The step has groups with a signal already, and would wait for the last one for ever."""
    controller = start(reward="at_first", max_steps_without_signal=2)
    with pytest.raises(ray.exceptions.RayTaskError, match=r"none of 6 groups had a signal.*the judge has gone"):
        steps(controller, 1)


def test_a_rollout_actor_that_finds_no_place_is_named(start):
    controller = start(actor_cpus=1000, cluster_timeout_s=1, max_rollout_attempts=2)
    with pytest.raises(ray.exceptions.RayTaskError, match="rollout actor 0 did not start: no answer in time") as caught:
        steps(controller, 1)
    assert isinstance(caught.value.cause, RolloutError)


def test_groups_are_written_down_in_order(start, tmp_path):
    batches = steps(start(), 2)
    lines = [json.loads(line) for line in (tmp_path / "run" / "groups.jsonl").read_text().splitlines()]
    assert [(line["step"], line["groups"]) for line in lines] == [(1, [0, 1, 2]), (2, [3, 4, 5])]
    assert [number for line in lines for number in line["trained"]] == groups_of(batches)
