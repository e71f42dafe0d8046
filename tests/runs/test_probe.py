"""Decoding during training: the same numbers however the ranks share the work, and training goes on as without it."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from dfactory.assembly import make_probe, read_inputs
from dfactory.data.chat import SpecialIds
from dfactory.errors import DataError
from dfactory.inference import Pipeline
from dfactory.recipe import load_recipe
from dfactory.runs.probe import Question, first_questions
from dfactory.types import Answer, Example
from dfactory.vocabulary import Vocabulary, read_vocabulary
from tests.engine.conftest import read_metrics
from tests.engine.test_equality import ZERO

PROMPTS = 5
KEYS = ["max_steps=4", "eval_steps=2", "learning_rate=0.01", "decode.max_new_tokens=20", "decode.threshold=0.5"]


def example(ids: list[int], trainable: list[int]) -> Example:
    return Example(0, np.array(ids, np.int32), np.array(trainable, bool))


def answer(output_ids: list[int], vocabulary: Vocabulary) -> Answer:
    return vocabulary.answer(SimpleNamespace(output_ids=output_ids))


def test_a_question_is_the_document_up_to_its_first_answer():
    assert Question.of(example([5, 6, 7, 8, 9], [0, 0, 1, 1, 0])) == ([5, 6], [7, 8])
    assert Question.of(example([5, 6, 7, 8], [0, 1, 1, 1])) == ([5], [6, 7, 8])
    assert Question.of(example([5, 6], [1, 1])).prompt_ids == []


@pytest.mark.parametrize("output, expected", [([7, 8, 0], True), ([7, 0], False), ([7, 8, 8], False), ([7], False)])
def test_an_answer_has_the_same_tokens_up_to_eos(output, expected):
    plain = Vocabulary(9, SpecialIds(1, 0, (1,), ()), None, None)
    assert Question([5], [7, 8, 0]).is_answered_by(answer(output, plain), plain) is expected


def test_an_answer_has_the_same_text():
    tiny = read_vocabulary("tiny", mask_token_id=None, eos_token_id=None)
    text, end = tiny.encoder.encode_text("Friday"), tiny.tokenizer.convert_tokens_to_ids("<|role_end|>")
    question = Question([5], [*text, end, tiny.special.eos])
    assert question.is_answered_by(answer([*text, tiny.special.eos], tiny), tiny)
    assert not question.is_answered_by(answer([*text, *text, tiny.special.eos], tiny), tiny)


def test_an_answer_has_the_captured_text():
    tiny = read_vocabulary("tiny", mask_token_id=None, eos_token_id=None)
    ids = {text: [*tiny.encoder.encode_text(text), tiny.special.eos] for text in ("4. So: 7.", "3. So: 7.", "So: 8.")}
    expected, other_way, wrong = (ids[text] for text in ids)
    question, pattern = Question([5], expected), re.compile(r"So: (.+)\.")
    assert question.is_answered_by(answer(other_way, tiny), tiny, pattern)
    assert not question.is_answered_by(answer(other_way, tiny), tiny)
    assert not question.is_answered_by(answer(wrong, tiny), tiny, pattern)


def test_the_recipes_pattern_reaches_the_probe(recipe_file):
    recipe = load_recipe(recipe_file, ["eval_decode_prompts=1", r"eval_answer_pattern='So: (.+)\.'"])
    assert make_probe(recipe, read_inputs(recipe)).pattern == re.compile(r"So: (.+)\.")


def test_documents_without_a_prompt_are_passed_over(recipe_file, tmp_path):
    plain = {"input_ids": [1, 2, 3], "prompt_lengths": 0}
    (tmp_path / "plain.jsonl").write_text(json.dumps(plain) + "\n")
    (tmp_path / "mixed.jsonl").write_text(json.dumps(plain) + "\n" + json.dumps(plain | {"prompt_lengths": 2}) + "\n")

    def questions(name: str) -> list[Question]:
        recipe = load_recipe(recipe_file, [f"eval_datasets=[{{path: {tmp_path / name}}}]"])
        return first_questions(read_inputs(recipe).held_out, 2)

    assert [question.prompt_ids for question in questions("mixed.jsonl")] == [[1, 2]]
    with pytest.raises(DataError, match="has a prompt before its answer"):
        questions("plain.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_policy_in_training_is_decoded(recipe_file, run_jobs, tmp_path, processes):
    """ZeRO 0 shares the prompts, ZeRO 3 decodes in step: what the saved checkpoint does alone; losses are untouched."""
    jobs = {}
    for stage, prompts in ((0, PROMPTS), (3, PROMPTS), (3, 0)):
        run = tmp_path / f"zero{stage}-{prompts}"
        rows = f"per_device_train_batch_size={8 // processes}"
        jobs[run] = [ZERO[stage], f"output_dir={run}", *KEYS, f"eval_decode_prompts={prompts}", rows]
    run_jobs(processes, [(recipe_file, overrides) for overrides in jobs.values()])

    shared, in_step, without = jobs
    for run in (shared, in_step):
        assert read_metrics(run) == pytest.approx(read_metrics(without), abs=1e-5)
        assert read_metrics(run, "eval/decoded") == [PROMPTS, PROMPTS]
        assert read_metrics(run, "eval/exact_match") == [0.0, 0.0]
        previews = [json.loads(line) for line in (run / "previews.jsonl").read_text().splitlines()]
        assert [preview["step"] for preview in previews] == [2] * (len(previews) // 2) + [4] * (len(previews) // 2)
        assert all(preview["prompt"] and preview["answered"] and preview["forwards"] for preview in previews)
        first, last = read_metrics(run, "eval/tokens_per_forward")
        assert first != last == pytest.approx(_alone(recipe_file, run))
    assert not read_metrics(without, "eval/tokens_per_forward")
    assert not (without / "previews.jsonl").exists()


def _alone(recipe_file, run) -> float:
    """Tokens per forward of the last checkpoint, decoded by itself."""
    recipe = load_recipe(recipe_file, [*KEYS, f"eval_decode_prompts={PROMPTS}"])
    probe = make_probe(recipe, read_inputs(recipe))
    ids = {"mask_token_id": recipe.mask_token_id, "eos_token_id": recipe.eos_token_id}  # there is no tokenizer
    pipeline = Pipeline(run / "checkpoint-4", keys=probe.keys, **ids)
    answers = pipeline.generate([question.prompt_ids for question in probe.questions])
    return sum(len(answer.token_ids) for answer in answers) / sum(answer.forwards for answer in answers)
