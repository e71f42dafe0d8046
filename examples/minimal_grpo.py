"""Reinforcement learning of a block-diffusion model in one file of plain torch: GRPO on the decoder's own steps.

    python examples/minimal_sft.py --output runs/minimal_sft     # first: the model that it starts from
    python examples/minimal_grpo.py --model runs/minimal_sft

`dfactory train recipes/quickstart/rl.yaml` does this on Ray with rollout actors; here it is one process. Decode a group of
answers to each prompt, reward them, and make the better ones of a group more likely, step by step as they were decoded.
"""

import argparse
import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import torch

import dfactory
from dfactory.decoding.keys import DecodeKeys
from dfactory.noise.trace import every_transition
from dfactory.packing import PackedDocument, collate
from dfactory.rl.advantage import group_advantages
from dfactory.types import AlignedDocument, Rollout, ViewBatch
from dfactory.vocabulary import Vocabulary, read_vocabulary

PROMPTS = "recipes/quickstart/data/preferred_train.jsonl"
BLOCK_SIZE = 16
RULES = DecodeKeys(block_size=BLOCK_SIZE, max_new_tokens=32, threshold=0.9, temperature=1.0, acceptance="top")
EPSILON = 0.2  # how far a token's probability may move from that of the policy that decoded it


def read_prompts(vocabulary: Vocabulary) -> list[tuple[list[int], str]]:
    """(prompt ids, the right answer) of each row."""
    rows = [json.loads(line) for line in Path(PROMPTS).read_text().splitlines()]
    return [
        (vocabulary.encoder.encode_prompt([m for m in row["messages"] if m["role"] == "user"]), row["answer"])
        for row in rows
    ]


def document_of(rollout: Rollout, number: int) -> AlignedDocument:
    """The rollout as training sees it: its tokens, and at which forward of its block each of them was committed."""
    ids_T = np.array([*rollout.prompt_ids, *rollout.token_ids], np.int32)
    prompt = len(rollout.prompt_ids)
    steps_T = np.full(len(ids_T), -1, np.int16)
    steps_T[prompt:] = rollout.step_in_block
    answer_end = prompt + len(rollout.output_ids)  # after EOS
    return AlignedDocument(number, ids_T, np.arange(len(ids_T)) >= prompt, BLOCK_SIZE, steps_T, answer_end)


def make_batch(rollouts: list[Rollout], mask_id: int) -> ViewBatch:
    """A row for each rollout: its clean stream, and a view for each forward of the decoder.

    View j shows what stood in every block before its forward j; its targets are the tokens that this forward committed. So
    the log-probabilities of a rollout's targets add up to the log-likelihood of the way in which it was decoded, exactly.
    """
    documents = [document_of(rollout, number) for number, rollout in enumerate(rollouts)]
    rows = [[PackedDocument(document, every_transition(document, 1, mask_id))] for document in documents]
    return collate(rows, BLOCK_SIZE)


def loss_of(policy: dfactory.Policy, batch: ViewBatch, old_logprob_N, advantage_D) -> torch.Tensor:
    """PPO's clipped surrogate: the mean over the tokens of each answer, then over answers.

    A ratio beyond 1 +- EPSILON in the direction that its advantage asks for has no gradient left. What the decoder put after
    EOS to the end of the block is not trained on: no reward sees it.
    """
    advantage_N = advantage_D[batch.document_N]
    ratio_N = (policy(batch).logprob_N - old_logprob_N).exp()
    clipped_N = ratio_N.clamp(1 - EPSILON, 1 + EPSILON)
    gain_N = torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N) * batch.real_N
    return -(batch.sum_by_document(gain_N) / batch.answer_length_D).mean()


def roll_out(policy: dfactory.Policy, vocabulary: Vocabulary, chosen, group_size: int, seed: int):
    """Decode a group of answers to each prompt -> the rollouts that can teach something, their advantages, the mean reward.

    The reward is 1 for the exact answer. An advantage is the reward less the group's mean, over its standard deviation:
    a group whose rewards are all equal says nothing and is left out.
    """
    prompts = [ids for ids, _ in chosen for _ in range(group_size)]
    rules = vocabulary.rules(dataclasses.replace(RULES, seed=seed))
    decoded = dfactory.decode(policy.eval(), prompts, rules)
    rollouts, advantages, rewards = [], [], []
    for number, (_, right) in enumerate(chosen):
        group = decoded[number * group_size : (number + 1) * group_size]
        reward_G = [float(vocabulary.text(rollout.output_ids).strip() == right) for rollout in group]
        rewards += reward_G
        advantage = group_advantages(reward_G)
        if advantage.has_signal:
            rollouts += group
            advantages += advantage.advantage_G.tolist()
    return rollouts, torch.tensor(advantages), sum(rewards) / len(rewards)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="a model directory or run (default: the embedded base)")
    parser.add_argument("--steps", type=int, default=45, help="(default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=32, help="a step (default: %(default)s)")
    parser.add_argument("--group-size", type=int, default=8, help="answers to a prompt (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=1, help="updates on the same rollouts (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="(default: %(default)s)")
    options = parser.parse_args(arguments)

    policy = dfactory.load_policy(options.model, dtype="float32")
    vocabulary = read_vocabulary(options.model, mask_token_id=None, eos_token_id=None)
    prompts, order = read_prompts(vocabulary), random.Random(options.seed)
    optimizer = torch.optim.AdamW(policy.parameters(), options.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(options.steps):
        chosen = order.sample(prompts, options.prompts)
        seed = options.seed + step
        rollouts, advantage_D, reward = roll_out(policy, vocabulary, chosen, options.group_size, seed)
        print(f"step {step + 1}  reward {reward:.3f}  rollouts with a signal {len(rollouts)}")
        if not rollouts:
            continue
        batch = make_batch(rollouts, vocabulary.special.mask)
        with torch.no_grad():
            old_logprob_N = policy(batch).logprob_N  # the policy that decoded: at the first update every ratio is 1
        for _ in range(options.iterations):
            loss = loss_of(policy, batch, old_logprob_N, advantage_D)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
