"""The autoregressive yardstick of a converted model: the same weights, fine-tuned and decoded by transformers.

    dfactory bench ar train recipes/smollm2/cpt.yaml --model AR --output runs/ar      # on the recipe's own records
    dfactory bench ar score --model runs/ar --data heldout.jsonl --elbo elbo.jsonl    # exact log-likelihood
    dfactory bench ar answer --model runs/ar --data heldout.jsonl --output a.jsonl    # greedy, exact match
    dfactory bench ar speed --ar runs/ar --diffusion runs/cap --data heldout.jsonl --output speed.jsonl

**train** takes a recipe of dfactory and trains next-token prediction instead. A step has the records of the recipe's step:
the same documents in the same order and mixture, so equal steps see equal response tokens. The loss is the mean over the
step's response tokens, EOS included and prompts excluded. Learning rate, warmup, schedule, decay, betas, clipping and seed
are the recipe's; weights are fp32, products bf16 where `dtype` is bfloat16 (autocast). `--positions N` ends the run at N
response tokens instead of the recipe's steps. Texts of about one length make a micro-batch; padding stands on the right.
A run that was stopped goes on from its last save; one that is complete is not repeated.

**score** gives the exact log-likelihood of every response token in fp32: the positions that `dfactory eval --elbo-pairs`
counts as response tokens, EOS included. `--elbo` takes the output of that command, refuses it where it counts other
tokens, and adds the bound and its gap. The ELBO also holds the EOS fill of the last block and is divided by the response
tokens alone, so the gap includes the fill's price.

**answer** decodes greedily with a cache, left padded, in batches of prompts of about one length. Right is what
`dfactory eval` calls right, with the same `--answer-pattern`. Lines are written batch by batch; what is there already is
not decoded again.

**speed** compares tokens per second with dfactory's decoder on diffusion weights: `dfactory bench ar speed --help`.
"""

import argparse
import sys

from benchmarks import ar_answers, ar_scores, ar_speed, ar_training
from dfactory.errors import DFactoryError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="train | score | answer | speed")
    for part in (ar_training, ar_scores, ar_answers, ar_speed):
        part.add_parser(commands)
    options, options.overrides = parser.parse_known_args(arguments)
    with_keys = options.run in (ar_training.train, ar_speed.speed)
    keys = with_keys and all("=" in word and word[0] != "-" for word in options.overrides)
    if options.overrides and not keys:
        parser.error(f"unrecognized arguments: {' '.join(options.overrides)}")
    try:
        return options.run(options)
    except DFactoryError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_status


if __name__ == "__main__":
    sys.exit(main())
