"""Sanity checks: they warn about or stop runs that would end with status 0 without having learnt anything.

    first loss   weights were read, and know no more than guessing       first_loss_check: a warning, or the end
    trained      steps with a learning rate changed no parameter         the end
    targets      window after window holds nothing to predict            the end
    EOS          no answer ends, or the model does not learn to end one  a warning
    decoder      rollouts come from another distribution                 a warning
    experts      some are never routed to (experts_unused)               a warning

Rollouts whose rewards are all equal end a run in rl/controller.py, numbers that are not finite in nonfinite.py.
"""

import functools
import math
from collections.abc import Callable
from typing import Protocol

import torch
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus

from dfactory import distributed
from dfactory.errors import SilentFailureError
from dfactory.models.policy import Policy
from dfactory.models.registry import is_unconverted
from dfactory.recipe import Recipe
from dfactory.types import Mean, TokenScores, ViewBatch

GUESSING = 0.95  # of log V: a first loss above this is that of random weights
STEPS_TO_CHANGE = {
    "float32": 1,
    "bfloat16": 10,
}  # applied steps; bfloat16 rounds small ones away, its fp32 copy adds them up
WINDOWS_WITHOUT_TARGETS = 10
EOS_STEPS = 100  # steps between checks of EOS; also at the end
FAR_DECODER = 0.05  # mean of |p / recorded p - 1| of rollouts; below, the weights are close to 1
VISITS = 50  # tokens that an expert gets by chance; with fewer, an unused expert is no evidence


class Watched(Protocol):
    """The part of the engine's Trainer that the checks need."""

    policy: Policy
    watch: Callable[[ViewBatch, TokenScores], dict[str, Mean]]


class SanityChecks:
    """Runs on all ranks, with metrics that are equal on all. Make it after a checkpoint is loaded."""

    def __init__(self, recipe: Recipe, trainer: Watched, *, eos_id: int, vocab_size: int):
        self.recipe, self.trainer, self.vocab_size = recipe, trainer, vocab_size
        self.first = self.rate_was_zero = True
        self.before: list[int] | None = fingerprint(trainer.policy)
        self.steps_without_change = self.windows_without_targets = self.steps = 0
        self.decoder_is_near = True
        self.eos_targets = self.eos_hits = False  # whether there were any since the last check
        self.experts = ExpertCoverage(trainer.policy)
        trainer.watch = functools.partial(watch_eos, eos_id)

    def check(self, step: int, metrics: dict[str, float], last: bool) -> tuple[dict[str, float], list[str]]:
        """What to log and what to warn about, after optimiser step `step`.

        Raises SilentFailureError, on all ranks.
        """
        self.steps += 1
        self._check_targets(step, metrics)
        self._check_change(step, metrics)
        warnings = self._check_first_loss(step, metrics) + self._check_eos(step, metrics, last)
        warnings += self._check_decoder(step, metrics)
        self.rate_was_zero &= metrics["learning_rate"] == 0
        if last and self.rate_was_zero:
            warnings.append(f"no step up to {step} had a learning rate above 0: nothing was trained; see warmup_steps")
        every = self.recipe.expert_coverage_steps
        if not self.experts.seen or not every or not (last or self.steps % every == 0):
            return {}, warnings
        found, messages = self.experts.take(step)
        return found, warnings + messages

    def _check_first_loss(self, step: int, metrics: dict[str, float]) -> list[str]:
        """Check the first loss of this process."""
        if not self.first or "token_nll" not in metrics:
            return []
        self.first = False
        guess, loss = math.log(self.vocab_size), metrics["token_nll"]
        check = self.recipe.first_loss_check
        if self.recipe.init_weights == "random" or check == "off" or loss < GUESSING * guess:
            return []
        source = self.trainer.policy.source_dir
        if source is not None and is_unconverted(
            source
        ):  # it has never seen a mask: its first guesses are worse than none
            return []
        problem = (
            f"token_nll {loss:.2f} at step {step}, the first one on weights that were read from "
            f"{self.recipe.model_name_or_path}: guessing has log {self.vocab_size} = {guess:.2f}. Either the chat template "
            "is new to the model, as it is to the quickstart's, or these are not the weights of this config.json, tokenizer "
            "and mask token"
        )
        if check == "stop":
            raise SilentFailureError(f"{problem}; first_loss_check is stop: set it to warn to go on all the same")
        return [problem]

    def _check_decoder(self, step: int, metrics: dict[str, float]) -> list[str]:
        """Warn once."""
        gap = metrics.get("decoder_gap", 0.0)
        if not self.decoder_is_near or gap <= FAR_DECODER:
            return []
        self.decoder_is_near = False
        return [
            f"decoder_gap {gap:.3g} at step {step}, above {FAR_DECODER:g}: the decoder draws from another distribution than "
            "the learner trains. At decode.temperature 1.0 the model gives special tokens that much probability, which "
            "decode.suppress_special takes away. policy_loss trace corrects it by weights up to importance_cap, ELBO views "
            "do not: train the model on answers without such tokens first"
        ]

    def _check_change(self, step: int, metrics: dict[str, float]) -> None:
        trains = metrics["learning_rate"] > 0 and metrics["targets"] > 0 and math.isfinite(metrics["grad_norm"])
        if not self.before or not trains:
            return
        if distributed.any_rank(fingerprint(self.trainer.policy) != self.before):
            self.before = None  # shown: not checked again
            return
        self.steps_without_change += 1
        if self.steps_without_change >= STEPS_TO_CHANGE[self.recipe.dtype]:
            raise SilentFailureError(
                f"step {step} changed no parameter on any rank, with learning_rate {metrics['learning_rate']:.3g} and "
                f"grad_norm {metrics['grad_norm']:.3g}: nothing is trained. Is anything trainable, is the rate too small "
                f"for dtype {self.recipe.dtype}, does the loss depend on the model?"
            )

    def _check_targets(self, step: int, metrics: dict[str, float]) -> None:
        self.windows_without_targets = 0 if metrics["targets"] else self.windows_without_targets + 1
        if self.windows_without_targets >= WINDOWS_WITHOUT_TARGETS:
            raise SilentFailureError(
                f"the windows of the last {self.windows_without_targets} steps up to {step} held not one target on any "
                "rank: nothing is learnt. Raise noise_range_low and noise_range_high, or the rows of a window, or look at "
                "the records with `dfactory check`"
            )

    def _check_eos(self, step: int, metrics: dict[str, float], last: bool) -> list[str]:
        self.eos_targets |= "eos_hit_rate" in metrics
        self.eos_hits |= metrics.get("eos_hit_rate", 0.0) > 0
        if not (last or self.steps % EOS_STEPS == 0):
            return []
        targets, hits, self.eos_targets, self.eos_hits = self.eos_targets, self.eos_hits, False, False
        if hits:
            return []
        steps = f"in the {(self.steps - 1) % EOS_STEPS + 1} steps up to {step}"
        if not targets:
            return [
                f"EOS was never to be predicted {steps}: answers do not end, and so the model's will not; see eos_token_id"
            ]
        return [f"EOS was never the most probable token where it was to be predicted {steps}: answers will not end"]


def watch_eos(eos_id: int, batch: ViewBatch, scores: TokenScores) -> dict[str, Mean]:
    """Accuracy at the EOS that end an answer, without the fill after them, which is easy."""
    eos_N = (batch.target_ids_N == eos_id) & batch.real_N
    return {"eos_hit_rate": Mean((scores.hit_N & eos_N).sum(), eos_N.sum())}


@torch.no_grad()
def fingerprint(policy: Policy) -> list[int]:
    """A hash of each trainable parameter in memory; of this rank's shard if it is sharded."""
    shards = [getattr(p, "ds_tensor", p) for p in policy.parameters() if p.requires_grad]
    there = [s for s in shards if getattr(s, "status", None) is not PartitionedParamStatus.NOT_AVAILABLE and s.numel()]
    return torch.stack([torch.hash_tensor(shard.detach()) for shard in there]).tolist() if there else []


class ExpertCoverage:
    """Which experts of each layer were routed to in training. Layers that AutoEP has replaced are not seen."""

    def __init__(self, policy: Policy):
        blocks = policy.family.moe_blocks
        self.seen: dict[str, torch.Tensor] = {}  # by layer, bool [experts]
        self.choices: dict[str, int] = {}  # by layer: choices of an expert by a token; the last layer has fewer tokens
        for name, module in policy.named_modules():
            if type(module).__name__ in blocks:
                self.seen[name] = torch.zeros(module.experts.num_experts, dtype=torch.bool)
                self.choices[name] = 0
                module.experts.register_forward_pre_hook(functools.partial(self._note, name))

    def _note(self, name: str, experts: torch.nn.Module, arguments: tuple) -> None:
        if experts.training:
            chosen = arguments[1].flatten()
            self.seen[name] = self.seen[name].to(chosen.device)
            self.seen[name][chosen] = True  # no count, which would make the host wait for the device
            self.choices[name] += chosen.numel()

    def take(self, step: int) -> tuple[dict[str, float], list[str]]:
        """The share of experts that no token was routed to since the last call, on any rank, and a warning with their
        names."""
        choices = torch.tensor([float(count) for count in self.choices.values()], dtype=torch.float64)
        table = torch.cat([choices, *(seen.cpu().double() for seen in self.seen.values())])
        distributed.all_reduce_sum(table)
        choices, visits = table[: len(choices)], table[len(choices) :].split([len(s) for s in self.seen.values()])
        experts, unused, never = 0, 0, []
        for name, count, visits_E in zip(self.seen, choices.tolist(), visits, strict=True):
            missing = (visits_E == 0).nonzero().flatten().tolist()
            experts, unused = experts + len(visits_E), unused + len(missing)
            if count >= VISITS * len(visits_E):
                never += [f"{name} expert {expert}" for expert in missing]
        self.seen = {name: torch.zeros_like(seen) for name, seen in self.seen.items()}
        self.choices = dict.fromkeys(self.choices, 0)
        messages = []
        if never:
            messages = [
                f"{len(never)} of {experts} experts were never routed to in the steps up to {step}: "
                f"{', '.join(never[:4])}{', ...' if len(never) > 4 else ''}; were their weights and the router's loaded?"
            ]
        return {"experts_unused": unused / experts}, messages
