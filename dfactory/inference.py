"""Pipeline: a model, its vocabulary and its decoding rules. Prompts in, answers out.

    pipeline = dfactory.Pipeline("runs/mine", threshold=0.9)
    answers = pipeline.generate(["Once upon a time"])                    # list[Answer], in the order of the prompts
    answer = pipeline.chat([{"role": "user", "content": "Hello"}])       # Answer, by the chat template
    for frame in pipeline.stream("Once upon a time"):                    # Frame, one a forward
        print(frame.marked)

Everything in dFactory that answers prompts uses a Pipeline: the verbs, the server, the data tools, the decoding probe of a
training run and the rollout actors of RL.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from dfactory.data.chat import ChatEncoder
from dfactory.data.fields import integers, show, text
from dfactory.data.fields import tools as checked_tools
from dfactory.data.prompts import messages_of
from dfactory.decoding import DecodeRules, Progress, check_prompts, decode, make_decoder
from dfactory.decoding.keys import DecodeKeys, decode_keys_over
from dfactory.decoding.response import document_length
from dfactory.decoding.slots import Decodable
from dfactory.decoding.templates import fill_in
from dfactory.denoising import Denoising, Frame
from dfactory.errors import ConfigError, DataError
from dfactory.models.adapters import whole_model_dir
from dfactory.models.hub import resolve
from dfactory.models.precision import fits_in_float32, slow_on
from dfactory.models.registry import load_policy, read_config, trained_block_size
from dfactory.types import WHOLE, Answer, Rollout
from dfactory.vocabulary import Vocabulary, read_vocabulary

logger = logging.getLogger(__name__)

PROMPTS_AT_ONCE = 512  # prompts handed to the decoder together; slots are refilled among these
ARGUMENTS = "the keyword arguments"  # where a decode key comes from, in messages
OF_THE_MODEL = ("mask_token_id", "eos_token_id", "full_attention")  # keys that the vocabulary has been read with

Messages = list[dict[str, Any]]  # a conversation; a tool is a JSON schema
Prompt = str | Sequence[int] | Messages
"""Text to continue, token ids, or messages to answer by the chat template."""


class Pipeline:
    """`model` is a run folder, a checkpoint, a model directory, a name on the hub (with its `revision`) or `tiny`.

    Further keyword arguments are decode keys (`dfactory schema` lists them), applied over `keys`. The methods take them too,
    for one call. The block size is that of training unless a key states another.

    What an answer draws is a function of (seed, its prompt's noise id, its own forward), so a prompt gets the same answer
    alone and in any batch. Raises CheckpointError for a model that cannot be read, ConfigError for a key.
    """

    policy: Decodable
    vocabulary: Vocabulary
    keys: DecodeKeys  # with the block size that the model was trained with; None where it sees whole documents
    rules: DecodeRules

    def __init__(
        self,
        model: str | Path,
        *,
        revision: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        init_weights: str = "pretrained",
        chat_template_path: str | None = None,
        keys: DecodeKeys | None = None,
        **decode_keys: Any,
    ):
        """`dtype` auto is the checkpoint's, or float32 for bfloat16 on a CPU that is slow in it; `device` None is cuda where
        there is one, else cpu. `chat_template_path` is a Jinja file instead of the model's own template."""
        keys = decode_keys_over(keys or DecodeKeys(), decode_keys, ARGUMENTS)
        model_dir = resolve(model, revision, weights=init_weights == "pretrained")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if dtype == "auto" and init_weights == "pretrained" and torch.device(device).type == "cpu":
            dtype = _precision(model_dir, str(device))
        policy = load_policy(model_dir, dtype=dtype, device=device, init_weights=init_weights)
        vocabulary = read_vocabulary(
            model_dir,
            mask_token_id=keys.mask_token_id,
            eos_token_id=keys.eos_token_id,
            chat_template_path=chat_template_path,
            whole=keys.full_attention,
        )
        if keys.block_size is None and not vocabulary.sees_whole_document:
            keys = dataclasses.replace(keys, block_size=trained_block_size(model_dir))
        self._take(policy, vocabulary, keys)

    @classmethod
    def of(cls, policy: Decodable, vocabulary: Vocabulary, keys: DecodeKeys) -> "Pipeline":
        """A pipeline of loaded parts. Raises ConfigError if the model needs a block size and `keys` state none."""
        made = cls.__new__(cls)
        made._take(policy, vocabulary, keys)
        return made

    def _take(self, policy: Decodable, vocabulary: Vocabulary, keys: DecodeKeys) -> None:
        self.policy, self.vocabulary, self.keys = policy, vocabulary, keys
        self.rules = vocabulary.rules(keys)

    @property
    def aligned_block_size(self) -> int:
        """What documents are aligned to where the model scores them."""
        return WHOLE if self.vocabulary.sees_whole_document else self.rules.block_size

    def over(self, decode_keys: Mapping[str, Any], origin: str = ARGUMENTS) -> "Pipeline":
        """The same model with some decode keys replaced; `origin` says in messages where they come from."""
        if not decode_keys:
            return self
        fixed = [name for name in OF_THE_MODEL if name in decode_keys]
        if fixed:
            raise ConfigError(
                f"{fixed[0]} in {origin}: the tokenizer was read with it, so it cannot change; give it to Pipeline(...)"
            )
        return Pipeline.of(self.policy, self.vocabulary, decode_keys_over(self.keys, dict(decode_keys), origin))

    # --- answers ----------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[Prompt], *, noise_ids: Sequence[int] | None = None, **decode_keys: Any
    ) -> list[Answer]:
        """An answer to each prompt, in their order. `noise_ids` names the random numbers of each (default: its index).
        Raises DataError for a prompt that cannot be encoded or decoded, before any is decoded."""
        if isinstance(prompts, str):
            raise DataError("prompts is one text: give a list of prompts, such as [text]")
        pipeline = self.over(decode_keys)
        return list(pipeline.answers([self.encode(prompt) for prompt in prompts], noise_ids=noise_ids))

    def chat(
        self,
        messages: Messages,
        tools: Messages | None = None,
        *,
        noise_id: int = 0,
        **decode_keys: Any,
    ) -> Answer:
        """The answer to a conversation whose last message is not the assistant's."""
        pipeline = self.over(decode_keys)
        (answer,) = pipeline.answers([self.encode_chat(messages, tools)], noise_ids=[noise_id])
        return answer

    def infill(self, prompt: Prompt, template: Sequence[str | int], *, noise_id: int = 0, **decode_keys: Any) -> Answer:
        """A template with its blanks filled in: texts, and numbers of tokens to write between them.

        pipeline.infill(question, ["The day after Monday is ", 3, "."])
        """
        pipeline = self.over(decode_keys)
        prompt_ids = pipeline.encode(prompt)
        parts, never = pipeline.encode_template(template), pipeline.vocabulary.special.produced
        draft, rules = fill_in(parts, len(prompt_ids), pipeline.rules, never)
        (rollout,) = decode(pipeline.policy, [prompt_ids], rules, drafts=[draft], noise_ids=[noise_id])
        return pipeline.vocabulary.answer(rollout)

    def stream(
        self,
        prompt: Prompt,
        tools: Messages | None = None,
        *,
        noise_id: int = 0,
        **decode_keys: Any,
    ) -> "Stream":
        """The answer to one prompt, forward by forward."""
        return Stream(self.over(decode_keys), self.encode(prompt, tools), noise_id)

    # --- token ids --------------------------------------------------------------------------------------------------

    def encode(self, prompt: Prompt, tools: Messages | None = None) -> list[int]:
        """The token ids of a prompt. Raises DataError, or ConfigError for messages without a chat template."""
        if not isinstance(prompt, (str, Sequence)):
            raise DataError(f"prompt is {show(prompt)}: it must be text, messages or token ids")
        if not isinstance(prompt, str) and any(isinstance(part, Mapping) for part in prompt):
            return self.encode_chat(cast(Messages, prompt), tools)
        if tools:
            raise DataError("tools are shown to the model by its chat template: give messages with them")
        if isinstance(prompt, str):
            return self._encoder.encode_beginning(text(prompt, "prompt"))
        return integers(list(prompt), "prompt", may_be_empty=True)

    def encode_chat(self, messages: Messages, tools: Messages | None = None) -> list[int]:
        """The token ids of a conversation, up to where the model has to answer."""
        return self._encoder.encode_prompt(messages_of(messages), checked_tools(tools))

    def encode_template(self, template: Sequence[str | int]) -> list[list[int] | int]:
        """The ids of a template's texts, and its blanks as they are (decoding/templates.py)."""
        return [self._encoder.encode_text(part) if isinstance(part, str) else part for part in template]

    @property
    def _encoder(self) -> ChatEncoder:
        if self.vocabulary.encoder is None:
            raise DataError("the model directory has no tokenizer: give token ids")
        return self.vocabulary.encoder

    def answers(
        self, prompt_ids: Sequence[Sequence[int]], *, noise_ids: Sequence[int] | None = None
    ) -> Iterator[Answer]:
        """Answers as they are finished, in the order of the prompts; all prompts are checked before one is decoded."""
        check_prompts(prompt_ids, self.rules, self.policy.config.vocab_size)
        noise_ids = range(len(prompt_ids)) if noise_ids is None else noise_ids
        if len(noise_ids) != len(prompt_ids):
            raise DataError(f"noise_ids has {len(noise_ids)} entries for {len(prompt_ids)} prompts: give one each")
        for start in range(0, len(prompt_ids), PROMPTS_AT_ONCE):
            part = slice(start, start + PROMPTS_AT_ONCE)
            for rollout in self.decode(prompt_ids[part], noise_ids=noise_ids[part]):
                yield self.vocabulary.answer(rollout)

    def decode(
        self,
        prompt_ids: Sequence[Sequence[int]],
        *,
        drafts: Sequence[Sequence[int]] | None = None,
        noise_ids: Sequence[int] | None = None,
        on_step: Callable[[Progress], None] | None = None,
    ) -> list[Rollout]:
        """`dfactory.decode` with this pipeline's model and rules."""
        return decode(self.policy, prompt_ids, self.rules, drafts=drafts, noise_ids=noise_ids, on_step=on_step)


def _precision(model_dir: Path, device: str) -> str:
    """What `dtype` auto stands for: the checkpoint's, as `load_policy` reads it, or float32 where a CPU computes the
    checkpoint's bfloat16 slowly and has the memory. Widening loses nothing, so only time and memory differ."""
    whole = whole_model_dir(model_dir)
    if (read_config(whole).dtype or torch.bfloat16) != torch.bfloat16 or (reason := slow_on(device)) is None:
        return "auto"
    if not fits_in_float32(whole):
        logger.warning("dtype bfloat16, as float32 would take more than half of the free memory: %s", reason)
        return "auto"
    logger.warning("dtype float32 in place of the checkpoint's bfloat16: %s", reason)
    return "float32"


class Stream:
    """One answer while it is decoded: an iterator over Frames, one for each forward. The last Frame has the answer."""

    def __init__(self, pipeline: Pipeline, prompt_ids: Sequence[int], noise_id: int = 0):
        rules = pipeline.rules
        check_prompts([prompt_ids], rules, pipeline.policy.config.vocab_size)
        length = document_length(len(prompt_ids), rules)
        self.pipeline = pipeline
        self.layout = {"block_size": rules.block_size, "max_new_tokens": rules.max_new_tokens}
        self.decoder = make_decoder(pipeline.policy, rules, 1, length)
        self.decoder.add(0, prompt_ids, rules, noise_id=noise_id)
        self.denoising = Denoising(pipeline.vocabulary, rules.block_size)

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Frame:
        if not self.decoder.live:
            raise StopIteration
        (progress,) = self.decoder.step()
        return self.denoising.frame(progress, self.pipeline.rules.rule.shown)

    def go_on_with(self, pipeline: Pipeline) -> None:
        """Continue by the keys of another pipeline of this model; the block size and the longest answer stay."""
        self.pipeline = pipeline
        self.decoder.change_rules(0, pipeline.vocabulary.rules(dataclasses.replace(pipeline.keys, **self.layout)))
