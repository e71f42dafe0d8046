"""Fast exact block decoding: prompts in, Rollouts out."""

from dfactory.decoding.decoder import BlockDecoder, Progress, check_prompts, decode
from dfactory.decoding.rules import DecodeRules

__all__ = ["BlockDecoder", "DecodeRules", "Progress", "check_prompts", "decode"]
