#!/usr/bin/env bash
# Installs, then runs `dfactory quickstart`: all stages on a laptop, SFT, CAP, DPO and RL of the embedded LLaDA2-MoE with
# recipes/quickstart/*.yaml, and a table of the results next to the expected ones.
#
#     launch/quickstart.sh [key=value ...]      keys of the recipes; they apply to all four
#
# The runs are in runs/quickstart of the repository, runs/quickstart_cap, _dpo and _rl, or in output_dir=DIR, DIR_cap and so on.
# A second call reuses finished runs; an interrupted run continues.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/install.sh"

case " $*" in
*" output_dir="*) ;;
*) cd "$REPO" ;;
esac
exec dfactory quickstart "$@"
