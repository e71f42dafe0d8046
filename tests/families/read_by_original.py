"""Reads an export with the original code and compares logits: `read_by_original.py EXPORT FORWARD_FILE`.

EXPORT is a model directory with the original's Python files in it, which config.json names in `auto_map`. FORWARD_FILE
is the forward.safetensors of the golden files. Run it with a Python that has the packages of the original. It prints the
tensors that were missing or unexpected and the largest difference of logits, as JSON.
"""

import json
import sys

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM


def main(directory: str, forward_file: str) -> None:
    known = AutoConfig.from_pretrained(directory, trust_remote_code=True).auto_map
    auto = AutoModelForCausalLM if "AutoModelForCausalLM" in known else AutoModel
    model, loading = auto.from_pretrained(
        directory, trust_remote_code=True, output_loading_info=True, torch_dtype=torch.float32
    )
    golden = load_file(forward_file)
    with torch.no_grad():
        logits = model.eval()(golden["input_ids"]).logits
    left = sorted({*loading["missing_keys"], *loading["unexpected_keys"], *map(str, loading["mismatched_keys"])})
    print(json.dumps({"left": left, "difference": float((logits - golden["logits"]).abs().max())}))


if __name__ == "__main__":
    main(*sys.argv[1:])
