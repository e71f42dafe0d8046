"""A failure is a status other than 0 through every script, under sh and bash, behind pipes, and with a full disk."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.launch.test_kubernetes import submit  # noqa: F401  a fixture
from tests.launch.test_scripts import LAUNCH, REPOSITORY, SCONTROL, SRUN, house, run  # noqa: F401

LOCAL = str(LAUNCH / "local.sh")
RECIPE = str(REPOSITORY / "recipes/quickstart/sft.yaml")


def piped(shell: str, *words, cwd, reader: str = "cat"):
    """local.sh with its output into a reader: its own status, the reader's, and what both told."""
    command = f'{shell} "$0" "$@" | {reader}; echo "${{PIPESTATUS[*]}}" >&2'
    done = run("bash", "-c", command, LOCAL, *words, cwd=cwd, NPROC_PER_NODE="1")
    return *map(int, done.stderr.splitlines()[-1].split()), done.stderr[-3000:]


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_local_behind_a_pipe(shell, tmp_path):
    status, of_cat, told = piped(shell, RECIPE, "max_stepps=1", cwd=tmp_path)
    assert (status, of_cat) == (2, 0), told


@pytest.mark.slow
def test_a_run_whose_reader_has_gone_does_not_say_that_it_is_done(tmp_path):
    data = f"datasets=[{{path: {REPOSITORY}/recipes/quickstart/data/heldout.jsonl}}]"
    keys = [data, "max_steps=3", "eval_datasets=[]", "eval_decode_prompts=0", f"output_dir={tmp_path}/run"]
    status, _, told = piped("sh", RECIPE, *keys, cwd=tmp_path, reader="true")
    assert status != 0 or (tmp_path / "run/checkpoint-3/engine/state.json").is_file(), told


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk(tmp_path):
    done = run("bash", "-c", 'exec "$0" "$@" >/dev/full', sys.executable, "-m", "dfactory.cli", "schema", cwd=tmp_path)
    assert done.returncode != 0
    assert "No space left on device" in done.stderr


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_slurm_with_the_real_local_script(shell, tmp_path):
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text.replace("for node in 0 1", "for node in 0"))
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "x", "SLURM_JOB_NUM_NODES": "1", "NPROC_PER_NODE": "1"}
    path = f"PATH={tmp_path}:{Path(sys.executable).parent}:/usr/bin:/bin"
    script = str(LAUNCH / "slurm.sbatch")
    done = run("env", path, shell, script, "absent.yaml", cwd=tmp_path, SBATCH_FILE=script, **job)
    assert done.returncode == 2, done.stderr
    assert "absent.yaml does not exist" in done.stderr


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_kubernetes_without_an_answer(submit, tmp_path, shell):  # noqa: F811
    (tmp_path / "kubectl").write_text('#!/bin/sh\n[ "$1" = create ] && { cat >/dev/null; echo job/x; } || exit 7\n')
    assert submit(shell, "rayjob", "never asked").returncode == 7


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
@pytest.mark.parametrize("shell", ["sh", "bash"])
@pytest.mark.parametrize("python", [None, "exit 5", '[ "$1" = -c ] || exit 5'], ids=["none", "too old", "no venv"])
def test_an_install_that_fails(house, shell, script, python):  # noqa: F811
    for name in ("launch/install.sh", "setup.cfg", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, house / name)
    for name in ("python3.11", "python3", "python") if python else ():
        (house / "bin" / name).write_text(f"#!/bin/sh\n{python}\n")
        (house / "bin" / name).chmod(0o755)
    for tool in ("bash", "sh", "dirname", "cat", "sha256sum", "cut", "env"):
        os.symlink(shutil.which(tool), house / "bin" / tool)
    path = f"PATH={house}/bin"
    done = run(str(house / "bin/env"), path, shell, str(house / "launch" / script), cwd=house)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "install.sh:" in done.stderr
    assert not (house / "calls").exists()


STEPS = ["ruff", "lint-imports", "mypy", "mkdocs", "shellcheck", "hadolint", "dfactory", "test.sh"]


@pytest.mark.parametrize("failing", ["", *STEPS])
def test_continuous_integration_fails_with_any_step(tmp_path, failing):
    """On stubs, one of which fails; the others run all the same."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(REPOSITORY / ".ci/run", tmp_path / ".ci")
    shutil.copytree(LAUNCH, tmp_path / "launch")
    bin_folder = tmp_path / ".venv/bin"
    bin_folder.mkdir(parents=True)
    tools = [bin_folder / name for name in STEPS if name != "test.sh"]
    for tool in (*tools, tmp_path / "launch/test.sh"):
        tool.write_text(f"#!/bin/sh\necho {tool.name} >>{tmp_path}/calls\nexit {int(tool.name == failing)}\n")
        tool.chmod(0o755)
    done = run("sh", str(tmp_path / ".ci/run"), cwd="/")
    assert done.returncode == bool(failing), done.stderr
    assert ("FAILED: " in done.stderr) == bool(failing)
    assert set(STEPS) == set((tmp_path / "calls").read_text().split())
