"""The card of an export: what a chain of real runs was made from, read back by huggingface_hub; nothing private in it."""

import contextlib
import getpass
import hashlib
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from dfactory.cli import main
from dfactory.commands.cards.markdown import code, fenced, plain
from dfactory.commands.export import About, export
from dfactory.models.saving import save_policy
from dfactory.redaction import MARK
from dfactory.runs.lineage import FILE, read_lineage
from dfactory.runs.provenance import lineage_of
from tests.commands.conftest import dfactory, save_plain, write_recipe
from tests.commands.test_export import adapted_policy, read_as_stranger
from tests.runs.test_lineage import WHOLE

TOKEN = "hf_" + "x7" * 15  # the shape of one
EVIL = "`x` | <script>alert(1)</script> ``` ~~~\n---\nlicense: mit\n---"


@pytest.fixture(scope="session")
def second_run(golden_run, tmp_path_factory) -> Path:
    """A run of another stage from the first one's checkpoint, which was evaluated before; itself too, twice."""
    folder = tmp_path_factory.mktemp("second")
    first = folder / "first"
    shutil.copytree(golden_run, first)
    assert measured(first, folder) == 0
    keys = {
        "stage": "cap",
        "max_steps": 2,
        "run_name": TOKEN,
        "deepspeed_overrides": {"comet": {"api_key": "0123456789"}},
    }
    keys["deepspeed_overrides"]["comet"]["enabled"] = False
    dfactory("train", write_recipe(folder, first, vocabulary=150, mask=158, eos=156, **keys))
    assert [measured(folder / "run", folder) for _ in range(2)] == [0, 0]
    return folder / "run"


def measured(run: Path, folder: Path) -> int:
    records = folder / "few.jsonl"
    records.write_text('{"input_ids": [1, 2, 3, 4, 5, 6, 7, 8], "prompt_lengths": 4}\n')
    words = ["eval", "--model", str(run), "--data", str(records), "--elbo-pairs", "1", "decode.eos_token_id=156"]
    return main([*words, "decode.mask_token_id=158", "--dtype", "float32"])


@pytest.fixture(scope="session")
def exported(second_run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "two-stages"
    assert export(str(second_run), str(out)) == 0
    return out


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


# --- a chain of runs ---------------------------------------------------------------------------------------------------


def test_the_chain_is_told_with_hashes(exported, second_run):
    lineage = read_lineage(exported)
    first, second = lineage.trainings
    assert [(run.stage, run.run, run.step, run.source.name) for run in (first, second)] == [
        ("sft", "first" if first.run == "first" else "run", 3, "model"),
        ("cap", "run", 2, "first/checkpoint-3"),
    ]
    folder = second_run.parent
    base = Path(yaml.safe_load((folder / "first/config.yaml").read_text())["model_name_or_path"])
    assert lineage.base.weights == {"model.safetensors": sha256(base / "model.safetensors")}
    assert second.source.weights == {"model.safetensors": sha256(folder / "first/checkpoint-3/model.safetensors")}
    (records,) = second.records
    assert (records.name, records.rows, records.sha256) == ("ids.jsonl", 20, sha256(folder / "ids.jsonl"))
    assert [entry.rows for entry in first.records] == [20, 3]
    assert lineage.history[-1].weights == {"model.safetensors": sha256(exported / "model.safetensors")}
    rows = [json.loads(line) for line in (second_run / "metrics.jsonl").read_text().splitlines()]
    assert second.tokens == sum(row["tokens"] for row in rows if "tokens" in row)
    assert second.seconds == pytest.approx(sum(row["seconds"] for row in rows if "seconds" in row), abs=0.1)
    assert set(second.versions) == {"python", "dfactory", "torch", "transformers", "deepspeed", "peft"}
    assert first.last_evaluated["step"] == 3
    assert first.last_evaluated["loss"] < first.first_evaluated["loss"]


def test_evaluations_are_recorded_and_quoted(exported, second_run):
    """The second of two equal calls counts; the result of the earlier stage comes along."""
    assert len((second_run / "evaluations.jsonl").read_text().splitlines()) == 2
    evaluations = [run.evaluations for run in read_lineage(exported).trainings]
    assert [len(found) for found in evaluations] == [1, 1]
    (mine,) = evaluations[1]
    assert mine.step == 2
    assert mine.sha256 == sha256(second_run.parent / "few.jsonl")
    assert mine.command.startswith("dfactory eval --model run --data few.jsonl --elbo-pairs 1 decode.eos_token_id=156")
    card = ModelCard.load(exported / "README.md")
    assert mine.command in card.text
    found = {(result.metric_type, result.metric_value) for result in card.data.eval_results}
    assert found == {(result.metric, result.value) for result in mine.results}
    assert {result.metric for result in mine.results} == {"elbo_nats_per_token", "perplexity_at_most"}


def test_the_hub_reads_the_card(exported):
    data = ModelCard.load(exported / "README.md").data
    assert (data.license, data.library_name, data.pipeline_tag) == ("unknown", "transformers", "text-generation")
    assert data.base_model is None
    assert {"dfactory", "block-diffusion", "llada2", "sft", "cap"} <= set(data.tags)
    text = (exported / "README.md").read_text()
    assert "Unknown: neither what the model was made from states one" in text
    assert re.search(r"\| block size \| 8 \|\n\| mask token \| id 158 \|\n\| end of an answer \| id 156 \|", text)


def test_nothing_private_leaves_the_machine(exported, second_run):
    for name in ("README.md", FILE):
        text = (exported / name).read_text()
        assert TOKEN not in text
        assert "0123456789" not in text
        assert MARK in text
        assert str(second_run.parent) not in text
        assert str(Path.home()) not in text
        assert f"-of-{getpass.getuser()}" not in text  # of pytest's folders


def test_the_lines_of_the_card_run(exported, monkeypatch):
    monkeypatch.chdir(exported.parent)
    (block,) = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)
    assert 'Pipeline("two-stages"' in block
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(block, "README.md", "exec"), {})
    assert json.loads(printed.getvalue())


def test_a_run_from_an_export_goes_on_with_its_history(exported, tmp_path):
    """And an export of an export, which another precision makes of it."""
    assert export(str(exported), str(tmp_path / "again"), "bfloat16", about=About(license="mit")) == 0
    lineage = read_lineage(tmp_path / "again")
    assert [type(entry).__name__ for entry in lineage.history] == ["Training", "Training", "Export", "Export"]
    assert lineage.history[-1].source.weights == {"model.safetensors": sha256(exported / "model.safetensors")}
    card = (tmp_path / "again" / "README.md").read_text()
    assert "Exported from `two-stages` as `again` in `bfloat16`." in card
    assert "`mit`, as stated at the export" in card
    assert ModelCard(card).data.license == "mit"


def test_a_checkpoint_of_an_earlier_version_has_what_its_recipe_says(golden_run, tmp_path):
    old = shutil.copytree(golden_run / "checkpoint-3", tmp_path / "old")
    (old / FILE).unlink()
    (training,) = lineage_of(old).trainings
    assert (training.stage, training.step, training.source.name) == ("sft", 3, "model")
    assert "learning_rate: 0.01" in training.recipe
    assert training.records == []
    assert export(str(old), str(tmp_path / "out")) == 0
    assert "Its weights were not hashed." in (tmp_path / "out" / "README.md").read_text()


# --- other exports -----------------------------------------------------------------------------------------------------


def test_merged_adapters_and_means_say_so(lora_run, tmp_path):
    words = ["export", "--model", str(lora_run)]
    assert main([*words, "--output", str(tmp_path / "merged"), "--license", "apache-2.0"]) == 0
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "LoRA adapters are merged into the weights." in card
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert ModelCard(card).data.license == "apache-2.0"
    assert read_as_stranger(tmp_path / "merged")["tied"] is True
    base = lora_run.parent / "base/model.safetensors"
    assert read_lineage(tmp_path / "merged").base.weights == {"model.safetensors": sha256(base)}
    assert main([*words, "--output", str(tmp_path / "mean"), "--merge", "topk=2"]) == 0
    last = read_lineage(tmp_path / "mean").history[-1]
    assert {one.checkpoint for one in last.averaged} == {"checkpoint-1", "checkpoint-2"}
    assert last.metric == "eval/loss"
    card = ModelCard((tmp_path / "mean" / "README.md").read_text())
    assert "The weights are the mean of 2 checkpoint(s), best by `eval/loss`: `checkpoint-" in card.text
    assert "merge" in card.data.tags


def test_a_model_of_the_hub_as_it_is(tmp_path):
    snapshot = tmp_path / f"models--org--name/snapshots/{'a' * 40}"
    save_plain(snapshot, "qwen3", tied=False)
    (snapshot / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# The card of the base\n")
    assert export(str(snapshot), str(tmp_path / "out")) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.base_model, card.data.license, card.data.language) == ("org/name", "apache-2.0", ["en"])
    assert "[org/name](https://huggingface.co/org/name) and not trained further" in card.text
    assert "The card of the base" not in card.text
    assert f"`{'a' * 40}`" in card.text
    assert (tmp_path / "out" / "NOTICE").read_text() == "carry me"


def test_adapters_of_someone_else(tmp_path):
    base = save_plain(tmp_path / "base", "qwen3", tied=True)
    save_policy(adapted_policy(base, 0.1, "float32"), tmp_path / "adapters")
    export(str(tmp_path / "adapters"), str(tmp_path / "out"))
    found = read_lineage(tmp_path / "out").base
    assert found.weights == {"adapter_model.safetensors": sha256(tmp_path / "adapters/adapter_model.safetensors")}
    assert found.adapters_of.name == "base"
    assert "It is LoRA adapters. The base is `base`" in (tmp_path / "out" / "README.md").read_text()


def test_without_a_card_and_of_what_the_source_says_nothing_is_carried(tmp_path):
    source = save_plain(tmp_path / "source", "qwen3", tied=True)
    for name in ("README.md", "provenance.json", FILE):
        (source / name).write_text("{}")
    words = ["export", "--model", str(source), "--output"]
    assert main([*words, str(tmp_path / "without"), "--no-card"]) == 0
    plain_files = {file.name for file in source.iterdir()} - {"README.md", "provenance.json", FILE}
    assert {file.name for file in (tmp_path / "without").iterdir()} == plain_files
    assert main([*words, str(tmp_path / "with")]) == 0
    assert {file.name for file in (tmp_path / "with").iterdir()} == plain_files | {"README.md", FILE}


def test_a_licence_is_an_identifier(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["export", "--model", "tiny", "--output", str(tmp_path / "out"), "--license", "mit\n---"])
    assert "is not an identifier of a licence" in capsys.readouterr().err


# --- text of strangers -------------------------------------------------------------------------------------------------


def test_what_a_stranger_wrote_stays_text(tmp_path):
    """In a lineage that came with a model: names, recipes, commands, numbers' names, licences."""
    source = save_plain(tmp_path / "source", "llama", tied=False)
    raw = json.loads(WHOLE.text())
    raw["base"]["name"] = raw["base"]["licence"]["license"] = raw["base"]["licence"]["license_name"] = EVIL
    run = raw["history"][0]["training"]
    for name in ("stage", "run", "recipe"):
        run[name] = EVIL
    run["hardware"], run["versions"], run["last_evaluated"] = [EVIL], {EVIL: EVIL}, {"step": 1, EVIL: 1.0}
    evaluation = run["evaluations"][0]
    evaluation |= {"date": EVIL, "command": EVIL, "data": EVIL, "sha256": EVIL, "decode": {EVIL: EVIL}}
    evaluation["results"][0] |= {"metric": EVIL, "part": EVIL}
    raw["history"][1]["export"] |= {"license": EVIL, "name": EVIL, "metric": EVIL, "dtype": EVIL}
    (source / FILE).write_text(json.dumps(raw))
    assert export(str(source), str(tmp_path / "out")) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == EVIL.lower()
    outside = re.sub(r"(`{3,})yaml\n.*?\n\1\n", "", card.text, flags=re.DOTALL)
    assert "\nlicense: mit" not in outside
    escaped = re.sub(r"\\.", "", outside)
    assert "<script" in escaped  # as code, on one line
    assert "<script" not in re.sub(r"`[^`\n]*`|^    .*$", "", escaped, flags=re.MULTILINE)


def test_text_in_markdown():
    assert code("a`b|c\nd") == "`a'b\\|c d`"
    assert plain("<b>_x_") == "\\<b\\>\\_x\\_"
    assert fenced("a\n````\nb\n") == "`````yaml\na\n````\nb\n`````"
