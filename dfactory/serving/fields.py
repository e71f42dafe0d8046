"""The fields of a body: which ones each endpoint knows, and which further ones OpenAI's clients send.

OpenAI's fields that are not implemented are of three kinds. IGNORED ones cannot change an answer. NEUTRAL ones can, but
have values that request nothing. All others are unknown and refused by name, as is a NEUTRAL field with any other value.
"""

import dataclasses
import difflib
import re
from typing import Any

from dfactory.data.chat import ChatEncoder
from dfactory.data.fields import show
from dfactory.decoding.keys import DecodeKeys
from dfactory.errors import DataError

OF_THE_SERVER = ("block_size", "batch_size", "mask_token_id", "eos_token_id", "full_attention", "suppress_special")
DECODE_FIELDS = [f.name for f in dataclasses.fields(DecodeKeys) if f.name not in OF_THE_SERVER]
NATIVE = ("prompt", "messages", "prompt_ids", "tools", "chat_template_kwargs", "template", "stop", "stream", "model")
OPENAI = ("model", "n", "stop", "stream", "stream_options", "max_tokens")
COMPLETIONS = (*OPENAI, "prompt")
CHAT = (*OPENAI, "messages", "tools", "max_completion_tokens", "chat_template_kwargs")
IGNORED = (
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)
NO_LIKELIHOOD = (
    "a block-diffusion model has no left-to-right probability of each token, only a bound of the whole response's: use "
    "`dfactory eval --elbo-pairs`, or `dfactory eval --lm-eval`, which scores by that bound"
)
NEUTRAL: dict[str, tuple[tuple, str]] = {  # values that request nothing, and why others are not supported
    "logprobs": ((False,), NO_LIKELIHOOD),
    "top_logprobs": ((0,), NO_LIKELIHOOD),
    "echo": ((False,), NO_LIKELIHOOD),
    "best_of": ((1,), "ask for n answers instead"),
    "suffix": (("",), "text is continued, not filled in"),
    "presence_penalty": ((0,), "there are no penalties"),
    "frequency_penalty": ((0,), "there are no penalties"),
    "repetition_penalty": ((1,), "there are no penalties"),
    "logit_bias": (({},), "there are no biases"),
    "min_p": ((0,), "use top_p"),
    "ignore_eos": ((False,), "an answer ends at EOS"),
    "skip_special_tokens": ((True,), "answers are text without special tokens"),
    "add_generation_prompt": ((True,), "a turn is answered, not continued"),
    "response_format": (({"type": "text"},), "answers are plain text"),
    "modalities": ((["text"],), "answers are text"),
    "audio": ((), "answers are text"),
    "verbosity": (("medium",), "ask for it in a message"),
    "reasoning_effort": (("none",), "use chat_template_kwargs where the template has a switch"),
    "tool_choice": (("auto", "none"), "tools are shown to the model, calls come back as text"),
    "functions": (([],), "give tools"),
    "function_call": (("auto", "none"), "give tools"),
    "web_search_options": ((), "this server has no network access"),
    "moderation": ((), "nothing is moderated"),
}
STREAM_OPTIONS = ("include_usage", "include_obfuscation")
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template")
GREEDY_BELOW = 0.01  # a temperature: near 0 the distribution is the argmax, and its confidence carries no information


def known_fields(body: dict[str, Any], own: tuple[str, ...], openai: bool) -> dict[str, Any]:
    """The body without nulls, ignored and neutral fields. Raises DataError for unknown or unsupported fields."""
    body = {name: value for name, value in body.items() if value is not None}
    for name in body:
        if name not in own and name not in DECODE_FIELDS and not (openai and (name in IGNORED or name in NEUTRAL)):
            near = difflib.get_close_matches(name[:80], [*own, *DECODE_FIELDS], n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join([*own, *DECODE_FIELDS])}"
            raise DataError(f"unknown field {name[:80]}: {hint}")
    if not openai:
        return body
    for name in body.keys() & NEUTRAL.keys():
        values, why = NEUTRAL[name]
        if body[name] not in values:
            raise DataError(f"{name} {str(body[name])[:80]} is not supported: {why}")
    return {name: value for name, value in body.items() if name not in IGNORED and name not in NEUTRAL}


def as_decode_keys(body: dict[str, Any]) -> dict[str, Any]:
    """The body with temperatures near 0 and negative seeds mapped to values that the decoder takes."""
    changed = dict(body)
    if type(body.get("temperature")) in (int, float) and 0 < body["temperature"] < GREEDY_BELOW:
        changed["temperature"] = 0.0
    if type(body.get("seed")) is int and -(2**63) <= body["seed"] < 0:
        changed["seed"] = body["seed"] + 2**63
    return changed


def wants_usage(options: dict[str, Any]) -> bool:
    """Whether a stream ends with the counts. Raises DataError for other options."""
    for name, value in options.items():
        if name not in STREAM_OPTIONS or type(value) not in (bool, type(None)):
            raise DataError(
                f"stream_options.{name[:80]} {show(value)}: known are {', '.join(STREAM_OPTIONS)}, as booleans"
            )
    return bool(options.get("include_usage"))


def template_variables(value: Any, encoder: ChatEncoder) -> dict[str, Any]:
    """The `chat_template_kwargs` that the template reads. One that it does not read may only be false or null."""
    if not isinstance(value, dict):
        raise DataError(f"chat_template_kwargs is {show(value)}: it must be an object")
    taken = {}
    for name, inner in value.items():
        if name in RESERVED or name in encoder.tokenizer.special_tokens_map or not name.isidentifier():
            raise DataError(f"chat_template_kwargs.{name[:80]}: the server sets it, or it is not a name: leave it out")
        if type(inner) not in (str, bool, int, float, type(None)):
            raise DataError(
                f"chat_template_kwargs.{name[:80]} is {show(inner)}: it must be text, a number or a boolean"
            )
        if re.search(rf"\b{name}\b", encoder.template):
            taken[name] = inner
        elif inner:
            raise DataError(f"the chat template does not read {name[:80]}: leave it out of chat_template_kwargs")
    return taken
