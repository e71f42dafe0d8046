"""What a user gets wrong: every mistake is a message that names the key or the line, the right status, and no leftovers."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import pytest
import yaml

import dfactory
from dfactory.cli import VERBS, main
from dfactory.config.load import known_keys
from dfactory.decoding.keys import DecodeKeys
from dfactory.recipe import Recipe
from tests.engine.conftest import GOLDEN, write_records

TEXT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}


@pytest.fixture
def recipe(tmp_path):
    """recipe(key=value, ...) writes a YAML file that would train; keys are laid over it."""

    def write(**changes):
        keys = {
            "model_name_or_path": str(GOLDEN),
            "mask_token_id": 158,
            "eos_token_id": 156,
            "dtype": "float32",
            "datasets": [{"path": str(write_records(tmp_path / "train.jsonl", 8, seed=1))}],
            "block_size": 8,
            "max_length": 40,
            "max_steps": 1,
            "output_dir": str(tmp_path / "run"),
        }
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(keys | changes))
        return str(file)

    return write


def _fails(capsys, tmp_path, words: list[str], status: int, *expected: str) -> None:
    assert main(words) == status
    message = capsys.readouterr().err
    for part in expected:
        assert part in message, message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "override, expected",
    [
        ("learing_rate=1", ("unknown key learing_rate", "did you mean learning_rate?")),
        ("model.name=x", ("unknown key model",)),
        ("dtype=float31", ("dtype float31", "bfloat16, float32", "did you mean float32?")),
        ("learning_rate=fast", ("learning_rate", "fast")),
        ("learning_rate=-1", ("learning_rate -1", "at least 0")),
        ("noise_range_low=0.9", ("noise_range_low 0.9 > noise_range_high 0.8", "swap them")),
        ("block_size=7", ("block_size 7 does not divide max_length 40", "use 35")),
        ("row_length=60", ("row_length 60", "raise it to 120")),
        ("mask_token_id=160", ("mask_token_id 160", "160")),
        ("mask_token_id=156", ("mask_token_id", "156")),
        ("datasets=[]", ("datasets is empty",)),
        ("loss_weight=elbo noise_range_low=0", ("divides by zero",)),
        ("mask_count=exact", ("mask_count exact", "noise_range_low is 0.3", "set them to 0 and 1")),
        ("decode.treshold=0.9", ("unknown key decode.treshold", "did you mean decode.threshold?")),
        ("decode.threshold=2", ("decode.threshold 2", "at most 1")),
        ("decode.step_schedule=ascending", ("decode.step_schedule ascending without decode.steps", "set decode.steps")),
        ("decode.steps=9", ("decode.steps 9 > block_size 8", "lower it")),
        ("decode.mask_token_id=3", ("decode.mask_token_id", "a recipe has one mask_token_id")),
        ('datasets=[{"weight":2}]', ("datasets: give each entry either path or name",)),
        (
            'eval_datasets=[{"path":"a.jsonl","name":"org/set"}]',
            ("eval_datasets: give each entry either path or name",),
        ),
        (
            'datasets=[{"path":"a.csv","split":"test"}]',
            ("datasets.split belong(s) to a dataset of the hub", "a.csv is a file"),
        ),
        ("revision=main", ("unknown key revision", "model_revision")),
        ("eval_answer_pattern=four", ("eval_answer_pattern 'four' has no group",)),
        ("eval_decode_prompts=4", ("eval_decode_prompts 4", "no eval_datasets")),
        ("deepspeed=nowhere.json", ("deepspeed nowhere.json does not exist",)),
        ("deepspeed_overrides.gradient_clipping=7", ("gradient_clipping 7", "the recipe")),
        ("dtype=bfloat16 deepspeed_overrides.zero_optimization.stage=0", ("stage 0", "use stage 1")),
        ("lora_target_modules=[nothing] use_peft=true", ("lora_target_modules", "nothing")),
        ("lora_target_modules=[lm_head] use_peft=true", ("lm_head", "leave it out")),
        ("init_weights=random use_peft=true", ("init_weights random", "use_peft")),
        ("edit_share=0.1 loss_weight=elbo", ("loss_weight elbo with edit_share 0.1", "use uniform")),
        ("num_turns=2 loss_weight=elbo", ("num_turns 2", "use uniform")),
        ("edit_share=0.1 stage=dpo", ("stage dpo with edit_share 0.1", "set edit_share 0")),
        ("edit_source=model", ("edit_source model with edit_share 0", "raise edit_share")),
        ("num_turns=2 row_length=199", ("row_length 199", "raise it to 200")),
    ],
)
def test_wrong_keys_exit_2(recipe, tmp_path, capsys, override, expected):
    _fails(capsys, tmp_path, ["train", recipe(), *override.split()], 2, *expected)


def test_missing_recipe_and_missing_key(recipe, tmp_path, capsys):
    _fails(capsys, tmp_path, ["train", "nowhere.yaml"], 2, "nowhere.yaml does not exist")
    file = tmp_path / "empty.yaml"
    file.write_text("dtype: float32\n")
    _fails(capsys, tmp_path, ["train", str(file)], 2, "model_name_or_path", "output_dir", "missing")


@pytest.mark.parametrize(
    "lines, expected",
    [
        (["{"], ("bad.jsonl:2",)),
        (['{"input_ids": "no", "prompt_lengths": 1}'], ("bad.jsonl:2", "input_ids")),
        (['{"input_ids": [1, 2, 999], "prompt_lengths": 1}'], ("bad.jsonl:2", "999")),
        (['{"input_ids": [1, 158, 3], "prompt_lengths": 1}'], ("bad.jsonl:2", "158")),
        (['{"input_ids": [1, 2], "prompt_lengths": 2}'], ("bad.jsonl:2",)),
        ([json.dumps({"input_ids": [1] * 50, "prompt_lengths": 45})], ("bad.jsonl:2", "max_length")),
    ],
)
def test_a_bad_line_in_the_middle_is_named(recipe, tmp_path, capsys, lines, expected):
    good = '{"input_ids": [1, 2, 3], "prompt_lengths": 1}'
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join([good, *lines, good]) + "\n")
    file = recipe(datasets=[{"path": str(bad)}])
    _fails(capsys, tmp_path, ["train", file], 1, *expected)
    _fails(capsys, tmp_path, ["train", file, "on_bad_row=skip"], 1, "max_bad_fraction", "0.01")


def test_text_without_a_tokenizer(recipe, tmp_path, capsys):
    (tmp_path / "text.jsonl").write_text(json.dumps(TEXT) + "\n")
    file = recipe(datasets=[{"path": "text.jsonl"}])
    _fails(capsys, tmp_path, ["train", file], 2, "text.jsonl:1", "tokenizer")


def test_missing_and_empty_data(recipe, tmp_path, capsys):
    _fails(capsys, tmp_path, ["train", recipe(datasets=[{"path": "nowhere.jsonl"}])], 1, "nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    _fails(capsys, tmp_path, ["train", recipe(datasets=[{"path": "empty.jsonl"}])], 1, "empty.jsonl")


def test_missing_model(recipe, tmp_path, capsys):
    _fails(
        capsys,
        tmp_path,
        ["train", recipe(model_name_or_path="nowhere")],
        1,
        "model_name_or_path nowhere is not a directory",
    )


def test_generate_names_the_line(tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt_ids": [1, 2]}\n{"prompt": "text"}\n')
    words = ["generate", "--model", str(GOLDEN), "--input", str(prompts), "--output", str(tmp_path / "out.jsonl")]
    words += ["mask_token_id=158", "decode.eos_token_id=156"]
    _fails(capsys, tmp_path, words, 1, "prompts.jsonl:2", "prompt_ids")
    assert not (tmp_path / "out.jsonl").exists()
    _fails(capsys, tmp_path, [*words, "decode.treshold=1"], 2, "did you mean threshold?")


def test_generate_without_a_tokenizer(tmp_path):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt_ids": [1, 2, 3], "name": "kept"}\n')
    words = ["generate", "--model", str(GOLDEN), "--dtype", "float32", "--input", str(prompts), "--output", str(output)]
    ids = ["decode.mask_token_id=158", "decode.eos_token_id=156", "decode.block_size=8", "decode.max_new_tokens=10"]
    assert main([*words, *ids]) == 0
    row = json.loads(output.read_text())
    assert row["name"] == "kept"
    assert len(row["output_ids"]) <= 10
    assert row["finish_reason"] in ("eos", "length")
    assert row["tokens_per_forward"] == len(row["output_ids"]) / row["forwards"]


def test_usage_errors_exit_2():
    for words in (["train"], ["fly"], ["generate", "--model", "x"], ["report", "x", "stray=1", "--odd"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2


def test_schema_names_every_key(capsys):
    assert main(["schema"]) == 0
    told = capsys.readouterr().out
    for schema, prefix in ((Recipe, ""), (DecodeKeys, "decode.")):
        for name, field in known_keys(schema, prefix).items():
            if dataclasses.is_dataclass(field.type):
                continue
            assert f"  {name}: " in told, name
            assert field.metadata["help"], name


def test_help_is_answered_without_heavy_imports():
    code = "import sys; sys.argv = ['dfactory', '--help']\ntry:\n    import dfactory.cli; dfactory.cli.main()\n"
    code += "except SystemExit: print(sorted({'torch', 'transformers', 'deepspeed', 'omegaconf'} & set(sys.modules)))"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    assert time.monotonic() - started < 20


def test_public_names():
    assert set(dfactory.__all__) <= {name for name in dfactory.__all__ if getattr(dfactory, name) is not None}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dfactory.nothing


@pytest.mark.parametrize("words", [["doctor"], ["schema", "--markdown"], ["recipes"]], ids=lambda words: words[0])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_goes_away_ends_a_verb_quietly(words, unbuffered):
    """`dfactory doctor | head`, also where all of the output fits a buffer."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "dfactory.cli", *words],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_console_of_rich_ends_quietly_too():
    reading, writing = os.pipe()
    os.close(reading)
    try:
        code = "import sys; from dfactory import cli, console; cli._run = lambda _: console.plain_console().print('a')"
        done = subprocess.run([sys.executable, "-c", f"{code}; sys.exit(cli.main())"], stdout=writing, stderr=-1)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_another_broken_pipe_is_an_error(monkeypatch):
    def broken(arguments, overrides):
        raise BrokenPipeError("of a connection")

    recipes = next(verb for verb in VERBS if verb.name == "recipes")
    monkeypatch.setattr("dfactory.cli.VERBS", (recipes._replace(run=broken),))
    with pytest.raises(BrokenPipeError):
        main(["recipes"])
