#!/usr/bin/env bash
# From nothing to a fine-tuned model, on a laptop: install, train the embedded LLaDA2-MoE by recipes/quickstart/sft.yaml,
# answer the held-out prompts before and after, and print what changed.
#
#     launch/quickstart.sh [key=value ...]      the keys are those of the recipe
#
# The run lies in runs/quickstart, or in output_dir=DIR. A second call reuses what is there; an interrupted one goes on.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail

caller=$PWD
. "$(dirname "${BASH_SOURCE[0]}")/install.sh"
cd "$REPO"

recipe=recipes/quickstart/sft.yaml
run=$REPO/runs/quickstart
for argument in "$@"; do
    case $argument in
    output_dir=/*) run=${argument#output_dir=} ;;
    output_dir=*) run=$caller/${argument#output_dir=} ;;
    esac
done

# 1. Train, unless a finished run by the same recipe and keys is there
wanted=$(
    cat "$recipe" recipes/quickstart/data/train.jsonl
    printf '%s\n' "$@"
)
wanted=$(sha256sum <<<"$wanted" | cut -d' ' -f1)
if [ ! -f "$run/quickstart.done" ]; then
    resume=()
    [ ! -f "$run/LATEST" ] || resume=(resume_from_checkpoint=true)
    rm -f "$run/before.jsonl" "$run/after.jsonl"
    dfactory train "$recipe" "$@" "output_dir=$run" ${resume[@]+"${resume[@]}"}
    echo "$wanted" >"$run/quickstart.done"
elif [ "$(cat "$run/quickstart.done")" != "$wanted" ]; then
    echo "$0: $run holds a run by another recipe or other keys: remove it, or give output_dir=DIR" >&2
    exit 2
fi

# 2. Answer the held-out prompts, with the base and with the trained model
recipe_value() { sed -n "s/^$1: *//p" "$run/config.yaml"; }
answer() { # file, then what names the model
    local output=$1
    shift
    [ ! -s "$output" ] || return 0
    dfactory generate "$@" --input recipes/quickstart/data/heldout.jsonl --output "$output" \
        "decode.block_size=$(recipe_value block_size)" decode.max_new_tokens=32 decode.threshold=0.9
}
answer "$run/before.jsonl" --model tiny
answer "$run/after.jsonl" --model "$run"

# 3. Say what changed
python -m data_tools.quickstart_table "$run"
