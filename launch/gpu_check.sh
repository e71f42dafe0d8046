#!/usr/bin/env bash
# All checks that need a GPU, on a bare machine with one: tests, training steps, decoding, a run. Writes gpu_check.json and
# gpu_check.md to runs/gpu_check. It installs nothing from a network: packages that the machine's Python lacks come from a
# folder of wheels.
#
#     launch/gpu_check.sh [--wheels DIR] [--dry-run] [--out DIR] [--only PART ...]
#
# PYTHON names the interpreter that has torch with CUDA (default: python3).
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail

python=${PYTHON:-python3}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) > 4 ? $(nproc) / 4 : 1))}
export WANDB_MODE=offline HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

if [ "${1:-}" = --wheels ]; then
    wheels=${2:?launch/gpu_check.sh: --wheels needs a folder}
    shift 2
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
    export PYTHONPATH=$site:$PYTHONPATH
fi
"$python" -m benchmarks.gpu_check "$@"
