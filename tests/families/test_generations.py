"""The samplers of the field: with the keys that docs/decoding.md lists, decoding writes what the original sampler wrote,
token for token, at the same forwards.

Two differences are meant. A response ends after the block that holds EOS, where some originals decode on: their output is
compared up to that block, and `forwards` are fewer. And calls of the original that only fill a cache are no forwards here.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from dfactory.decoding import DecodeKeys, DecodeRules, decode
from dfactory.decoding.decoder import make_decoder
from dfactory.decoding.response import document_length
from dfactory.decoding.rules.base import CHANCE, Forward
from dfactory.decoding.rules.timed import Timed
from dfactory.types import NEVER, Rollout
from tests.families.cases import FAMILIES_WITH_GOLDENS, golden, policy_of


class Sampler(NamedTuple):
    """How the settings of an original sampler are said here."""

    keys: Callable[[dict], dict]
    canvas: bool = True  # full attention


def llada(case: dict) -> dict:
    blocks = case["gen_length"] // case["block_length"]
    keys = {"steps": case["steps"] // blocks, "threshold": 1.0, "cfg_scale": case.get("cfg_scale", 0.0)}
    if case.get("logits_eos_inf"):
        keys["min_new_tokens"] = case["gen_length"]
    if case.get("confidence_eos_eot_inf"):
        keys |= {"defer_eos": True, "stop_token_ids": [case["eot_token_id"]]}
    return keys | {"block_size": case["block_length"], "max_new_tokens": case["gen_length"]}


def fast_dllm(case: dict) -> dict:
    return {
        "threshold": case["threshold"],
        "block_size": case["block_length"],
        "max_new_tokens": case["gen_length"],
    }


ORDERS = {"maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "entropy", "origin": "random"}


def dream(case: dict) -> dict:
    return {
        "rule": "timed",
        "time_order": ORDERS[case["alg"]],
        "time_steps": case["steps"],
        "time_end": case["eps"],
        "max_new_tokens": case["max_new_tokens"],
    }


def sdar(case: dict) -> dict:
    size, steps = case["block_length"], case["denoising_steps"]
    rules = {
        "low_confidence_static": {"threshold": 1.0, "steps": steps, "step_schedule": "block"},
        "low_confidence_dynamic": {"threshold": case["threshold"], "steps": steps, "step_schedule": "block"},
        "sequential": {"rule": "left_to_right", "tokens_per_step": size // steps},
    }
    stops = {"eos_token_id": case["stop_ids"][-1], "stop_token_ids": case["stop_ids"][:-1]} if case["stop_ids"] else {}
    return rules[case["remasking_strategy"]] | stops | {"block_size": size, "max_new_tokens": case["gen_length"]}


def dllm(case: dict) -> dict:
    blocks = -(-case["max_new_tokens"] // case["block_size"])
    return {
        "threshold": 1.0,
        "steps": -(-case["steps"] // blocks),
        "step_schedule": "rounded",
        "block_size": case["block_size"],
        "max_new_tokens": case["max_new_tokens"],
    }


def bd3lm(case: dict) -> dict:
    return dllm(case) | {"blocks_from": "prompt"}


SAMPLERS = {
    "LLaDA generate.py": Sampler(llada),
    "Fast-dLLM v1": Sampler(fast_dllm),
    "diffusion_generate": Sampler(dream),
    "SDAR": Sampler(sdar, canvas=False),
    "dllm MDLMSampler": Sampler(dllm),
    "dllm BD3LMSampler": Sampler(bd3lm, canvas=False),
}


def sampler_of(case: dict) -> Sampler | None:
    return next((sampler for name, sampler in SAMPLERS.items() if case["sampler"].startswith(name)), None)


def cases_of(family: str) -> list[dict]:
    special = {name: id for name, id in golden(family).expected.items() if name.endswith("_token_id")}
    return [special | case for case in golden(family).expected["generations"] if sampler_of(case)]


ALL = [
    pytest.param(family, case, id=f"{family}-{case['name']}")
    for family in FAMILIES_WITH_GOLDENS
    for case in cases_of(family)
]
ALONE = [param for param in ALL if param.values[1]["name"] not in ("left_padded_batch", "origin_seeded")]


def rules_of(family: str, case: dict, **keys) -> DecodeRules:
    special = {name: case[name] for name in ("mask_token_id", "eos_token_id")}
    keys = DecodeKeys(**({"suppress_special": False} | special | sampler_of(case).keys(case) | keys))
    return DecodeRules.of(keys.in_blocks_of(None), canvas=sampler_of(case).canvas)


class Expected(NamedTuple):
    token_ids: list[int]
    commit_step: list[int]
    forwards: int


def expected_of(case: dict, rules: DecodeRules) -> Expected:
    """What the original wrote, to the end of the block that holds the first token that ends the response."""
    output, step, forwards = case["output"], case["commit_step"], case["forwards"]
    if any(name.startswith("forwards_with") for name in case):  # calls that fill a cache are counted there
        made = sorted(set(step) - {NEVER})
        assert len(made) == forwards
        step = [NEVER if s == NEVER else made.index(s) for s in step]
    end = next((i for i, token in enumerate(output) if token in rules.end_ids), len(output) - 1)
    origin = 0 if rules.canvas or rules.blocks_from_prompt else -len(case["prompt"])
    stop = min(origin + ((end - origin) // rules.block_size + 1) * rules.block_size, len(output))
    if stop < len(output) and NEVER not in step:
        forwards = max(step[:stop]) + 1
        assert forwards < case["forwards"]
    return Expected(output[:stop], step[:stop], forwards)


def found_in(rollout: Rollout) -> Expected:
    return Expected(rollout.token_ids, rollout.commit_step, rollout.forwards)


@pytest.mark.parametrize("family, case", ALONE)
def test_the_original_sampler_token_for_token(family, case):
    rules = rules_of(family, case)
    (rollout,) = decode(policy_of(family), [case["prompt"]], rules)
    assert found_in(rollout) == expected_of(case, rules)
    if case.get("stop_ids"):
        assert rollout.output_ids == case["output_to_stop"]


@pytest.mark.parametrize("family, case", [p for p in ALL if p.values[1]["name"] == "left_padded_batch"])
def test_prompts_of_unequal_length_stand_alone(family, case):
    """The originals pad a batch on the left. Here each prompt is decoded as if alone, and rotary positions only know
    distances, so both write the same."""
    rollouts = decode(policy_of(family), case["prompt"], rules_of(family, case))
    for rollout, output in zip(rollouts, case["output"], strict=True):
        assert rollout.token_ids == output[: len(rollout.token_ids)]
        assert len(rollout.token_ids) == len(output) or rollout.finish_reason == "eos"


@dataclasses.dataclass(frozen=True)
class Replayed(Timed):
    """The rule with the random numbers of the original's run."""

    chances: tuple[tuple[float, ...], ...] = ()

    def commit(self, forward: Forward) -> torch.Tensor:
        chance_RB = torch.ones(forward.masked_RB.shape)
        chance_RB[forward.masked_RB] = torch.tensor(self.chances[int(forward.step_R)])
        return super().commit(dataclasses.replace(forward, columns={CHANCE.name: chance_RB}))


@pytest.mark.parametrize("family, case", [p for p in ALL if p.values[1]["name"] == "origin_seeded"])
def test_masks_that_move_by_chance(family, case):
    """The original draws a number for every mask at every step."""
    rules = rules_of(family, case)
    torch.manual_seed(case["torch_seed"])
    step = torch.tensor(case["commit_step"])
    chances = tuple(tuple(torch.rand(int((step >= now).sum())).tolist()) for now in range(case["steps"]))
    rule = Replayed(**dataclasses.asdict(rules.rule), chances=chances)
    (rollout,) = decode(policy_of(family), [case["prompt"]], dataclasses.replace(rules, rule=rule))
    assert found_in(rollout) == expected_of(case, rules)


@pytest.mark.parametrize("family", [family for family in FAMILIES_WITH_GOLDENS if cases_of(family)])
def test_a_batch_of_all_cases_equals_each_alone(family):
    """Prompts, rules and answers of different lengths in one decoder, slots freed and taken again."""
    alike: dict[tuple, list] = {}
    for case in cases_of(family):
        if case["name"] not in ("left_padded_batch", "origin_seeded"):
            rules = rules_of(family, case)
            alike.setdefault((rules.canvas, rules.block_size), []).append((case, rules))
    for cases in alike.values():
        longest = max(document_length(len(case["prompt"]), rules) for case, rules in cases)
        decoder = make_decoder(policy_of(family), cases[0][1], 3, longest)
        waiting, found = list(enumerate(cases)), {}
        while waiting or decoder.live:
            while waiting and decoder.free:
                index, (case, rules) = waiting.pop(0)
                decoder.add(index, case["prompt"], rules)
            found |= {progress.prompt: progress.rollout for progress in decoder.step() if progress.rollout}
        for index, (case, rules) in enumerate(cases):
            assert found_in(found[index]) == expected_of(case, rules), case["name"]
