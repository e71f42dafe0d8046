"""A tiny autoregressive model with a tokenizer of its own, as transformers saves them: it knows no mask token."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.batches import TINY_SIZES

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = [BOS, EOS, PAD]  # 0, 1, 2
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
RESERVED = ["<|user|>", "<|assistant|>", "<tool>", "<fill_pad>", "<reserved_1>", "<reserved_0>"]  # 3 to 8
AFTER_TEXT = 9 + 256  # the first id without a token in a model with RESERVED


def make_tokenizer(special: list[str], plain: list[str] = (), chat_template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    """A token a byte; special tokens come first, `plain` added ones last."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*ROLES, *special, *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([*ROLES, *special])
    backend.add_tokens(list(plain))
    roles = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template, **roles)


def write_ar_model(
    directory: Path, special: list[str] = RESERVED, *, plain: list[str] = (), spare_rows: int = 0, tied: bool = True
) -> Path:
    """Random weights for the tokenizer's ids and `spare_rows` more. `special` tokens are those beside BOS, EOS and PAD."""
    tokenizer = make_tokenizer(special, plain)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    sizes = TINY_SIZES | {"vocab_size": len(tokenizer) + spare_rows, "tie_word_embeddings": tied} | ids
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_chats(file: Path, count: int = 20) -> Path:
    """Conversations of a question and its answer."""
    rows = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"it is {n}"}]}
        for n in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_cpt_recipe(folder: Path, model: Path, **keys) -> Path:
    """A recipe that converts the model, two steps long, with mask_token auto; YAML is a superset of JSON."""
    recipe = {
        "stage": "cpt",
        "model_name_or_path": str(model),
        "mask_token": "auto",
        "dtype": "float32",
        "output_dir": str(folder / "run"),
        "datasets": [{"path": str(write_chats(folder / "chats.jsonl"))}],
        "block_size": 4,
        "max_length": 64,
        "overlong": "truncate",
        "max_steps": 2,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "first_loss_check": "off",
    }
    file = folder / f"{model.name}.yaml"
    file.write_text(json.dumps(recipe | keys))
    return file
