"""Decodes with diffusers' pipeline on the code that lies in a model directory: `read_carried.py DIRECTORY CASES`.

CASES is a JSON file of prompts, lengths, thresholds and ids. It prints the responses as JSON. dFactory is not imported: its
registered classes would take the place of the carried ones.
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from transformers import AutoModelForCausalLM


def main(directory: str, cases: str) -> None:
    model, loading = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    assert not [*loading["missing_keys"], *loading["unexpected_keys"]], loading
    assert "dfactory" not in sys.modules
    pipeline = LLaDA2Pipeline(model=model.eval(), scheduler=BlockRefinementScheduler())
    pipeline.set_progress_bar_config(disable=True)
    responses = []
    for case in json.loads(Path(cases).read_text()):
        prompt = torch.tensor([case.pop("prompt")])
        made = pipeline(input_ids=prompt, sampling_method="greedy", output_type="seq", **case)
        responses.append(made.sequences[0].tolist())
    print(json.dumps({"code": type(model).__module__, "responses": responses}))


if __name__ == "__main__":
    main(*sys.argv[1:])
