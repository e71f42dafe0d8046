"""What ends a response: EOS, and the further ids that a checkpoint's generation_config.json lists."""

import json
import shutil

import pytest

from dfactory import Pipeline
from dfactory.decoding.keys import DecodeKeys
from dfactory.vocabulary import read_vocabulary
from tests.families.cases import FOLDER, golden


@pytest.fixture
def listed(tmp_path):
    """SDAR's checkpoint without the golden files, with a list of ids that end a response."""

    def make(ids):
        target = tmp_path / "model"
        shutil.copytree(FOLDER / "sdar", target, ignore=shutil.ignore_patterns("forward.*", "expected.json"))
        (target / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        return target

    return make


@pytest.mark.parametrize(
    "ids, keys, stops",
    [
        ([315, 313], {}, (315,)),
        ([315, 313], {"stop_token_ids": []}, ()),
        ([315, 313], {"stop_token_ids": [7]}, (7,)),
        (313, {}, ()),
        (315, {}, (315,)),  # another one than the tokenizer's: both end a response
        ([313, 10**6, None], {}, ()),  # ids of no token
        (None, {}, ()),
    ],
)
def test_ids_that_end_a_response(listed, ids, keys, stops):
    vocabulary = read_vocabulary(str(listed(ids)), mask_token_id=None, eos_token_id=313)
    assert vocabulary.rules(DecodeKeys(block_size=4, **keys)).stop_token_ids == stops


def test_an_answer_ends_at_a_listed_id(listed):
    """And where none is listed, goes on."""
    prompt = golden("sdar").expected["generations"][0]["prompt"]
    pipeline = Pipeline(listed([313]), dtype="float32", max_new_tokens=16, eos_token_id=313)
    (whole,) = pipeline.generate([prompt])
    stop = whole.token_ids[1]
    assert len(whole.token_ids) == 16
    assert stop not in whole.token_ids[:1]
    (ended,) = pipeline.generate([prompt], stop_token_ids=[stop])
    assert ended.token_ids == whole.token_ids[:2]
    assert ended.finish_reason == "eos"
