"""Fast exact block decoding: prompts in, Rollouts out."""

from dfactory.decoding.decoder import Progress, decode
from dfactory.decoding.rules import DecodeRules

__all__ = ["DecodeRules", "Progress", "decode"]
