"""How a policy in training decodes: tokens per forward and exact match on the first held-out prompts.

ZeRO 0 to 2 leave every rank a whole model, so the ranks share the prompts. Where a forward needs all ranks (ZeRO-3 gathers
each layer, expert parallelism sends tokens around) they decode the same prompts in step; rank 0's logits decide for all,
so that rounding cannot lead two ranks apart.
"""

import dataclasses
import re
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import nn

from dfactory import distributed
from dfactory.data.answers import answer_in
from dfactory.data.examples import Examples
from dfactory.decoding.keys import DecodeKeys
from dfactory.errors import DataError
from dfactory.inference import Pipeline
from dfactory.models.policy import Policy
from dfactory.recipe import Recipe
from dfactory.types import Answer, Example, FinishReason
from dfactory.vocabulary import Vocabulary

PREVIEWS = 4  # answers that are saved at each evaluation


class Trained(Protocol):
    """The part of the engine's Trainer that decoding needs."""

    recipe: Recipe
    policy: Policy
    engine: nn.Module
    device: torch.device
    rank: int
    world_size: int
    zero_stage: int


class Question(NamedTuple):
    """The beginning of a document up to its first trainable token, and the trainable tokens that follow."""

    prompt_ids: list[int]
    answer_ids: list[int]

    @classmethod
    def of(cls, example: Example) -> "Question":
        start = int(example.trainable_T.argmax())
        length = int((~example.trainable_T[start:]).argmax()) or len(example) - start
        ids = example.input_ids_T.tolist()
        return cls(ids[:start], ids[start : start + length])

    def is_answered_by(self, answer: Answer, vocabulary: Vocabulary, pattern: re.Pattern | None = None) -> bool:
        """Whether the tokens up to EOS are equal (as far as a cut document goes), or else the text, or what the pattern
        captures of both, as in `dfactory eval`."""
        if answer.token_ids[: len(self.answer_ids)] == self.answer_ids:
            return True
        if answer.text is None:
            return False
        given, expected = (answer_in(text, pattern).strip() for text in (answer.text, vocabulary.text(self.answer_ids)))
        return given == expected


def first_questions(examples: Examples, count: int) -> list[Question]:
    """The first `count` documents (of a pair: the chosen one) that have a prompt. Raises DataError if none has."""
    questions = (Question.of(examples[index]) for index in range(0, len(examples), examples.unit_size))
    found = [question for question in questions if question.prompt_ids][:count]
    if not found:
        raise DataError(
            f"no document of {', '.join(examples.report.files)} has a prompt before its answer: set eval_decode_prompts to 0"
        )
    return found


class DecodingProbe:
    """Decodes a fixed list of questions at each call. All ranks must call it together."""

    def __init__(
        self, questions: list[Question], vocabulary: Vocabulary, keys: DecodeKeys, pattern: re.Pattern | None = None
    ):
        self.questions, self.vocabulary, self.keys, self.pattern = questions, vocabulary, keys, pattern
        vocabulary.rules(keys)  # invalid keys are an error now, not at the first evaluation

    def measure(self, trainer: Trained) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """tokens_per_forward: answer tokens up to EOS over forwards, both summed; exact_match; clipped_ratio: answers
        without EOS; decoded: how many. Also returns the first of this rank's answers for display."""
        in_step = trainer.zero_stage == 3 or trainer.recipe.expert_parallel_size > 1
        mine = slice(None) if in_step else slice(trainer.rank, None, trainer.world_size)
        questions = self.questions[mine]
        trainer.engine.eval()
        policy = InStep(trainer.policy, trainer.device) if in_step else trainer.policy
        pipeline = Pipeline.of(policy, self.vocabulary, self.keys)
        prompts, noise_ids = [question.prompt_ids for question in questions], range(len(self.questions))[mine]
        answers = list(pipeline.answers(prompts, noise_ids=noise_ids))
        trainer.engine.train()
        answered = zip(questions, answers, strict=True)
        hits = [question.is_answered_by(answer, self.vocabulary, self.pattern) for question, answer in answered]
        tokens, forwards = (sum(len(a.token_ids) for a in answers), sum(a.forwards for a in answers))
        clipped = sum(answer.finish_reason == FinishReason.LENGTH for answer in answers)
        sums = torch.tensor([tokens, forwards, sum(hits), clipped, len(hits)], dtype=torch.float64)
        if not in_step:
            distributed.all_reduce_sum(sums)
        tokens, forwards, right, clipped, decoded = sums.tolist()
        shares = {"exact_match": right / decoded, "clipped_ratio": clipped / decoded}
        metrics = {"tokens_per_forward": tokens / forwards, **shares, "decoded": decoded}
        return metrics, [self._preview(*one) for one in zip(questions[:PREVIEWS], answers, hits, strict=False)]

    def _preview(self, question: Question, answer: Answer, right: bool) -> dict[str, Any]:
        """The texts, or the ids without a tokenizer."""
        asked = {"prompt": question.prompt_ids, "expected": question.answer_ids, "answered": answer.token_ids}
        texts = {name: self.vocabulary.text(ids) for name, ids in asked.items()}
        shown = asked if None in texts.values() else texts
        return {**shown, "right": right, "forwards": answer.forwards}


@dataclasses.dataclass(frozen=True)
class InStep:
    """A policy whose forwards need every rank, for the decoder: all ranks get rank 0's logits."""

    policy: Policy
    device: torch.device
    can_be_recorded = False  # the ranks communicate during a forward
    compile_problem = "weights on several ranks, which communicate during a forward: decode with a saved checkpoint"

    @property
    def config(self):
        return self.policy.config

    @property
    def sees_whole_document(self) -> bool | None:
        return self.policy.sees_whole_document

    @property
    def logit_shift(self) -> int:
        return self.policy.logit_shift

    def plan(self, place_RS):
        return self.policy.plan(place_RS)

    def predicting(self, index_N, position_ids_RS):
        return self.policy.predicting(index_N, position_ids_RS)

    def hidden_at(self, chosen_N, inputs_RS, position_ids_RS, visibility, cache) -> torch.Tensor:
        return self.policy.hidden_at(chosen_N, inputs_RS, position_ids_RS, visibility, cache)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.policy.logits(hidden)
        dist.broadcast(logits, src=0)
        return logits
