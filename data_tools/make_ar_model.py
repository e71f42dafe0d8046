"""Make an autoregressive checkpoint to convert: texts, and a small Qwen3 that plain next-token training taught them.

    python -m data_tools.make_ar_model --output runs/quickstart_ar

writes train.jsonl and heldout.jsonl (`{"text": ...}`: the questions and input descriptions of reasoning-gym's codeio
records, every twentieth held out) and model/, which transformers loads: the embedded tokenizer, 1.0 million parameters,
causal attention, position i predicting token i + 1. Nothing of dfactory's training takes part in it, so a conversion
starts from what users start from. Equal arguments give equal texts and, on one machine, equal weights.
"""

import argparse
import gzip
import json
import shutil
import sys
import time
from pathlib import Path

import torch
from reasoning_gym.data import get_data_file_path
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, get_cosine_schedule_with_warmup

from data_tools.make_quickstart_data import write_jsonl
from dfactory.models.tiny import TINY_DIR

HELD_OUT_EVERY = 20
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.06,
}
STEPS, WARMUP, LEARNING_RATE = 450, 40, 4e-3
ROWS, ROW_LENGTH = 8, 256  # of a step


def texts() -> list[str]:
    """The distinct texts, in the order of the file."""
    with gzip.open(str(get_data_file_path("codeio.jsonl.gz")), "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    return list(dict.fromkeys(f"{row['task_description']}\n\n{row['input_output_spec']}" for row in records))


def token_stream(documents: list[str], tokenizer) -> torch.Tensor:
    """All texts concatenated, each followed by EOS."""
    encoded = tokenizer(documents, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in (*ids, tokenizer.eos_token_id)])


def config_of(tokenizer) -> Qwen3Config:
    vocabulary = json.loads((TINY_DIR / "config.json").read_text())["vocab_size"]
    return Qwen3Config(vocab_size=vocabulary, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **SIZES)


def train(model: Qwen3ForCausalLM, stream: torch.Tensor, steps: int, seed: int) -> float:
    """Plain next-token training on rows drawn from the stream; returns the mean loss of the last 50 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, steps)
    generator, losses, started = torch.Generator().manual_seed(seed), [], time.perf_counter()
    for step in range(1, steps + 1):
        starts = torch.randint(len(stream) - ROW_LENGTH, (ROWS, 1), generator=generator)
        ids = stream[starts + torch.arange(ROW_LENGTH)]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0 or step == steps:
            mean = sum(losses[-50:]) / len(losses[-50:])
            print(f"step {step}/{steps}  loss {mean:.4f}  {time.perf_counter() - started:.0f} s", flush=True)
    return mean


@torch.no_grad()
def held_out_nll(model: Qwen3ForCausalLM, stream: torch.Tensor) -> float:
    """Mean next-token loss in nats on rows that cover a stream once."""
    rows = stream[: len(stream) // ROW_LENGTH * ROW_LENGTH].view(-1, ROW_LENGTH)
    return sum(model(input_ids=part, labels=part).loss.item() * len(part) for part in rows.split(ROWS)) / len(rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, required=True, help="directory for train.jsonl, heldout.jsonl and model/"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    everything = texts()
    held_out = everything[::HELD_OUT_EVERY]
    train_texts = [text for index, text in enumerate(everything) if index % HELD_OUT_EVERY]
    options.output.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train_texts), ("heldout", held_out)):
        write_jsonl(options.output / f"{name}.jsonl", ({"text": text} for text in part))

    tokenizer = AutoTokenizer.from_pretrained(TINY_DIR)
    torch.manual_seed(options.seed)
    model = Qwen3ForCausalLM(config_of(tokenizer))
    stream = token_stream(train_texts, tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(train_texts)} texts with {len(stream):,} tokens")
    train(model, stream, options.steps, options.seed)
    nll = held_out_nll(model.eval(), token_stream(held_out, tokenizer))
    model.save_pretrained(options.output / "model")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TINY_DIR / file, options.output / "model" / file)
    print(f"held out: {nll:.4f} nats a token: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
