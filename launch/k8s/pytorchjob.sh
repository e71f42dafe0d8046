#!/usr/bin/env bash
# Submit a recipe to Kubernetes with the manifest pytorchjob.yaml, and wait for its end:
#
#     launch/k8s/pytorchjob.sh RECIPE [key=value ...]      paths are those in the pods
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/submit.sh" pytorchjob "$@"
