"""dfactory.Pipeline: what it answers is what the decoder answers, alone or in a batch, from any kind of model directory."""

import dataclasses
import itertools
import json
import re
import shutil

import pytest
import torch

import dfactory
from dfactory import inference
from dfactory.cli import main
from dfactory.decoding import decode
from dfactory.decoding.keys import DecodeKeys
from dfactory.denoising import Frame, State
from dfactory.errors import CheckpointError, ConfigError, DataError
from dfactory.inference import Pipeline
from dfactory.models.registry import load_policy
from dfactory.models.tiny import TINY_DIR
from dfactory.types import Answer, FinishReason
from dfactory.vocabulary import read_vocabulary
from tests.commands.conftest import GOLDEN, ROOT

ASKED = [{"role": "user", "content": "Which day follows Monday?"}]
PROMPTS = ["a", "one two three four five six seven", ASKED, [44, 45, 46]]
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    """In float32: rounding depends on how many tokens a forward has."""
    keys = {"block_size": 8, "max_new_tokens": 24, "threshold": 0.01}
    return Pipeline("tiny", init_weights="random", device="cpu", dtype="float32", **keys)


def assert_same(found: list[Answer], expected: list[Answer]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.text == other.text
        assert dataclasses.replace(one.rollout, commit_logprob=[]) == dataclasses.replace(
            other.rollout, commit_logprob=[]
        )
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


# --- answers -----------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_decoder(pipeline):
    policy = load_policy("tiny", init_weights="random", dtype="float32")
    vocabulary = read_vocabulary("tiny", mask_token_id=None, eos_token_id=None)
    keys = DecodeKeys(block_size=8, max_new_tokens=24, threshold=0.01)
    encode = vocabulary.encoder
    prompts = [
        encode.encode_text(PROMPTS[0]),
        encode.encode_text(PROMPTS[1]),
        encode.encode_prompt(ASKED),
        [44, 45, 46],
    ]
    answers = pipeline.generate(PROMPTS)
    assert [answer.rollout for answer in answers] == decode(policy, prompts, vocabulary.rules(keys))
    for answer in answers:
        assert answer.text == vocabulary.text(answer.rollout.output_ids)
        assert answer.token_ids == answer.rollout.output_ids
        assert len(answer.logprobs) == len(answer.token_ids) == 24
        assert answer.logprobs == answer.rollout.commit_logprob[:24]
        assert answer.tokens_per_forward == 24 / answer.forwards
        assert answer.finish_reason is FinishReason.LENGTH
    assert_same([pipeline.chat(ASKED)], answers[2:3])


@pytest.mark.parametrize("keys", [{}, {"temperature": 1.0, "acceptance": "top"}, {"editing_threshold": 0.0}])
def test_an_answer_does_not_depend_on_the_others(pipeline, keys, monkeypatch):
    together = pipeline.generate(PROMPTS, **keys)
    alone = [pipeline.generate([prompt], noise_ids=[n], **keys)[0] for n, prompt in enumerate(PROMPTS)]
    assert_same(together, alone)
    assert_same([pipeline.chat(PROMPTS[2], noise_id=2, **keys)], together[2:3])
    assert_same(pipeline.generate(PROMPTS, batch_size=2, **keys), together)
    monkeypatch.setattr(inference, "PROMPTS_AT_ONCE", 3)
    assert_same(pipeline.generate(PROMPTS, **keys), together)


def test_the_seed_decides_what_is_drawn(pipeline):
    keys = {"temperature": 1.0, "acceptance": "top"}
    first, again, other = (pipeline.generate(PROMPTS, seed=seed, **keys) for seed in (1, 1, 2))
    assert first == again != other
    same = pipeline.generate(["a", "a"], **keys)
    assert same[0].token_ids != same[1].token_ids
    assert len({tuple(answer.token_ids) for answer in pipeline.generate(["a", "a"], noise_ids=[5, 5], **keys)}) == 1


def test_keys_of_a_call_are_for_that_call(pipeline):
    assert len(pipeline.generate(["a"], max_new_tokens=5)[0].token_ids) == 5
    assert len(pipeline.chat(ASKED, max_new_tokens=6).token_ids) == 6
    assert (
        list(pipeline.stream("a", max_new_tokens=7))[-1].answer.token_ids == pipeline.generate(["a"])[0].token_ids[:7]
    )
    assert pipeline.keys.max_new_tokens == pipeline.rules.max_new_tokens == 24
    assert pipeline.over({}) is pipeline


def test_tools_are_shown_to_the_model(pipeline):
    plain, shown = pipeline.encode_chat(ASKED), pipeline.encode_chat(ASKED, [TOOL])
    assert "clock" in pipeline.vocabulary.tokenizer.decode(shown)
    assert "clock" not in pipeline.vocabulary.tokenizer.decode(plain)
    assert pipeline.chat(ASKED, tools=[TOOL]).rollout.prompt_ids == shown
    assert next(pipeline.stream(ASKED, [TOOL])).forwards == 1


def test_a_chat_template_of_ones_own(tmp_path):
    file = tmp_path / "plain.jinja"
    file.write_text("{% for message in messages %}Q: {{ message.content }}\n{% endfor %}A:")
    own = Pipeline("tiny", init_weights="random", device="cpu", chat_template_path=str(file))
    assert own.vocabulary.tokenizer.decode(own.encode(ASKED)) == "Q: Which day follows Monday?\nA:"


# --- forward by forward ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{}, {"editing_threshold": 0.0, "max_post_steps": 2}])
def test_frames_lead_to_the_answer(pipeline, keys):
    frames = list(pipeline.stream(ASKED, **keys))
    (answer,) = pipeline.generate([ASKED], **keys)
    assert frames[-1].answer == answer
    assert [frame.answer for frame in frames[:-1]] == [None] * (len(frames) - 1)
    assert [frame.forwards for frame in frames] == list(range(1, answer.forwards + 1))
    assert frames[-1].settled == answer.text
    assert len({frame.settled for frame in frames}) > 2  # it grows block by block
    for before, after in itertools.pairwise(frames):
        assert after.settled.startswith(before.settled)
    states = {run.state for frame in frames for run in frame.runs}
    assert states >= {State.MASKED, State.FRESH, State.EDITED if keys else State.COMMITTED}
    assert frames[0].rule == "threshold 0.01"


def test_keys_change_while_an_answer_is_decoded(pipeline):
    stream = pipeline.stream(ASKED, threshold=1.0)
    slow = [next(stream) for _ in range(3)]
    assert [frame.tokens for frame in slow] == [1, 2, 3]
    stream.go_on_with(pipeline.over({"threshold": 0.0, "max_new_tokens": 500}))
    rest = list(stream)
    assert len(rest) < 6
    assert len(rest[-1].answer.token_ids) == 24  # the document was laid out for so many
    assert (slow[-1].rule, rest[-1].rule) == ("threshold 1", "threshold 0")
    assert list(stream) == []


# --- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [False, True])
def test_a_run_of_adapters_decodes_by_its_own_block_size(lora_run, tmp_path, merged):
    model = lora_run
    if merged:
        assert main(["export", "--model", str(lora_run), "--output", str(tmp_path / "merged")]) == 0
        model = tmp_path / "merged"
    pipeline = Pipeline(model, eos_token_id=94, max_new_tokens=12)
    assert (pipeline.keys.block_size, pipeline.rules.mask_token_id) == (8, 95)
    (answer,) = pipeline.generate([[1, 2, 3]])
    assert answer.text is None
    (alone,) = decode(load_policy(lora_run, merged=merged), [[1, 2, 3]], pipeline.rules)
    assert answer.token_ids == alone.output_ids
    assert [frame.answer for frame in pipeline.stream([1, 2, 3])][-1].token_ids == alone.output_ids


def test_a_run_folder_and_its_checkpoint_are_one_model(golden_run):
    run, checkpoint = (Pipeline(model, eos_token_id=156) for model in (golden_run, golden_run / "checkpoint-3"))
    assert run.generate([[3, 4, 5]], max_new_tokens=9) == checkpoint.generate([[3, 4, 5]], max_new_tokens=9)


def test_a_model_that_sees_whole_documents_has_the_longest_answer_as_its_block():
    """Also where a call says how long that is."""
    ids = {"mask_token_id": 318, "eos_token_id": 312, "threshold": 0.01}
    long, short = (Pipeline(ROOT / "tests/golden/families/dream", **ids, max_new_tokens=n) for n in (24, 12))
    assert (long.rules.block_size, short.rules.block_size) == (24, 12)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9]]
    assert_same(long.generate(prompts, max_new_tokens=12), short.generate(prompts))
    stream = short.stream(prompts[1], threshold=1.0)
    assert next(stream).tokens == 1
    stream.go_on_with(long)  # its longest answer does not count here
    assert len(list(stream)[-1].answer.token_ids) <= 12


def test_generate_on_the_command_line_answers_the_same(pipeline, tmp_path):
    rows = [{"prompt": PROMPTS[0]}, {"prompt": PROMPTS[1]}, {"messages": ASKED}, {"prompt_ids": PROMPTS[3]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", "tiny", "--init-weights", "random", "--dtype", "float32"]
    words += ["decode.block_size=8", "decode.max_new_tokens=24"]
    words += ["decode.threshold=0.01", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert main(["generate", *words]) == 0
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    answers = pipeline.generate(PROMPTS)
    assert [row["output_ids"] for row in written] == [answer.token_ids for answer in answers]
    assert [row["text"] for row in written] == [answer.text for answer in answers]


# --- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"treshold": 0.9}, "unknown key treshold in the keyword arguments; did you mean threshold?"),
        ({"threshold": 2.0}, "threshold 2.0 in the keyword arguments: it must be at most 1"),
        ({"threshold": "0.9"}, "threshold in the keyword arguments: it must be float, is str"),
        ({"mask_token_id": 3}, "mask_token_id in the keyword arguments: the tokenizer was read with it"),
    ],
)
def test_keys_that_cannot_be(pipeline, keys, message):
    for ask in (pipeline.generate, pipeline.stream):
        with pytest.raises(ConfigError, match=re.escape(message)):
            ask(["a"] if ask == pipeline.generate else "a", **keys)
    if "mask_token_id" not in keys:
        with pytest.raises(ConfigError, match=re.escape(message)):
            Pipeline("tiny", init_weights="random", **keys)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p: p.generate("a b"), "prompts is one text: give a list of prompts"),
        (lambda p: p.generate(["a", ""]), "prompt 1 is empty"),
        (lambda p: p.generate([[1.5]]), "prompt[0] is float 1.5: it must be an integer"),
        (lambda p: p.generate([[5000]]), "prompt 0 holds ids outside the model's vocabulary of 2048"),
        (lambda p: p.generate([3]), "prompt is int 3: it must be text, messages or token ids"),
        (lambda p: p.generate(ASKED), "prompt is dict"),
        (lambda p: p.generate(["a"], noise_ids=[1, 2]), "noise_ids has 2 entries for 1 prompts: give one each"),
        (lambda p: p.chat("hi"), "messages is str 'hi'"),
        (lambda p: p.chat([{"role": "boss", "content": "x"}]), "messages[0].role is str 'boss'"),
        (lambda p: p.chat([*ASKED, {"role": "assistant", "content": "x"}]), "a turn is answered, not continued"),
        (lambda p: p.stream("a", [TOOL]), "tools are shown to the model by its chat template: give messages"),
        (lambda p: p.stream(""), "prompt 0 is empty"),
    ],
)
def test_prompts_that_cannot_be(pipeline, call, message):
    with pytest.raises(DataError, match=re.escape(message)):
        call(pipeline)


def test_a_model_without_a_tokenizer_takes_ids(tmp_path):
    plain = Pipeline(GOLDEN, mask_token_id=158, eos_token_id=156, block_size=8, max_new_tokens=8)
    assert plain.generate([[1, 2, 3]])[0].text is None
    with pytest.raises(DataError, match="the model directory has no tokenizer: give token ids"):
        plain.generate(["a"])
    with pytest.raises(CheckpointError, match="is not a directory"):
        Pipeline(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="mask_token_id is null and there is no tokenizer"):
        Pipeline(GOLDEN)


def test_a_tokenizer_without_a_chat_template(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(TINY_DIR, model)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    stated = json.loads((model / "tokenizer_config.json").read_text())
    stated.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(stated))
    with pytest.raises(ConfigError, match="has no chat template"):
        Pipeline(model, device="cpu").chat(ASKED)


# --- the documented way ------------------------------------------------------------------------------------------------


def run_examples(code: str) -> dict:
    """Its names after it has run on the embedded model."""
    names: dict = {}
    exec(compile(code.replace("runs/mine", "tiny"), "documentation", "exec"), names)
    return names


def test_the_example_of_the_readme_runs(capsys):
    """The first block of its section on Python."""
    section = (ROOT / "README.md").read_text().partition("\n## Python\n")[2]
    block = re.search(r"\n((?:    .*\n)+)", section).group(1)
    assert "dfactory.Pipeline(" in block
    names = run_examples("\n".join(line[4:] for line in block.splitlines()))
    assert [type(answer) for answer in names["answers"]] == [dfactory.Answer] * 2
    assert len(names["answers"][0].token_ids) <= 64
    shown = capsys.readouterr().out
    assert names["answer"].text in shown
    assert names["frame"].marked in shown


def test_the_examples_of_its_page_run(capsys):
    page = (ROOT / "docs/pipeline.md").read_text()
    names = run_examples("\n".join(re.findall(r"^```python\n(.*?)```", page, re.MULTILINE | re.DOTALL)))
    assert len(names["short"][0].token_ids) <= 16
    assert names["frame"].answer.text == names["answer"].text
    assert capsys.readouterr().out.splitlines()[-1] == names["answer"].text
    for kind, table in ((dfactory.Answer, "field of an `Answer`"), (Frame, "field of a `Frame`")):
        rows = page.partition(f"| {table} |")[2].partition("\n\n")[0].splitlines()[2:]
        fields = [name for row in rows for name in re.findall(r"`(\w+)`", row.split(" | ")[0])]
        assert len(fields) > 5
        assert all(name in kind.__annotations__ or hasattr(kind, name) for name in fields)


def test_nobody_forges_the_words_of_a_command():
    """A Namespace is made by a parser. This page's own pattern is split, so that it does not find itself."""
    forged = re.compile(r"(?<!Simple)Name" + r"space\(")
    files = [
        file
        for part in ("dfactory", "data_tools", "benchmarks", "tests", "examples")
        for file in (ROOT / part).rglob("*.py")
    ]
    assert len(files) > 200
    assert [str(file) for file in files if forged.search(file.read_text())] == []


def test_loading_onto_a_device_and_in_another_precision():
    policy = Pipeline("tiny", init_weights="random", device="cpu", dtype="bfloat16").policy
    assert (policy.device.type, policy.model.dtype) == ("cpu", torch.bfloat16)
