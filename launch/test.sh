#!/usr/bin/env bash
# Install dFactory and run its tests, in two processes. Arguments go to pytest instead; paths in them are relative to the
# repository root.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/install.sh"
cd "$REPO"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # else the processes compete for the cores
unset PYTHONDONTWRITEBYTECODE # hundreds of tests start a process: one compiles the package, the others read it
[ $# -gt 0 ] || set -- --numprocesses 2 --dist loadfile
exec python -m pytest "$@"
