"""The manifests against their schemas, filled with a recipe; the scripts on a stub kubectl, until the job's end."""

import shlex
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.launch.kubernetes_schemas import PYTORCH_JOB, RAY_JOB
from tests.launch.test_scripts import LAUNCH, run

K8S = LAUNCH / "k8s"
SCHEMAS = {"rayjob": RAY_JOB, "pytorchjob": PYTORCH_JOB}
WORDS = ["recipes/quickstart/rl.yaml", "datasets=[{path: a b.jsonl}]", "output_dir=/shared/it's"]

KUBECTL = """#!/usr/bin/env bash
# Stands for kubectl: keeps the manifest, and tells one state after another.
set -eu
if [ "$1" = create ]; then
    cat >"$FOLDER/manifest.yaml"
    [ "${REFUSE:-}" = "" ] || { echo "forbidden" >&2; exit 1; }
    echo "job/dfactory-x"
else
    echo x >>"$FOLDER/asked"
    sed -n "$(wc -l <"$FOLDER/asked")p" "$FOLDER/states"
fi
"""


@pytest.fixture
def submit(tmp_path):
    """submit(shell, kind, states, ...) -> the finished script; a stub kubectl and a sleep that does not wait."""
    for name, text in (("kubectl", KUBECTL), ("sleep", "#!/usr/bin/env bash\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def submit(shell: str, kind: str, *states: str, words=WORDS, **variables) -> subprocess.CompletedProcess:
        (tmp_path / "asked").unlink(missing_ok=True)
        (tmp_path / "states").write_text("\n".join(states) + "\n")
        path = f"{tmp_path}:{Path(sys.executable).parent}:/usr/bin:/bin"
        command = ["env", f"PATH={path}", shell, str(K8S / f"{kind}.sh"), *words]
        return run(*command, cwd=tmp_path, FOLDER=str(tmp_path), **variables)

    return submit


@pytest.mark.parametrize("kind", SCHEMAS)
def test_manifests_have_their_schema(kind):
    manifest = yaml.safe_load((K8S / f"{kind}.yaml").read_text())
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[kind])
    jsonschema.validate(manifest, SCHEMAS[kind])
    misspelt = yaml.safe_load((K8S / f"{kind}.yaml").read_text().replace("containers:", "container:"))
    with pytest.raises(jsonschema.ValidationError, match="container"):
        jsonschema.validate(misspelt, SCHEMAS[kind])


def test_ray_has_a_token_and_one_version():
    spec = yaml.safe_load((K8S / "rayjob.yaml").read_text())["spec"]["rayClusterSpec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert f"ray=={spec['rayVersion']}\n" in (LAUNCH / "constraints.txt").read_text()


@pytest.mark.parametrize("shell", ["bash", "sh"])
@pytest.mark.parametrize(
    "kind, states",
    [
        ("rayjob", ["Initializing ", "Running RUNNING ", "Complete SUCCEEDED "]),
        ("pytorchjob", ["  ", "  Created Running ", "  Created Succeeded "]),
    ],
)
def test_a_job_that_succeeds(submit, tmp_path, shell, kind, states):
    done = submit(shell, kind, *states)
    assert done.returncode == 0, done.stderr
    manifest = yaml.safe_load((tmp_path / "manifest.yaml").read_text())
    jsonschema.validate(manifest, SCHEMAS[kind])
    if kind == "rayjob":
        assert shlex.split(manifest["spec"]["entrypoint"]) == ["python", "-m", "dfactory.cli", "train", *WORDS]
    else:
        for replica in manifest["spec"]["pytorchReplicaSpecs"].values():
            assert replica["template"]["spec"]["containers"][0]["args"] == WORDS


@pytest.mark.parametrize("shell", ["bash", "sh"])
@pytest.mark.parametrize(
    "kind, last",
    [
        ("rayjob", "Failed FAILED "),
        ("rayjob", "Complete STOPPED "),
        ("rayjob", "Failed  "),
        ("pytorchjob", "  Created Failed "),
    ],
)
def test_a_job_that_fails(submit, shell, kind, last):
    done = submit(shell, kind, "Initializing ", last)
    assert done.returncode == 1
    assert "job/dfactory-x" in done.stderr


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_a_job_that_is_refused_and_one_without_a_recipe(submit, shell):
    assert submit(shell, "rayjob", REFUSE="1").returncode == 1
    done = submit(shell, "pytorchjob", words=[])
    assert done.returncode == 2
    assert "usage" in done.stderr


def test_a_pod_starts_local_sh_with_its_place(tmp_path):
    """The command of a pod as the operator would start it: local.sh gets the nodes and the arguments."""
    manifest = yaml.safe_load((K8S / "pytorchjob.yaml").read_text())
    container = manifest["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "local.sh").write_text('echo "$NNODES $NODE_RANK $MASTER_ADDR" "$@"\n')
    operator = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "MASTER_ADDR": "dfactory-master-0"}
    done = run(*container["command"], "r.yaml", "a=b c", cwd=tmp_path, **operator)
    assert done.stdout == "2 1 dfactory-master-0 r.yaml a=b c\n"
