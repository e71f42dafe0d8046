"""Continual pre-training: the objective of supervised fine-tuning, on text that is trainable throughout."""

from dfactory.algorithms.base import ALGORITHMS
from dfactory.algorithms.sft import SupervisedFineTuning


class ContinualPreTraining(SupervisedFineTuning):
    name = "cpt"
    summary = "continual pre-training on plain text, also from autoregressive weights"
    default_of = None


ALGORITHMS.add(ContinualPreTraining())
