#!/usr/bin/env bash
# Install dFactory and run its tests. Arguments go to pytest; paths in them are relative to the repository root.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/install.sh"
cd "$REPO"
exec python -m pytest "$@"
