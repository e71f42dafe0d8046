"""Families, attention, scores, saving."""

import os

import torch

if not torch.cuda.is_available():  # before anything imports DeepSpeed, which else warns that it looked for a GPU
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
