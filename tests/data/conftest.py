"""A byte tokenizer with LLaDA2's special tokens, its chat template with and without markers, and files of records."""

import gzip
import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dfactory.config.data import DatasetKeys
from dfactory.data.chat import ChatEncoder
from dfactory.data.examples import load_examples

EOS, MASK = 1, 2
SPECIAL = ["<|startoftext|>", "<|endoftext|>", "<|mask|>", "<role>", "</role>", "<|role_end|>"]

TURN = """{%- for m in messages %}
{%- set role = {'user': 'HUMAN', 'assistant': 'ASSISTANT', 'system': 'SYSTEM', 'tool': 'OBSERVATION'}[m.role] %}
{{- '<role>' + role + '</role>' }}
{%- if m.role == 'assistant' %}OPEN{{- m.content + '<|role_end|>' }}CLOSE
{%- else %}{{- m.content + '<|role_end|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<role>ASSISTANT</role>' }}{%- endif %}"""
PLAIN_TEMPLATE = TURN.replace("OPEN", "").replace("CLOSE", "")
MARKED_TEMPLATE = TURN.replace("OPEN", "{%- generation %}").replace("CLOSE", "{%- endgeneration %}")


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, apart from "th", "he" and "the"."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIAL) + 256 + 2,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the the the"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        mask_token="<|mask|>",
        additional_special_tokens=["<role>", "</role>", "<|role_end|>"],
        chat_template=MARKED_TEMPLATE,
    )


@pytest.fixture(params=["marked", "plain"])
def chat_template(request):
    return {"marked": MARKED_TEMPLATE, "plain": PLAIN_TEMPLATE}[request.param]


@pytest.fixture
def show(tokenizer):
    """Token ids with their marks as text: what is trainable stands in [brackets]."""

    def text(input_ids_T, trainable_T, tokenizer=tokenizer):
        shown, open_bracket = "", False
        for token, trainable in zip(input_ids_T, trainable_T, strict=True):
            if trainable != open_bracket:
                shown += "[" if trainable else "]"
                open_bracket = trainable
            shown += tokenizer.decode([token])
        return shown + "]" * bool(open_bracket)

    return text


@pytest.fixture
def write(tmp_path):
    """Write rows (objects or raw bytes) to a .jsonl or .jsonl.gz file; returns its path as text."""

    def to_file(*rows, name="rows.jsonl"):
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        body = b"\n".join(lines) + b"\n"
        path = tmp_path / name
        path.write_bytes(gzip.compress(body) if name.endswith(".gz") else body)
        return str(path)

    return to_file


@pytest.fixture
def load(tokenizer):
    """load(path, ..., option=value) -> Examples, by small options."""

    def run(*paths, encoder="chat", **changes):
        options = {
            "max_length": 32,
            "overlong": "refuse",
            "on_bad_row": "error",
            "max_bad_fraction": 0.5,
            "block_size": 4,
            "eos_id": EOS,
            "vocab_size": len(tokenizer),
            "mask_id": MASK,
        }
        encoder = ChatEncoder(tokenizer) if encoder == "chat" else encoder
        return load_examples([DatasetKeys(path) for path in paths], encoder, **{**options, **changes})

    return run
