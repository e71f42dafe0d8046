"""What `dfactory export` writes is read by what people use, with equal tokens (docs/readers.md has the table).

Readers that are not installed are skipped by name. llama.cpp's converter is a script of its repository: LLAMA_CPP names a
folder with convert_hf_to_gguf.py, which also needs sentencepiece.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dfactory
from dfactory.cli import main
from dfactory.decoding import DecodeRules
from dfactory.decoding.keys import DecodeKeys
from dfactory.models.registry import load_policy
from dfactory.models.tiny import TINY_DIR
from tests.commands.conftest import save_plain

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
GOLDEN = ROOT / "tests/golden"
LLAMA_CPP = Path(os.environ.get("LLAMA_CPP", "/nonexistent"))
THRESHOLD, LENGTH, BLOCK = 0.6, 24, 8
OURS = {"threshold": THRESHOLD, "max_new_tokens": LENGTH, "suppress_special": False}


def python(*words: object, **variables: str) -> str:
    """What a program prints in a process of its own, in which dFactory is not imported unless it does so itself."""
    path = os.pathsep.join(filter(None, (str(ROOT), variables.pop("path", ""), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | variables
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """The embedded model, exported in float32."""
    directory = tmp_path_factory.mktemp("exported") / "model"
    assert main(["export", "--model", str(TINY_DIR), "--output", str(directory), "--dtype", "float32"]) == 0
    return directory


def prompts_of(pipeline: dfactory.Pipeline) -> list[list[int]]:
    """Such that prompt and response fill whole blocks."""
    text = pipeline.encode("Write these letters in reverse order: APPLE, then the days of the week and the months")
    block = pipeline.rules.block_size
    return [text[:length] for length in (block - LENGTH % block, 2 * block - LENGTH % block)]


def test_diffusers_with_the_policy_as_its_model(exported, capsys):
    pytest.importorskip("diffusers")
    from examples import read_with_diffusers

    ours = dfactory.Pipeline(exported, **OURS)
    prompts = prompts_of(ours)
    expected = [answer.token_ids for answer in ours.generate(prompts)]
    assert all(len(ids) > 4 for ids in expected)
    for prompt, ids in zip(prompts, expected, strict=True):
        words = ["--threshold", str(THRESHOLD), "--max-new-tokens", str(LENGTH), "--prompt-ids", json.dumps(prompt)]
        assert read_with_diffusers.main(["--model", str(exported), *words]) == 0
        assert json.loads(capsys.readouterr().out)["token_ids"] == list(ids)


def test_lm_eval(exported, tmp_path, monkeypatch):
    """Its answers are those of the Pipeline, cut at the end of the line. tests/commands/test_harness.py runs lm-eval's own
    command line."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'dfactory[eval]'")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    question = "Write these letters in reverse order: APPLE"
    (tmp_path / "ask.jsonl").write_text(json.dumps({"question": question, "answer": "ELPPA"}) + "\n")
    task = {
        **{"task": "ask", "dataset_path": "json", "test_split": "test", "output_type": "generate_until"},
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "ask.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        **{"doc_to_text": "{{question}}", "doc_to_target": "{{answer}}"},
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": LENGTH, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "ask.yaml").write_text(json.dumps(task))
    words = ["--lm-eval", "ask", "--include-path", str(tmp_path), "--output", str(tmp_path / "results.json")]
    assert main(["eval", "--model", str(exported), *words, f"decode.threshold={THRESHOLD}"]) == 0
    (sample,) = json.loads((tmp_path / "results.json").read_text())["samples"]["ask"]
    (answer,) = dfactory.Pipeline(exported, threshold=THRESHOLD, max_new_tokens=LENGTH).generate([question])
    assert sample["resps"][0][0] == answer.text.split("\n")[0]


@pytest.mark.parametrize("name", ["llada2_tiny", "llada21_tiny"])
def test_carried_code_in_transformers_and_diffusers(name, tmp_path):
    """The Python files beside the weights are exported with them. transformers runs those, diffusers decodes with them, and
    the tokens are the ones that LLaDA2's original code generated from these weights, with editing too."""
    pytest.importorskip("diffusers")
    source, exported = tmp_path / "source", tmp_path / "exported"
    shutil.copytree(GOLDEN / name, source)
    shutil.copy(HERE / "carried/modeling_plain.py", source)
    config = json.loads((source / "config.json").read_text())
    classes = {"AutoConfig": "modeling_plain.PlainConfig", "AutoModelForCausalLM": "modeling_plain.LLaDA2MoeModelLM"}
    (source / "config.json").write_text(json.dumps(config | {"auto_map": classes}))
    assert main(["export", "--model", str(source), "--output", str(exported)]) == 0
    assert (exported / "modeling_plain.py").read_bytes() == (source / "modeling_plain.py").read_bytes()

    golden = json.loads((GOLDEN / name / "expected.json").read_text())
    stated = [case for case in golden["generations"] if case["block_length"] == BLOCK]
    common = {
        **{"block_length": BLOCK, "num_inference_steps": 64, "eos_early_stop": False},  # as many forwards as it takes
        **{"mask_token_id": golden["mask_token_id"], "eos_token_id": golden["eos_token_id"]},
    }
    cases = [
        common
        | {name: case[name] for name in ("prompt", "gen_length", "threshold")}
        | {"editing_threshold": case.get("editing_threshold"), "max_post_steps": case.get("max_post_steps", 16) - 1}
        for case in stated  # diffusers counts the forward that finds no mask left as none of the post steps
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    told = python(
        HERE / "read_carried.py", exported, tmp_path / "cases.json", HF_MODULES_CACHE=str(tmp_path / "modules")
    )
    found = json.loads(told.splitlines()[-1])
    assert "transformers_modules" in found["code"]
    for case, response in zip(stated, found["responses"], strict=True):
        tail = (
            len(case["prompt"]) + case["gen_length"]
        ) % BLOCK  # which the pipeline pads, and the original decodes whole
        whole = case["gen_length"] - tail
        expected = case["output"][:whole]
        assert response[: len(expected)] == expected


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_plain_transformers(family, tmp_path):
    """A loop of 20 lines over AutoModelForCausalLM, without dFactory."""
    source, exported = save_plain(tmp_path / "source", family, tied=False), tmp_path / "exported"
    assert main(["export", "--model", str(source), "--output", str(exported)]) == 0
    ids = {"mask_token_id": 90, "eos_token_id": 91}
    ours = dfactory.Pipeline(exported, block_size=BLOCK, full_attention=False, **ids, **OURS)
    prompt = [3, 14, 15, 9, 2, 6, 5, 35]
    (expected,) = ours.generate([prompt])
    words = ["--threshold", THRESHOLD, "--max-new-tokens", LENGTH, "--block-size", BLOCK]
    words += ["--mask-token-id", 90, "--eos-token-id", 91, "--prompt-ids", json.dumps(prompt)]
    script = ROOT / "examples/read_with_transformers.py"
    assert "dfactory" not in [line.split()[1] for line in script.read_text().splitlines() if line.startswith("import")]
    found = json.loads(python(script, "--model", exported, *words).splitlines()[-1])
    assert found["token_ids"] == list(expected.token_ids)


@pytest.fixture
def pieces(tmp_path) -> Path:
    """A directory with a sentencepiece tokenizer of 96 pieces, which llama.cpp's converter takes as it is; tokenizers of
    other kinds it has to know."""
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed, which llama.cpp's converter imports")
    text = ROOT / "recipes/quickstart/data/heldout.jsonl"
    train = (
        "import sentencepiece as s, sys; s.SentencePieceTrainer.train(input=sys.argv[1], model_prefix=sys.argv[2], "
        "vocab_size=96, model_type='bpe', character_coverage=0.98, minloglevel=2)"
    )
    folder = tmp_path / "source"
    folder.mkdir()
    python("-c", train, text, folder / "tokenizer")
    return folder


@pytest.mark.skipif(not (LLAMA_CPP / "convert_hf_to_gguf.py").is_file(), reason="LLAMA_CPP names no llama.cpp")
@pytest.mark.parametrize("family", ["llama"])
def test_gguf_by_the_converter_of_llama_cpp(family, pieces, tmp_path):
    """The converter reads an export; what it wrote, read back from GGUF, decodes to the same tokens."""
    save_plain(pieces, family, tied=False)
    exported, file, back = tmp_path / "exported", tmp_path / "model.gguf", tmp_path / "back"
    assert main(["export", "--model", str(pieces), "--output", str(exported)]) == 0
    words = (exported, "--outfile", file, "--outtype", "f32")
    python(LLAMA_CPP / "convert_hf_to_gguf.py", *words, path=str(LLAMA_CPP / "gguf-py"))
    assert main(["data", "gguf", str(file), "--output", str(back), "--dtype", "float32"]) == 0
    # without a tokenizer: dFactory takes none that puts a space before each text, as sentencepiece's do
    keys = DecodeKeys(block_size=BLOCK, **OURS)
    rules = DecodeRules.of(keys, mask_token_id=90, eos_token_id=91)
    prompt = [3, 14, 15, 9, 2, 6, 5, 35]
    of_export, of_gguf = (dfactory.decode(load_policy(model), [prompt], rules)[0] for model in (exported, back))
    assert of_export.token_ids == of_gguf.token_ids
    assert len(of_export.token_ids) > 4
