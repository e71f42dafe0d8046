"""Train the embedded model's tokenizer: byte-level BPE over the bundled records and one story.

    python -m data_tools.train_tokenizer --output dfactory/assets/tiny

Writes `tokenizer.json`. The story is in the public domain and comes with reasoning-gym. Letters and digits that stand
alone, with or without a space before them, are single tokens: a text piece is cut before every digit, and the
alphabets are part of the corpus. The special tokens follow the ordinary ones. Equal arguments give equal bytes. The
committed tokenizer was learnt from an earlier version of the records, and the base model belongs to it: this makes one
of the same kind, not the same one.
"""

import argparse
import json
import os
import string
import sys
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one order of counting, one result

from reasoning_gym.data import read_data_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

REPOSITORY = Path(__file__).resolve().parent.parent
RECORDS = REPOSITORY / "recipes" / "quickstart" / "data" / "train.jsonl"
VOCAB_SIZE = 2048
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>", "<role>", "</role>", "<|role_end|>", "<|mask|>")
ROLES = ("SYSTEM", "HUMAN", "ASSISTANT", "TOOL")
# How text is cut into pieces; merges stay inside a piece. In this order: a role name; a capital letter beside another, or
# a digit, alone; letters with their apostrophe ending; other signs, with the space after them if something follows.
# Letters take the space before them along, unless a sign has it already: "BAD, 12" is B A D ,_ 1 2.
PIECES = (
    rf"(?:{'|'.join(ROLES)})\b"
    r"|\p{Lu}(?=\p{Lu})|(?<=\p{Lu})\p{Lu}|\p{N}"
    r"| ?\p{L}+(?:'(?:s|t|d|m|ll|re|ve)\b)?"
    r"| ?[^\s\p{L}\p{N}]+(?: (?=\S))?"
    r"|\s+(?=\s\p{L})|\s+"
)


def corpus(records: Path) -> list[str]:
    """What the merges are learned from."""
    texts = [read_data_file("in_the_year_2889.txt")]
    for line in records.read_text(encoding="utf-8").splitlines():
        texts += [message["content"] for message in json.loads(line)["messages"]]
    letters = " ".join(string.ascii_letters + string.digits)
    return texts + [f" {letters}"] * 1000 + list(ROLES) * 1000


def train(records: Path, vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(records), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for tokenizer.json")
    parser.add_argument(
        "--records", type=Path, default=RECORDS, help="JSONL with `messages` (default: the bundled one)"
    )
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE, help="special tokens included")
    options = parser.parse_args(arguments)

    tokenizer = train(options.records, options.vocab_size)
    if tokenizer.get_vocab_size() != options.vocab_size:
        raise SystemExit(
            f"--vocab-size {options.vocab_size}: the corpus only yields {tokenizer.get_vocab_size()} tokens; lower it"
        )
    options.output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(options.output / "tokenizer.json"))
    print(f"{tokenizer.get_vocab_size()} tokens in {options.output / 'tokenizer.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
