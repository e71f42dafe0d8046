"""Recipe keys: what each stage optimises."""

from dataclasses import dataclass
from typing import Optional

from dfactory.config.keys import key

STAGES = ("sft", "cpt", "cap", "dpo", "rl")
PAIRED_STAGES = ("dpo",)  # those whose record is a pair of documents
PLAIN_STAGES = ("sft", "cpt", "cap")  # those that train on records as they are, without a second model or own samples


@dataclass
class ObjectiveKeys:
    stage: str = key("sft", "what is optimised", choices=STAGES)
    loss_weight: str = key(
        "uniform",
        "sft, cpt, cap: weight of a target: 1 over the number of targets, or 1/t over the number of response tokens (ELBO)",
        choices=("uniform", "elbo"),
    )
    beta: float = key(0.1, "DPO: how closely the policy keeps to the reference; larger is closer", low=0.0)
    loss_type: str = key(
        "sigmoid",
        "DPO: the loss of a pair's margin, as in trl; ipo divides ELBOs by the real response tokens",
        choices=("sigmoid", "robust", "hinge", "ipo"),
    )
    label_smoothing: float = key(
        0.0,
        "DPO: share of pairs that are taken to be labelled the wrong way round (sigmoid, robust)",
        low=0.0,
        high=0.5,
    )
    length_normalize: bool = key(False, "DPO: divide ELBOs by the real response tokens; trl's sigmoid_norm")
    sft_loss_coef: float = key(0.0, "DPO: weight of the chosen answers' negative ELBO per response token", low=0.0)
    reference: Optional[str] = key(
        None,
        "DPO: a frozen copy of the initial model, the model without its adapters, or the initial model's scores computed "
        "once; null: adapter with use_peft, else copy",
        choices=("copy", "adapter", "precomputed"),
    )
    reference_path: Optional[str] = key(
        None, "precomputed reference of an earlier run (its reference.safetensors); null: compute it, in output_dir"
    )
    confidence_beta: float = key(2.0, "CAP: weight of the entropy where the prediction is already right", low=0.0)
    entropy_temperature: float = key(
        1.0, "CAP: take that entropy of softmax(logits / this); 0.5 is dParallel's", low=0.01
    )
