"""What a user's own program writes against the installed package, for mypy alone: `mypy` reads it with setup.cfg's options.

dfactory/py.typed says that the package has types. Without it, or with names that are resolved at run time alone, each of
these would be Any, and `assert_type` says so. Nothing here runs.
"""

from pathlib import Path
from typing import assert_type

import dfactory
from dfactory import Answer, DecodeRules, Pipeline, Policy, decode, load_policy
from dfactory.denoising import Frame
from dfactory.types import Rollout


def answers(model: Path) -> list[str | None]:
    pipeline = dfactory.Pipeline(model, threshold=0.9)
    assert_type(pipeline, Pipeline)
    found = pipeline.generate(["Once upon a time", [1, 2, 3], [{"role": "user", "content": "Hello"}]])
    assert_type(found, list[Answer])
    assert_type(pipeline.chat([{"role": "user", "content": "Hello"}]), Answer)
    return [answer.text for answer in found]


def frames(pipeline: Pipeline) -> list[str]:
    shown: list[Frame] = list(pipeline.stream("Once upon a time"))
    return [frame.marked for frame in shown]


def rollouts(prompt_ids: list[int], rules: DecodeRules) -> list[Rollout]:
    policy = load_policy("tiny")
    assert_type(policy, Policy)
    return decode(policy, [prompt_ids], rules)
