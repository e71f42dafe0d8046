"""Recipe keys: what each stage optimises."""

from dataclasses import dataclass

from dfactory.config.keys import key

STAGES = ("sft", "cpt", "cap", "dpo")
PAIRED_STAGES = ("dpo",)  # those whose record is a pair of documents


@dataclass
class ObjectiveKeys:
    stage: str = key("sft", "what is optimised", choices=STAGES)
    loss_weight: str = key(
        "uniform",
        "weight of a target: 1 over the number of targets, or 1/t over the number of response tokens (ELBO)",
        choices=("uniform", "elbo"),
    )
    confidence_beta: float = key(2.0, "CAP: weight of the entropy where the prediction is already right", low=0.0)
