"""`dfactory export --merge`: the mean of the best checkpoints of a run as a plain model directory, proved like an export.

Only checkpoints that are still on disk and were evaluated at their step can be chosen. Everything but the weights comes
from the best of them.
"""

import math
from pathlib import Path

import torch

from dfactory.commands.export import WITH_CARD, About, compare, describing, merge_adapters, prove_copy, write_proved
from dfactory.config.merge import MergeKeys
from dfactory.console import plain_console
from dfactory.errors import CheckpointError, ConfigError
from dfactory.models.adapters import is_adapters
from dfactory.models.headers import dtype_name, open_tensors, stored_dtype
from dfactory.models.merging import average_adapters, average_weights, check_products
from dfactory.models.policy import Policy
from dfactory.models.registry import check_tensors, read_config
from dfactory.models.saving import carry_files
from dfactory.runs.folder import Ranked, RunFolder
from dfactory.runs.lineage import Averaged

SAMPLED = 8  # tensors whose mean is computed a second time, in float64
PRODUCT_TOLERANCE = 1e-5  # of an averaged adapter product, as a share of the largest entry


def merge(run: str, output: str, keys: MergeKeys, about: About = WITH_CARD) -> int:
    """Write the mean of the `keys.topk` best checkpoints of the folder `run` as the model directory `output`.

    Raises ConfigError for a metric that the run never measured and where too few checkpoints are left, DataError and
    CheckpointError for what cannot be read or fails verification; then no files are left.
    """
    chosen = best_checkpoints(RunFolder(run), keys)
    plain_console(soft_wrap=True).print(
        f"the {len(chosen)} best by {keys.metric}, {'smallest' if keys.smaller_is_better else 'largest'} first: "
        + ", ".join(map(str, chosen))
    )
    sources = [ranked.path for ranked in chosen]
    write = _write_adapters if is_adapters(sources[0]) else _write_weights
    named = f"the mean of {len(sources)} checkpoint(s) of {run}"
    averaged = [Averaged(ranked.path.name, ranked.value) for ranked in chosen]
    describe = describing(sources[0], Path(output).resolve().name, about, keys.metric, averaged)
    return write_proved(Path(output), named, lambda partial: write(sources, partial), describe)


def best_checkpoints(folder: RunFolder, keys: MergeKeys) -> list[Ranked]:
    """The `topk` best checkpoints on disk, best first; of equal ones the newer comes first. A value that is no finite
    number does not count."""
    if not folder.metrics_file.is_file():
        raise ConfigError(
            f"--model {folder.path} holds no {folder.metrics_file.name}: --merge chooses among the checkpoints of a run "
            "folder, the output_dir of a recipe that was trained"
        )
    rows = folder.metrics()
    if not any(keys.metric in row for row in rows):
        known = sorted({name for row in rows for name in row} - {"step"})
        raise ConfigError(
            f"metric {keys.metric} is not in {folder.metrics_file}: it has {', '.join(known)}; an evaluation needs "
            "eval_datasets and eval_steps in the recipe"
        )
    ranked = folder.ranked_checkpoints(keys.metric, keys.smaller_is_better)
    if len(ranked) < keys.topk:
        others = [path.name for path in folder.checkpoints() if path not in {one.path for one in ranked}]
        raise ConfigError(
            f"topk {keys.topk}, but {folder.path} has {len(ranked)} checkpoint(s) on disk with a value of {keys.metric}"
            f"{': ' if ranked else ''}{', '.join(map(str, ranked))}"
            f"{', and without one ' if others else ''}{', '.join(others)}: merge fewer, or train with "
            f"save_total_limit at least {keys.topk} (or null) and eval_steps = save_steps"
        )
    return ranked[: keys.topk]


# --- full checkpoints -------------------------------------------------------------------------------------------------


def _write_weights(sources: list[Path], partial: Path) -> list[str]:
    best = sources[0]
    average_weights(sources, partial)
    carry_files(best, partial)
    if len(sources) == 1:
        return [prove_copy(best, partial)]
    count = len(check_tensors(partial, read_config(partial)))
    sampled = _prove_means(sources, partial)
    change = compare(best, partial)
    return [
        f"averaged {count} tensors ({dtype_name(stored_dtype(partial))}), which fit config.json; {sampled} of them, "
        "averaged again in float64, agree within rounding",
        f"{len(change.names)} tensors differ from {best.name}, most of all {change.name}, by up to {change.largest:.3g}",
    ]


def _prove_means(sources: list[Path], written: Path) -> int:
    """Average some tensors, spread evenly over the names, by another route. Returns how many."""
    stored, result = [open_tensors(source) for source in sources], open_tensors(written)
    names = sorted(result)
    sample = names[:: math.ceil(len(names) / SAMPLED)]
    for name in sample:
        each = torch.stack([tensors[name].get_tensor(name).double() for tensors in stored])
        found = result[name].get_tensor(name)
        # one rounding to the stored precision, and one a summand to float32, each at most eps / 2 of a magnitude
        allowed = (len(sources) + 2) / 2 * torch.finfo(found.dtype).eps * each.abs().mean(dim=0)
        if not ((found.double() - each.mean(dim=0)).abs() <= allowed + torch.finfo(found.dtype).tiny).all():
            raise CheckpointError(
                f"{name} is not the mean of {len(sources)} checkpoints: check the disk, then try again"
            )
    return len(sample)


# --- adapters ---------------------------------------------------------------------------------------------------------


def _write_adapters(sources: list[Path], partial: Path) -> list[str]:
    proofs = []

    def read(dtype: torch.dtype) -> Policy:
        policy = average_adapters(sources, dtype)
        proofs.append(_prove_products(policy))
        return policy

    merged = merge_adapters(read, sources[0], partial)
    return proofs + merged


def _prove_products(policy: Policy) -> str:
    products = check_products(policy)
    if not products.difference <= PRODUCT_TOLERANCE * products.largest:  # a NaN is not
        raise CheckpointError(
            f"the averaged adapter is {products.difference:.3g} away from the mean of the adapters, whose largest entry "
            f"is {products.largest:.3g}: nothing was exported"
        )
    return (
        f"averaged {products.count} adapter products: within {products.difference:.2g} of their means in float64, the "
        f"largest entry being {products.largest:.2g}"
    )
