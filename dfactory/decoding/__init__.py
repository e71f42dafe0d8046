"""Fast exact block decoding: prompts in, Rollouts out.

Keys and rules are imported with a recipe; the decoder, which needs transformers, is imported on first use.
"""

import importlib

_WHERE = {
    "BlockDecoder": "decoder",
    "DecodeKeys": "keys",
    "DecodeRules": "decisions",
    "Progress": "decoder",
    "check_prompts": "decoder",
    "decode": "decoder",
    "make_decoder": "decoder",
}

__all__ = ["BlockDecoder", "DecodeKeys", "DecodeRules", "Progress", "check_prompts", "decode", "make_decoder"]


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'dfactory.decoding' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dfactory.decoding.{_WHERE[name]}"), name)
