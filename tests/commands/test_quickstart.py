"""`dfactory quickstart` on a stub of dfactory: each stage once, then reused; failures pass through; runs are not mixed up.
`dfactory recipes` lists and copies what it reads."""

import json
from pathlib import Path

import pytest

from dfactory.cli import main
from dfactory.commands.quickstart import digest, quickstart, read_stages, root_of
from dfactory.commands.recipes import headline, recipes_folder
from dfactory.errors import ConfigError, DataError

pytest.importorskip("ray")
FAKE_DFACTORY = """#!/usr/bin/env bash
# Stands for dfactory: notes its arguments, writes what the quickstart reads, fails at the step that FAIL_AT names.
set -eu
echo "$*" >>"$CALLS"
[ "${FAIL_AT:-}" != "$1" ] || exit 3
for word in "$@"; do
    case $word in output_dir=*) run=${word#output_dir=} ;; esac
done
if [ "$1" = train ]; then
    mkdir -p "$run"
    name=${2##*/}
    echo "stage: ${name%.yaml}" >"$run/config.yaml"
    echo checkpoint-20 >"$run/LATEST"
    echo '{"step": 1, "loss": 2.0}' >"$run/metrics.jsonl"
elif [ "$1" != report ]; then
    while [ "$1" != --output ]; do shift; done
    rates='"tokens_per_forward": 3, "tokens_per_second": 9'
    [ -n "${EMPTY:-}" ] || echo '{"text": "a", "answer": "a", "threshold": 0.9, "exact_match": 0.5, '"$rates"'}' >"$2"
fi
"""
STAGES = ("sft", "cap", "dpo", "rl")
RECIPES = recipes_folder() / "quickstart"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(word, ...): the status and the calls of a quickstart in tmp_path."""
    program, calls = tmp_path / "dfactory", tmp_path / "calls"
    program.write_text(FAKE_DFACTORY)
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)

    def call(*words: str, **variables: str) -> tuple[int, list[str]]:
        calls.unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            for name, value in ({"CALLS": str(calls)} | variables).items():
                patch.setenv(name, value)
            status = quickstart(words, [str(program)])
        return status, calls.read_text().splitlines() if calls.exists() else []

    return call


def test_goes_through_its_stages_once_and_then_reuses_them(run, tmp_path, capsys):
    status, calls = run("max_steps=20", "output_dir=my run")
    first = tmp_path / "my run"
    runs = [first, *(tmp_path / f"my run_{stage}" for stage in STAGES[1:])]
    keys = "max_steps=20 output_dir=my run"
    assert calls[0] == f"train {RECIPES}/sft.yaml {keys} output_dir={first}"
    assert calls[1].startswith(f"eval --model {first} --data {RECIPES}/data/heldout.jsonl --thresholds 0.5,0.7,0.9 ")
    assert calls[2].startswith(f"generate --model {first} --input {RECIPES}/data/preferred_heldout.jsonl ")
    for stage, folder, previous, call in zip(STAGES[1:], runs[1:], (first, first, runs[2]), calls[3::3], strict=False):
        assert call == f"train {RECIPES}/{stage}.yaml {keys} model_name_or_path={previous} output_dir={folder}"
    assert calls[12:] == [f"report {chain}" + " ".join(map(str, runs)) for chain in ("", "--chain ")]
    shown = capsys.readouterr().out
    assert status == 0
    assert all(stage.upper() in shown for stage in STAGES)
    assert "50.0%" in shown

    status, calls = run("max_steps=20", "output_dir=my run")
    assert (status, len(calls)) == (0, 2)  # the reports
    assert "50.0%" in capsys.readouterr().out


def test_does_not_pass_off_another_run_as_its_own(run):
    assert run("max_steps=20")[0] == 0
    with pytest.raises(ConfigError, match="output_dir=DIR"):
        run("max_steps=30")


@pytest.mark.parametrize("step", ["train", "eval", "generate", "report"])
def test_fails_with_its_step_and_goes_on_from_there(run, step):
    assert run(FAIL_AT=step)[0] == 3
    status, calls = run()
    assert status == 0
    assert any(call.startswith(f"train {RECIPES}/sft.yaml") for call in calls) == (step == "train")


def test_a_table_without_its_numbers(run):
    with pytest.raises(DataError, match=r"thresholds\.jsonl is missing or empty"):
        run(EMPTY="yes")


def test_resumes_an_interrupted_run(run, tmp_path):
    folder = tmp_path / "runs/quickstart_cap"
    folder.mkdir(parents=True)
    (folder / "LATEST").write_text("checkpoint-10\n")
    (folder / "thresholds.jsonl").write_text("of an earlier checkpoint\n")
    status, calls = run()
    assert status == 0
    assert calls[3].endswith(f"output_dir={folder} resume_from_checkpoint=true")
    assert calls[4].startswith("eval")


def test_the_root_and_the_runs_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert root_of([]) == tmp_path / "runs/quickstart"
    assert root_of(["output_dir=/a", "max_steps=1", "output_dir=b"]) == tmp_path / "b"
    stages = read_stages(recipes_folder(), Path("/r/x"))
    assert [(stage.name, str(stage.run), stage.start and stage.start.name) for stage in stages] == [
        ("sft", "/r/x", None),
        ("cap", "/r/x_cap", "x"),
        ("dpo", "/r/x_dpo", "x"),
        ("rl", "/r/x_rl", "x_dpo"),
    ]
    assert [stage.name for stage in stages] == list(json.loads((RECIPES / "expected.json").read_text()))


def test_digest_separates_words(tmp_path):
    (tmp_path / "a").write_text("records\n")
    assert digest([tmp_path / "a"], ["x", "y"]) != digest([tmp_path / "a"], ["xy"])


# --- dfactory recipes


def test_every_recipe_is_listed_with_its_headline(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    files = sorted(recipes_folder().glob("*/*.yaml"))
    assert [line.partition(": ")[0] for line in lines[:-1]] == [str(f.relative_to(recipes_folder())) for f in files]
    assert all(len(headline(file)) > 20 for file in files)
    assert (
        "quickstart/sft.yaml: SFT of the embedded base model (see base.yaml) on the bundled instruction records"
        in lines
    )


def test_a_copied_recipe_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["check", "recipes/quickstart/sft.yaml"]) == 2
    assert "`dfactory recipes --output recipes`" in capsys.readouterr().err
    assert main(["recipes", "--output", "recipes"]) == 0
    assert main(["recipes", "--output", "recipes"]) == 2
    assert "not an empty directory" in capsys.readouterr().err
    assert main(["data", "validate", "recipes/quickstart/data/heldout.jsonl"]) == 0


def test_where_no_recipes_are(tmp_path):
    with pytest.raises(ConfigError, match="install dFactory's wheel again"):
        recipes_folder(tmp_path / "site-packages/dfactory")


def test_version(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out.startswith("dfactory ")
