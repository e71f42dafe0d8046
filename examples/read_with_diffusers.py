"""An exported model in diffusers: LLaDA2Pipeline with its BlockRefinementScheduler.

    dfactory export --model runs/mine --output mine/
    python examples/read_with_diffusers.py --model mine/ --prompt "Once upon a time"

diffusers brings the sampler; the model is dFactory's, by the class below, for every family that is decoded in blocks. Where
the original code lies beside the weights, AutoModelForCausalLM with `trust_remote_code=True` takes its place, in a process
that does not import dFactory (docs/readers.md). The scheduler commits what exceeds the threshold, or else its share of it.
With as many steps as a block has tokens that is one token, as with dFactory's `threshold` rule, and the tokens are equal to
those of `decode.suppress_special=false`: the pipeline does not keep special tokens back.
"""

import argparse
import json
from types import SimpleNamespace

import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline

import dfactory
from dfactory.types import PADDING, Place


class BlockCausalModel(torch.nn.Module):
    """A dFactory policy, called as transformers' models are: a token sees the blocks before its own, and its own."""

    def __init__(self, policy: dfactory.Policy, block_size: int):
        super().__init__()
        self.policy, self.block_size = policy, block_size
        self.device, self.dtype = policy.device, torch.float32

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor
    ) -> SimpleNamespace:
        """ids, 1 for tokens and 0 for padding, positions: all [R, S] -> an object with `logits` [R, S, V]."""
        row = torch.arange(len(input_ids), device=input_ids.device)[:, None].expand_as(input_ids)
        document = torch.where(attention_mask > 0, row, PADDING)
        place = Place(document, torch.zeros_like(row), position_ids // self.block_size, document)
        index = torch.arange(input_ids.numel(), device=input_ids.device)
        from_ = self.policy.predicting(index, position_ids)  # itself, or with shifted logits its left neighbour
        hidden = self.policy.hidden(input_ids, position_ids, self.policy.plan(place)).flatten(0, 1)[from_]
        return SimpleNamespace(logits=self.policy.logits(hidden).unflatten(0, input_ids.shape))


def pipeline_of(model: str) -> tuple[LLaDA2Pipeline, dfactory.Pipeline]:
    """diffusers' pipeline of a model directory, and dFactory's, which knows its vocabulary and block size."""
    ours = dfactory.Pipeline(model)
    theirs = BlockCausalModel(ours.policy, ours.rules.block_size)
    scheduler = BlockRefinementScheduler(block_length=ours.rules.block_size)
    made = LLaDA2Pipeline(model=theirs, scheduler=scheduler, tokenizer=ours.vocabulary.tokenizer)
    made.set_progress_bar_config(disable=True)
    return made, ours


def generate(
    pipeline: LLaDA2Pipeline, ours: dfactory.Pipeline, prompt_ids: list[int], threshold: float, max_new_tokens: int
) -> list[int]:
    """The response's token ids, up to the first EOS."""
    eos = ours.rules.eos_token_id
    made = pipeline(
        input_ids=torch.tensor([prompt_ids]),
        gen_length=max_new_tokens,
        num_inference_steps=ours.rules.block_size,  # at least one token a step
        threshold=threshold,
        editing_threshold=None,
        sampling_method="greedy",
        eos_token_id=eos,
        mask_token_id=ours.rules.mask_token_id,
        output_type="seq",
    )
    response = made.sequences[0].tolist()
    return response[: response.index(eos) + 1] if eos in response else response


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory that `dfactory export` wrote")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text to continue")
    prompt.add_argument(
        "--prompt-ids", type=json.loads, help="the same as a JSON list of token ids, without a tokenizer"
    )
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args(words)
    pipeline, ours = pipeline_of(options.model)
    prompt_ids = ours.encode(options.prompt if options.prompt is not None else options.prompt_ids)
    response = generate(pipeline, ours, prompt_ids, options.threshold, options.max_new_tokens)
    tokenizer = ours.vocabulary.tokenizer
    print(json.dumps({"token_ids": response, "text": tokenizer and tokenizer.decode(response)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
