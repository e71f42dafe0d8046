#!/usr/bin/env bash
# All stages of recipes/smollm2, one after the other: conversion, SFT, CAP, DPO and RL, each evaluated, and the chain's report.
#
#     launch/smollm2_stages.sh [FOLDER] [key=value ...]      default: runs/smollm2; keys of the recipes, for all stages
#
# Starts with launch/smollm2.sh FOLDER. CAP and DPO start from SFT's model, RL from DPO's. A second call goes on where the first
# one ended: an interrupted run resumes, a finished one is not repeated.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail

caller=$PWD
. "$(dirname "${BASH_SOURCE[0]}")/install.sh"
cd "$REPO"

root=$REPO/runs/smollm2
case ${1:-} in
"" | *=*) ;;
*)
    root=$1
    [[ $root = /* ]] || root=$caller/$root
    shift
    ;;
esac
bash launch/smollm2.sh "$root"

answers='The answer is (.+)\.'
reward="{name: exact_match, answer_pattern: '$answers'}"
data=$root/data

train() { # stage, the run or model it starts from, its records, its held-out records, further keys
    local run=$root/$1 resume=()
    [ ! -f "$run/smollm2.done" ] || return 0
    [ ! -f "$run/LATEST" ] || resume=(resume_from_checkpoint=true)
    dfactory train "recipes/smollm2/$1.yaml" "model_name_or_path=$2" "datasets=$3" "eval_datasets=$4" "${@:5}" \
        "output_dir=$run" ${resume[@]+"${resume[@]}"}
    touch "$run/smollm2.done"
}

answer() { # stage
    local evaluated=$root/$1/heldout.jsonl
    [ -s "$evaluated" ] || dfactory eval --model "$root/$1" --data "$data/heldout.jsonl" --answer-pattern "$answers" \
        --output "$evaluated" decode.threshold=0.9 decode.max_new_tokens=192
}

pairs() { # part
    [ -s "$data/pairs_$1.jsonl" ] || dfactory data preferences --model "$root/sft" --input "$data/preference_$1.jsonl" \
        --output "$data/pairs_$1.jsonl" --reward "$reward" --recorded-answers --num-generations 1 \
        decode.temperature=1.0 decode.acceptance=top decode.threshold=0.9 decode.max_new_tokens=192
}

records="[{path: $data/train.jsonl}, {path: $data/everyday.jsonl, weight: 4}]"
heldout="[{path: $data/validation.jsonl}]"
train cpt "$root/ar" "$records" "$heldout" "$@"
train sft "$root/cpt" "$records" "$heldout" "$@"
answer sft
train cap "$root/sft" "$records" "$heldout" "$@"
answer cap
pairs prompts
pairs heldout
train dpo "$root/sft" "[{path: $data/pairs_prompts.jsonl}]" "[{path: $data/pairs_heldout.jsonl}]" "$@"
answer dpo
train rl "$root/dpo" "[{path: $data/rl_train.jsonl}]" "[{path: $data/rl_heldout.jsonl}]" "$@"
answer rl
dfactory report --chain "$root/rl"
