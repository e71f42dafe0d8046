#!/usr/bin/env bash
# Train with one process per GPU of this machine (one process where there is none):
#
#     launch/local.sh RECIPE [key=value ...]
#
# For several machines run it on each, with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT set; NPROC_PER_NODE overrides
# the number of processes. Uses .venv in the repository root if it exists, else the python on PATH. Keeps the exit status of
# `dfactory train`. SIGTERM or SIGUSR1, to this process or to any that it starts, makes all of them save and exit with 75; a
# second one ends them at once.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "usage: $0 RECIPE [key=value ...]" >&2
    exit 2
fi

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=python
[ ! -x "$REPO/.venv/bin/python" ] || python="$REPO/.venv/bin/python"

devices=$("$python" -c 'import torch; print(max(torch.cuda.device_count(), 1))')

nodes=${NNODES:-1}
processes=${NPROC_PER_NODE:-$devices}
if [ "$nodes" -gt 1 ]; then
    : "${NODE_RANK:?NNODES is $nodes, so each machine needs its own NODE_RANK, from 0}"
    : "${MASTER_ADDR:?NNODES is $nodes, so MASTER_ADDR must name the machine with NODE_RANK 0}"
fi

if [ -z "${OMP_NUM_THREADS:-}" ]; then
    threads=$(($(nproc) / processes))
    export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
fi

if [ "$nodes" -eq 1 ] && [ "$processes" -eq 1 ]; then
    exec "$python" -m dfactory.cli train "$@"
fi
meeting=(--standalone) # torchrun itself finds a free port on this machine
if [ "$nodes" -gt 1 ]; then
    meeting=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi
exec "$python" -m dfactory.engine.torchrun --nnodes "$nodes" --nproc-per-node "$processes" "${meeting[@]}" \
    -m dfactory.cli train "$@"
