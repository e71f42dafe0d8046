#!/usr/bin/env bash
# All stages on a laptop: SFT, CAP, DPO and RL of the embedded LLaDA2-MoE with recipes/quickstart/*.yaml. CAP and DPO start from
# SFT's model, RL from DPO's. Then a table of the results next to the expected ones.
#
#     launch/quickstart.sh [key=value ...]      keys of the recipes; they apply to all four
#
# The runs are in runs/quickstart, runs/quickstart_cap, _dpo and _rl, or in output_dir=DIR, DIR_cap and so on. A second call
# reuses finished runs; an interrupted run continues.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail

caller=$PWD
. "$(dirname "${BASH_SOURCE[0]}")/install.sh"
cd "$REPO"

root=$REPO/runs/quickstart
for argument in "$@"; do
    case $argument in
    output_dir=/*) root=${argument#output_dir=} ;;
    output_dir=*) root=$caller/${argument#output_dir=} ;;
    esac
done
data=recipes/quickstart/data

# Train, unless there is a finished run with the same recipes and keys
train() { # recipe, run, further keys
    local recipe=$1 run=$2 done=$2/quickstart.done resume=()
    shift 2
    wanted=$(
        cat "$recipe" "$data"/*.jsonl
        printf '%s\n' "${wanted:-}" "$@"
    )
    wanted=$(sha256sum <<<"$wanted" | cut -d' ' -f1)
    if [ ! -f "$done" ]; then
        [ ! -f "$run/LATEST" ] || resume=(resume_from_checkpoint=true)
        rm -f "$run/thresholds.jsonl" "$run/preferred.jsonl"
        dfactory train "$recipe" "$@" "output_dir=$run" ${resume[@]+"${resume[@]}"}
        echo "$wanted" >"$done"
    elif [ "$(cat "$done")" != "$wanted" ]; then
        echo "$0: $run holds a run with another recipe or other keys: remove it, or give output_dir=DIR" >&2
        exit 2
    fi
}

# Answer the held-out instructions at several thresholds, and the requests whose preferred reading DPO and RL are about
answer() { # run
    [ -s "$1/thresholds.jsonl" ] || dfactory eval --model "$1" --data "$data/heldout.jsonl" \
        --thresholds 0.5,0.7,0.9 --output "$1/thresholds.jsonl" decode.max_new_tokens=32
    [ -s "$1/preferred.jsonl" ] || dfactory generate --model "$1" --input "$data/preferred_heldout.jsonl" \
        --output "$1/preferred.jsonl" decode.max_new_tokens=32 decode.threshold=0.9
}

stage() { # name, the run it starts from, further keys
    local run=${root}_$1
    train "recipes/quickstart/$1.yaml" "$run" "${@:3}" "model_name_or_path=$2"
    answer "$run"
}

train recipes/quickstart/sft.yaml "$root" "$@"
answer "$root"
stage cap "$root" "$@"
# Not from CAP's model: that is so sure of its answers that all of a group are alike, which leaves RL nothing to compare.
stage dpo "$root" "$@"
stage rl "${root}_dpo" "$@"

runs=("$root" "${root}_cap" "${root}_dpo" "${root}_rl")
dfactory report "${runs[@]}"
dfactory report --chain "${runs[@]}"
python -m data_tools.quickstart_table "${runs[@]}"
