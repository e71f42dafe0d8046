"""What the parts of benchmarks/ar.py share: an autoregressive model, records as it reads them, and its scores.

Records become tokens as they do in training and in `dfactory eval --elbo-pairs`: by the same reader, chat template and
EOS. A diffusion model also scores the EOS fill of the last block. An autoregressive one has no blocks and stops at EOS.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from dfactory.config.data import DatasetKeys
from dfactory.data.chat import ChatEncoder, special_ids
from dfactory.data.examples import Examples, load_examples
from dfactory.data.named_templates import read_chat_template
from dfactory.errors import ConfigError
from dfactory.models.registry import known_eos_id, known_stop_ids, read_config, read_tokenizer
from dfactory.packing import align
from dfactory.types import NO_MASK, Example
from dfactory.vocabulary import Vocabulary

PADDING = 0  # after a text, where no causal position sees it
BATCH_TOKENS = 2048  # of a micro-batch, padding included


class Text(NamedTuple):
    """A tokenised record: `real_T` marks the response tokens, up to and including EOS."""

    input_ids_T: np.ndarray  # int32
    real_T: np.ndarray  # bool
    document_id: int

    def __len__(self) -> int:
        return len(self.input_ids_T)

    @property
    def scored_T(self) -> np.ndarray:
        """bool: `real_T` without a text's first token, which nothing comes before."""
        return self.real_T & (np.arange(len(self)) > 0)

    @property
    def unscored(self) -> int:
        """1 for a text whose first token is a response token, as in `{"text": ...}`; else 0."""
        return int(self.real_T[0])


def read_model(model_dir: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """transformers' class with causal attention, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, use_safetensors=True).eval()


def vocabulary_of(model_dir: Path, chat_template_path: str | None = None) -> Vocabulary:
    """Tokenizer, EOS and encoder of a model without a mask. Raises ConfigError where there is no tokenizer."""
    tokenizer, size = read_tokenizer(model_dir), read_config(model_dir).vocab_size
    if tokenizer is None:
        raise ConfigError(f"{model_dir} has no tokenizer: copy its files beside the weights")
    template = read_chat_template(chat_template_path)
    special = special_ids(tokenizer, NO_MASK, known_eos_id(model_dir, None, tokenizer), size, template)
    encoder = ChatEncoder(tokenizer, template, special, chat_template_path)
    return Vocabulary(size, special, tokenizer, encoder, stop_ids=known_stop_ids(model_dir, special.eos, size))


def read_held_out(file: Path, vocabulary: Vocabulary, longest: int) -> Examples:
    """All records of a file. Raises DataError for a bad one, and for one of more than `longest` tokens."""
    return load_examples(
        [DatasetKeys(str(file))],
        vocabulary.encoder,
        max_length=longest,
        overlong="refuse",
        on_bad_row="error",
        max_bad_fraction=0.0,
        block_size=1,
        eos_id=vocabulary.special.eos,
        vocab_size=vocabulary.size,
    )


def text_of(example: Example, eos: int) -> Text:
    """The example with the same real tokens as its aligned document has at any block size."""
    document = align(example, 1, eos)
    return Text(document.input_ids_T, document.real_T, document.document_id)


def by_length(texts: Sequence[Text], tokens: int = BATCH_TOKENS) -> Iterator[list[int]]:
    """The texts' indices in batches of about one length: `tokens` with padding at most, or a single text."""
    batch: list[int] = []
    for index in sorted(range(len(texts)), key=lambda i: (len(texts[i]), i)):
        if batch and (len(batch) + 1) * len(texts[index]) > tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def scores(model: PreTrainedModel, texts: Sequence[Text]) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probability of each scored token [N], in fp32; the number of its text [N]).

    The head computes logits at the positions before scored tokens only. That is what transformers' forward computes where
    the head is a plain matrix; `check_head` says whether it is.
    """
    ids_BT, scored_BT = _padded(texts, model.device)
    hidden_BTH = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
    text_N, place_N = scored_BT.nonzero(as_tuple=True)
    logits_NV = model.get_output_embeddings()(hidden_BTH[text_N, place_N - 1]).float()
    losses_N = torch.nn.functional.cross_entropy(logits_NV, ids_BT[text_N, place_N], reduction="none")
    return -losses_N, text_N


@torch.no_grad()
def check_head(model: PreTrainedModel, text: Text) -> None:
    """Raise ConfigError for a model whose logits are more than its head's product, such as Gemma 2's capped ones."""
    ids_BT, scored_BT = _padded([text], model.device)
    logits_TV = model(input_ids=ids_BT, use_cache=False).logits[0].float()
    whole_T = logits_TV[:-1].log_softmax(-1).gather(1, ids_BT[0, 1:, None])[:, 0]
    ours_N, _ = scores(model, [text])
    if not torch.allclose(ours_N, whole_T[scored_BT[0, 1:]], atol=1e-3):
        raise ConfigError(f"{type(model).__name__} changes the logits of its head: benchmarks.ar does not compute that")


def _padded(texts: Sequence[Text], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids int64, scored bool), both [B, T], padded on the right."""
    longest = max(map(len, texts))
    ids_BT = torch.full((len(texts), longest), PADDING)
    scored_BT = torch.zeros(len(texts), longest, dtype=torch.bool)
    for row, text in enumerate(texts):
        ids_BT[row, : len(text)] = torch.from_numpy(text.input_ids_T.astype(np.int64))
        scored_BT[row, : len(text)] = torch.from_numpy(text.scored_T)
    return ids_BT.to(device), scored_BT.to(device)
