#!/usr/bin/env bash
# Submit a recipe as a job to a running Ray cluster, follow its log, and end with the job's own exit status:
#
#     launch/ray_submit.sh RECIPE [key=value ...]
#
# RAY_API_SERVER_ADDRESS, or else RAY_ADDRESS, is the URL of the cluster's dashboard (default http://127.0.0.1:8265). The
# repository, this folder, the Python environment and output_dir must be visible at the same path on every node. Uses
# .venv in the repository root if it exists, else the python on PATH. Ctrl-C leaves the job running.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "usage: $0 RECIPE [key=value ...]" >&2
    exit 2
fi

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=python
[ ! -x "$REPO/.venv/bin/python" ] || python="$REPO/.venv/bin/python"
python=$(command -v "$python")

case ${RAY_API_SERVER_ADDRESS:=${RAY_ADDRESS:-http://127.0.0.1:8265}} in
http://* | https://*) export RAY_API_SERVER_ADDRESS ;;
*)
    echo "$0: $RAY_API_SERVER_ADDRESS is not an http:// address: set RAY_API_SERVER_ADDRESS to the dashboard's URL" >&2
    exit 2
    ;;
esac
unset RAY_ADDRESS # it may name the dashboard; inside the job Ray sets its own

job=dfactory-$(date +%Y%m%d-%H%M%S)-$$
# Ray's workers do not inherit the driver's PYTHONPATH, so the job's environment sets it for all of them.
environment=$("$python" -c 'import json, sys; print(json.dumps({"env_vars": {"PYTHONPATH": sys.argv[1]}}))' \
    "$REPO${PYTHONPATH:+:$PYTHONPATH}")

status=0
# shellcheck disable=SC2016  # $0 and $@ belong to the job's own shell, which starts in the caller's folder
"$python" -m ray.scripts.scripts job submit --submission-id "$job" --runtime-env-json "$environment" -- \
    bash -c 'cd "$0" && exec "$@"' "$PWD" "$python" -m dfactory.cli train "$@" || status=$?

# `ray job submit` ends with 0 or 1, and with 0 after `ray job stop`: what became of the driver is on record.
exec "$python" - "$job" "$status" <<'PYTHON'
import sys

from ray.job_submission import JobStatus, JobSubmissionClient

job, submitted = sys.argv[1], int(sys.argv[2])
try:
    info = JobSubmissionClient().get_job_info(job)
except (RuntimeError, ConnectionError) as problem:
    sys.exit(f"ray_submit.sh: what became of job {job} is not known: {problem}")
code = info.driver_exit_code
if code is None:  # stopped, or never begun
    code = 0 if info.status == JobStatus.SUCCEEDED else submitted or 1
print(f"job {job}: {info.status}", file=sys.stderr)
sys.exit(code if code >= 0 else 128 - code)  # a negative code is a signal
PYTHON
