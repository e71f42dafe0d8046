"""An exported model in transformers alone: dFactory is not imported. One block is denoised at a time, by a threshold.

    dfactory export --model runs/mine --output mine/
    python examples/read_with_transformers.py --model mine/ --prompt "Once upon a time"

For models that transformers knows (Llama, Qwen3 and others that dFactory converts) and, with --trust-remote-code, for those
whose original code was carried along. `generate` below is the whole sampler: a block sees the clean blocks before it and all
of itself, each forward commits what exceeds the threshold, or else the most probable mask. No cache, one prompt at a time;
dFactory's decoder gives the same tokens with `decode.suppress_special=false`.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def block_causal_mask(length: int, block_size: int, dtype: torch.dtype) -> torch.Tensor:
    """[1, 1, S, S], added to the attention scores: 0 where a query may look, the least number elsewhere."""
    block = torch.arange(length) // block_size
    seen = block[:, None] >= block[None, :]
    return torch.zeros(length, length, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[None, None]


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    prompt_ids: list[int],
    *,
    block_size: int,
    mask_token_id: int,
    eos_token_id: int,
    threshold: float = 0.9,
    max_new_tokens: int = 64,
    logit_shift: int = 0,
) -> list[int]:
    """The response's token ids, EOS included. Blocks are counted from the start of the prompt, the last one is whole."""
    stop = -(-(len(prompt_ids) + max_new_tokens) // block_size) * block_size
    ids = torch.tensor([prompt_ids + [mask_token_id] * (stop - len(prompt_ids))])
    for end in range(len(prompt_ids) // block_size * block_size + block_size, stop + 1, block_size):
        while (masked := (ids[0, :end] == mask_token_id)).any():
            logits = (
                model(
                    input_ids=ids[:, :end],
                    attention_mask=block_causal_mask(end, block_size, model.dtype),
                    position_ids=torch.arange(end)[None],
                )
                .logits[0]
                .float()
            )
            if logit_shift:  # the position on the left predicts; the first one predicts itself
                logits = torch.cat([logits[:1], logits[:-1]])
            confidence, token = logits.softmax(-1).max(-1)
            confidence = confidence.masked_fill(~masked, -1.0)
            commit = confidence > threshold
            if not commit.any():
                commit[confidence.argmax()] = True
            ids[0, :end] = torch.where(commit, token, ids[0, :end])
        response = ids[0, len(prompt_ids) : end].tolist()
        if eos_token_id in response:
            return response[: response.index(eos_token_id) + 1]
    return response[:max_new_tokens]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, type=Path, help="directory that `dfactory export` wrote")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text to continue")
    prompt.add_argument(
        "--prompt-ids", type=json.loads, help="the same as a JSON list of token ids, without a tokenizer"
    )
    parser.add_argument("--mask-token-id", type=int, help="default: the tokenizer's")
    parser.add_argument("--eos-token-id", type=int, help="default: the tokenizer's")
    parser.add_argument("--block-size", type=int, help="default: generation_config.json's, where dFactory records it")
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--trust-remote-code", action="store_true", help="run the Python files beside the weights")
    options = parser.parse_args(words)
    recorded = options.model / "generation_config.json"
    recorded = json.loads(recorded.read_text()) if recorded.is_file() else {}
    model = AutoModelForCausalLM.from_pretrained(options.model, trust_remote_code=options.trust_remote_code).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model) if options.prompt is not None else None
    response = generate(
        model,
        options.prompt_ids if tokenizer is None else tokenizer(options.prompt)["input_ids"],
        block_size=options.block_size or recorded["block_size"],
        mask_token_id=tokenizer.mask_token_id if options.mask_token_id is None else options.mask_token_id,
        eos_token_id=tokenizer.eos_token_id if options.eos_token_id is None else options.eos_token_id,
        threshold=options.threshold,
        max_new_tokens=options.max_new_tokens,
        logit_shift=recorded.get("logit_shift", 0),
    )
    print(json.dumps({"token_ids": response, "text": tokenizer and tokenizer.decode(response)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
