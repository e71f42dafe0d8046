"""An autoregressive model that answers prompts in batches, by transformers' `generate`.

A batch is padded on the left, and the padding is masked. Every STEPS tokens the rows whose answer has ended leave the batch
and the cache, so that a short answer does not cost the steps of the longest one.

At temperature 0 the answer is the most probable token each time. Above it, a row draws its tokens with random numbers of its
own: a pure function of (seed, number of the request, index of the token). Which other rows are in the batch changes an
answer only as far as it changes the rounding of its scores.

Letters: R requests, T tokens, V vocabulary.
"""

import collections
import dataclasses
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList

from dfactory.decoding.distribution import Distribution, draw, uniform_numbers
from dfactory.errors import CheckpointError, ConfigError
from dfactory.models.registry import read_tokenizer
from dfactory.models.saving import GENERATION_CONFIG

STEPS = 16  # tokens between two looks at which answers have ended


class Request(NamedTuple):
    number: int  # which random numbers it draws with
    prompt_ids: list[int]


class Reply(NamedTuple):
    token_ids: list[int]  # without the token that ended it
    is_finished: bool  # False: it was cut at max_new_tokens


def is_diffusion_model(model_dir: Path) -> bool:
    """Whether a directory is a checkpoint of ours: `saving` states the block size that it was trained with."""
    file = model_dir / GENERATION_CONFIG
    return file.is_file() and "block_size" in json.loads(file.read_bytes())


class Teacher:
    """`max_prompt_tokens` is what the model's positions leave beside an answer; None where its config states none.

    Raises CheckpointError or ConfigError for a directory that transformers cannot answer with.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        dtype: torch.dtype,
        device: str,
        max_new_tokens: int,
        distribution: Distribution,
        seed: int,
    ):
        self.tokenizer = read_tokenizer(model_dir)
        if self.tokenizer is None:
            raise ConfigError(f"{model_dir} has no tokenizer, but answers are text: put tokenizer.json there")
        self.model = _load(model_dir, dtype).to(device).eval()
        self.max_new_tokens = max_new_tokens
        self._distribution, self._seed = distribution, seed
        self.end_ids = _end_ids(self.model.generation_config.eos_token_id, self.tokenizer.eos_token_id)
        self._pad_id = self.end_ids[0]
        # The checkpoint's own generation settings, such as a temperature, are left out: the options state them all.
        self.model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=self.end_ids, pad_token_id=self._pad_id
        )

    @property
    def max_prompt_tokens(self) -> int | None:
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return None if positions is None else positions - self.max_new_tokens

    def text(self, reply: Reply) -> str:
        return self.tokenizer.decode(reply.token_ids, skip_special_tokens=True)

    @torch.inference_mode()
    def answer(self, requests: Sequence[Request], on_tokens: Callable[[int], None] = lambda count: None) -> list[Reply]:
        """One batch -> its replies, in order. `on_tokens` is called with the number of further tokens."""
        batch = _Batch(*self._padded(requests), DynamicCache(config=self.model.config), list(range(len(requests))))
        for first in range(0, self.max_new_tokens, STEPS):
            longer_RT = self.model.generate(
                batch.input_ids_RT,
                attention_mask=batch.mask_RT,
                past_key_values=batch.cache,
                max_new_tokens=min(STEPS, self.max_new_tokens - first),
                logits_processor=self._processors([requests[index].number for index in batch.live], first),
            )
            on_tokens(batch.take(longer_RT, self.end_ids))
            if not batch.live:
                break
        return [Reply(batch.token_ids[index], index not in batch.live) for index in range(len(requests))]

    def _padded(self, requests: Sequence[Request]) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids_RT and its attention mask, both int64."""
        longest = max(len(request.prompt_ids) for request in requests)
        padding = [longest - len(request.prompt_ids) for request in requests]
        ids = [[self._pad_id] * pad + r.prompt_ids for pad, r in zip(padding, requests, strict=True)]
        mask = [[0] * pad + [1] * (longest - pad) for pad in padding]
        return torch.tensor(ids, device=self.model.device), torch.tensor(mask, device=self.model.device)

    def _processors(self, numbers: list[int], first: int) -> LogitsProcessorList:
        if self._distribution.is_greedy:
            return LogitsProcessorList()
        return LogitsProcessorList([_DrawByRow(self._distribution, self._seed, numbers, first)])


@dataclasses.dataclass
class _Batch:
    """The requests whose answers go on, as `generate` takes them; `live` are their places among all requests."""

    input_ids_RT: torch.Tensor
    mask_RT: torch.Tensor
    cache: DynamicCache
    live: list[int]
    token_ids: dict[int, list[int]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))

    def take(self, longer_RT: torch.Tensor, end_ids: Collection[int]) -> int:
        """Add the new tokens to the answers, and leave out the rows that have ended. Returns the number of new tokens."""
        new_RT, count, kept = longer_RT[:, self.input_ids_RT.shape[1] :], 0, []
        for row, (index, new_ids) in enumerate(zip(self.live, new_RT.tolist(), strict=True)):
            end = next((at for at, token in enumerate(new_ids) if token in end_ids), None)
            self.token_ids[index] += new_ids[:end]
            count += len(new_ids[:end])
            if end is None:
                kept.append(row)
        kept_R = torch.tensor(kept, dtype=torch.int64, device=longer_RT.device)
        if 0 < len(kept) < len(self.live):
            self.cache.batch_select_indices(kept_R)
        self.live = [self.live[row] for row in kept]
        self.mask_RT = torch.cat([self.mask_RT[kept_R], torch.ones_like(new_RT[kept_R])], dim=1)
        self.input_ids_RT = longer_RT[kept_R]
        return count


class _DrawByRow(LogitsProcessor):
    """Draws a token for each row and leaves it as the only possible one, which greedy search then takes."""

    def __init__(self, distribution: Distribution, seed: int, numbers: list[int], first: int):
        self.distribution, self.seed, self.numbers, self.step = distribution, seed, numbers, first

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        uniform = [uniform_numbers(self.seed, number, self.step, 1)[0] for number in self.numbers]
        self.step += 1
        logprob_RV = self.distribution.processed(scores).log_softmax(dim=-1)
        token_R = draw(logprob_RV, torch.tensor(uniform, dtype=torch.float64, device=scores.device))
        return torch.full_like(scores, float("-inf")).scatter_(1, token_R[:, None], 0.0)


def _load(model_dir: Path, dtype: torch.dtype):
    try:
        return AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as problem:
        raise CheckpointError(
            f"{model_dir} is no autoregressive model that transformers can load ({str(problem).splitlines()[0]}): give one "
            "whose config.json names a causal language model of transformers, with *.safetensors"
        ) from problem


def _end_ids(listed: Any, named: int | None) -> list[int]:
    """What ends an answer: all that the model's generation config lists, and the tokenizer's EOS."""
    ids = listed if isinstance(listed, list) else [listed]
    found = list(dict.fromkeys(index for index in (*ids, named) if index is not None))
    if not found:
        raise ConfigError(
            "neither generation_config.json nor the tokenizer names an end of text: state eos_token_id in one"
        )
    return found
