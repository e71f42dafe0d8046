"""How much of the policy gradient's variance comes from the tokens after an answer's EOS, which no reward sees.

    python -m benchmarks.rl_variance --model runs/quickstart

decodes groups of rollouts by recipes/quickstart/rl.yaml, gives each its reward and advantage, and takes the gradient of each
group with a signal at ratio 1, apart for three kinds of targets of the same views:

    answer    up to and including EOS, or the last token within max_new_tokens
    context   after it, committed by a forward before the last one that committed a token of the answer: the answer's
              later tokens saw it
    fill      after it and not before that: nothing that is rewarded depends on it, so its gradient is 0 on average

From the sums of kinds it prints the variance of a group's gradient (the trace of its covariance), the squared length of its
mean, unbiased, and their ratio: the groups that it takes until the gradient stands out from its noise.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dfactory.packing import PackedDocument, collate
from dfactory.recipe import Recipe, load_recipe
from dfactory.rl.actors import RolloutActor
from dfactory.rl.advantage import group_advantages
from dfactory.rl.prompts import PromptStream
from dfactory.rl.rewards.exact_match import exact_match
from dfactory.rl.rollouts import ScoredRollout
from dfactory.rl.rows import rollout_document
from dfactory.types import Rollout

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart" / "rl.yaml"
KINDS = ("answer", "context", "fill")
CHOICES = {"all": KINDS, "answer and context": KINDS[:2], "answer": KINDS[:1]}
AT_ONCE = 16  # groups decoded together


def kind_T(rollout: Rollout) -> np.ndarray:
    """The number of the kind of each position of prompt and response."""
    prompt, length, size = len(rollout.prompt_ids), len(rollout.output_ids), rollout.block_size
    step_T, is_answer_T = np.array(rollout.commit_step), np.arange(len(rollout.token_ids)) < length
    block_T = (prompt + np.arange(len(step_T))) // size
    in_last_T = is_answer_T & (block_T == block_T[length - 1])
    seen_T = (block_T == block_T[length - 1]) & (step_T < step_T[in_last_T].max())
    return np.concatenate([np.zeros(prompt, int), np.where(is_answer_T, 0, np.where(seen_T, 1, 2))])


def gradients(actor: RolloutActor, group: list[ScoredRollout], block_size: int) -> list[torch.Tensor]:
    """Of one group, by kind: the gradient of the mean of A sum(w log p) / length over its rollouts."""
    packed = [actor.rows.make_views(rollout_document(scored, block_size), scored.index) for scored in group]
    batch = collate([[PackedDocument(*one) for one in packed]], block_size)
    kinds = [torch.from_numpy(kind_T(scored.rollout)) for scored in group]
    position_N = batch.position_ids_RS.flatten()[batch.target_index_N]
    kind_N = torch.stack([kinds[d][p] for d, p in zip(batch.document_N, position_N, strict=True)])
    advantage_D = torch.tensor([scored.advantage for scored in group])
    weight_N = batch.elbo_weight_N * (advantage_D / batch.answer_length_D)[batch.document_N] / len(group)
    parameters = [p for p in actor.policy.parameters() if p.requires_grad]
    term_N = weight_N * actor.policy.score(batch).logprob_N
    found = []
    for kind in range(len(KINDS)):
        parts = torch.autograd.grad((term_N * (kind_N == kind)).sum(), parameters, retain_graph=True, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for g, p in zip(parts, parameters, strict=True)]
        found.append(torch.cat([part.flatten() for part in parts]))
    return found


def signal_groups(actor: RolloutActor, recipe: Recipe, count: int):
    """`count` groups whose rewards differ, with their advantages."""
    prompts, number = PromptStream(recipe), 0
    while count:
        for decoded in actor.generate([prompts.call(n) for n in range(number, number + AT_ONCE)]):
            fields = prompts.row(decoded.number).fields
            texts = [prompts.vocabulary.text(rollout.output_ids) for rollout in decoded.rollouts]
            completions = [[{"role": "assistant", "content": text}] for text in texts]
            rewards = exact_match(None, completions, answer=[fields["answer"]] * len(texts))
            scored = group_advantages(rewards, baseline=recipe.advantage_baseline, scale=recipe.scale_rewards)
            if scored.has_signal and count:
                count -= 1
                pairs = zip(decoded.rollouts, scored.advantage_G.tolist(), strict=True)
                yield [ScoredRollout(decoded.number, i, rollout, 0.0, a) for i, (rollout, a) in enumerate(pairs)]
        number += AT_ONCE


class Moments:
    """Of gradients: their number, sum and the sum of their squared lengths."""

    def __init__(self):
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def add(self, gradient: torch.Tensor) -> None:
        self.count, self.total = self.count + 1, self.total + gradient.double()
        self.squares += gradient.double().square().sum().item()

    @property
    def signal(self) -> float:
        """The squared length of the mean, unbiased: from products of different groups."""
        return (self.total.square().sum().item() - self.squares) / (self.count * (self.count - 1))

    @property
    def variance(self) -> float:
        return self.squares / self.count - self.signal


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a run or a model directory")
    parser.add_argument("--groups", type=int, default=200)
    parser.add_argument("overrides", nargs="*", help="key=value, of the RL recipe: policy_loss=ebpo")
    options = parser.parse_args(argv)
    recipe = load_recipe(RECIPE, [f"model_name_or_path={options.model}", "train_after_eos=true", *options.overrides])
    actor = RolloutActor(recipe, ".")
    moments = {name: Moments() for name in [*CHOICES, "fill alone", "context alone"]}
    for group in signal_groups(actor, recipe, options.groups):
        by_kind = dict(zip(KINDS, gradients(actor, group, recipe.block_size), strict=True))
        for name, kinds in CHOICES.items():
            moments[name].add(sum(by_kind[kind] for kind in kinds))
        for kind in KINDS[1:]:
            moments[f"{kind} alone"].add(by_kind[kind])
    table = Table("targets", "variance of a group's gradient", "squared mean", "variance / squared mean")
    for name, found in moments.items():
        ratio = f"{found.variance / found.signal:.4g}" if found.signal > 0 else "-"  # unbiased, so it may be below 0
        table.add_row(name, f"{found.variance:.4g}", f"{found.signal:.4g}", ratio)
    Console(width=110).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
