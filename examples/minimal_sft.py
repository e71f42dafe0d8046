"""SFT of a block-diffusion model in one file of plain torch: read it once and you know the method.

    python examples/minimal_sft.py --steps 20           # a look, in seconds: the embedded model, the quickstart's records
    python examples/minimal_sft.py --output runs/minimal_sft

It trains on the views of `dfactory train recipes/quickstart/sft.yaml`: a complementary pair for each document, mask ratios
from 0.3 to 0.9. What it leaves out: DeepSpeed, rows of several documents, resuming, several processes.
"""

import argparse
import random
from pathlib import Path

import torch

import dfactory
from dfactory.config.data import DatasetKeys
from dfactory.data.examples import Examples, load_examples
from dfactory.decoding.keys import DecodeKeys
from dfactory.models.saving import save_policy
from dfactory.noise import RandomMask
from dfactory.packing import PackedDocument, align, collate
from dfactory.types import Example, ViewBatch
from dfactory.vocabulary import Vocabulary, read_vocabulary

TRAIN = "recipes/quickstart/data/train.jsonl"
HELD_OUT = "recipes/quickstart/data/heldout.jsonl"
BLOCK_SIZE = 16  # tokens that are denoised together
MAX_LENGTH = 64  # tokens of a record


def read(file: str, vocabulary: Vocabulary) -> Examples:
    """Records as token ids, each with a flag a token: whether the model has to produce it."""
    return load_examples(
        [DatasetKeys(file)],
        vocabulary.encoder,
        max_length=MAX_LENGTH,
        overlong="truncate",
        on_bad_row="error",
        max_bad_fraction=0.0,
        eos_id=vocabulary.special.eos,
        vocab_size=vocabulary.size,
        mask_id=vocabulary.special.mask,
        block_size=BLOCK_SIZE,
    )


def make_batch(examples: list[Example], step: int, views: RandomMask, eos_id: int) -> ViewBatch:
    """One document a row: `[ clean stream | view 1 | view 2 ]`.

    The clean stream is the document as it is. A view holds the blocks of the response once more, some of their tokens
    replaced by the mask; view 2 masks exactly those that view 1 shows. A view's block sees the clean blocks before it and
    itself (dfactory/visibility.py), which is what a decoder has at hand when it fills that block.
    """
    rows = []
    for example in examples:
        document = align(example, BLOCK_SIZE, eos_id)  # filled with EOS to whole blocks
        rows.append([PackedDocument(document, views(document, step))])
    return collate(rows, BLOCK_SIZE)


def loss_of(policy: dfactory.Policy, batch: ViewBatch) -> torch.Tensor:
    """The mean of -log p(token | its view) over the masked positions.

    The model returns scores of targets and no logits: the vocabulary's 2,048 (or 157,184) columns never leave the head.
    """
    scores = policy(batch)
    return -scores.logprob_N.mean()


def train(policy: dfactory.Policy, vocabulary: Vocabulary, options: argparse.Namespace) -> None:
    examples = read(TRAIN, vocabulary)
    views = RandomMask(vocabulary.special.mask, seed=options.seed, low=0.3, high=0.9, complementary=True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * (1 - step / options.steps)
    )
    order = random.Random(options.seed)
    for step in range(options.steps):
        chosen = [examples[order.randrange(len(examples))] for _ in range(options.batch_size)]
        batch = make_batch(chosen, step, views, vocabulary.special.eos)
        loss = loss_of(policy, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == options.steps - 1:
            print(f"step {step + 1}  loss {loss.item():.4f}  targets {batch.num_targets}")


def evaluate(policy: dfactory.Policy, vocabulary: Vocabulary, count: int) -> None:
    """Answer held-out prompts block by block: every forward fills the masked positions whose probability passes 0.9, at
    least one of them."""
    prompts, answers = [], []
    held_out = read(HELD_OUT, vocabulary)
    for number in range(min(count, len(held_out))):
        example = held_out[number]
        start = int(example.trainable_T.argmax())
        prompts.append(example.input_ids_T[:start].tolist())
        answers.append(example.input_ids_T[start:].tolist())
    rules = vocabulary.rules(DecodeKeys(block_size=BLOCK_SIZE, max_new_tokens=32, threshold=0.9))
    rollouts = dfactory.decode(policy.eval(), prompts, rules)
    right = sum(rollout.output_ids == answer for rollout, answer in zip(rollouts, answers, strict=True))
    tokens = sum(len(rollout.output_ids) for rollout in rollouts) / sum(rollout.forwards for rollout in rollouts)
    print(f"{len(prompts)} held-out prompts: {right / len(prompts):.1%} exact, {tokens:.2f} tokens a forward")
    print(f"{vocabulary.text(prompts[0])!r} -> {vocabulary.text(rollouts[0].output_ids)!r}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="a model directory (default: the embedded one)")
    parser.add_argument("--steps", type=int, default=800, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="documents a step (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=200, help="held-out ones (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of noise and order (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="save the model into this new folder")
    options = parser.parse_args(arguments)

    policy = dfactory.load_policy(options.model, dtype="float32")
    vocabulary = read_vocabulary(options.model, mask_token_id=None, eos_token_id=None)
    train(policy, vocabulary, options)
    evaluate(policy, vocabulary, options.questions)
    if options.output:
        options.output.mkdir(parents=True)
        save_policy(policy, options.output, block_size=BLOCK_SIZE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
