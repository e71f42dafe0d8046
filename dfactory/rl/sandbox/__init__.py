"""Runs programs that a model wrote, and nothing else of theirs; sandbox.py says what that protects."""

from dfactory.rl.sandbox.answers import Answer, same
from dfactory.rl.sandbox.sandbox import (
    WALLS,
    Call,
    Ending,
    Isolation,
    Limits,
    Run,
    Sandbox,
    refusal,
    strongest_isolation,
)

__all__ = [
    "WALLS",
    "Answer",
    "Call",
    "Ending",
    "Isolation",
    "Limits",
    "Run",
    "Sandbox",
    "refusal",
    "same",
    "strongest_isolation",
]
