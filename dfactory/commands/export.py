"""`dfactory export`: a training checkpoint becomes a plain model directory, and what was written is read back and proved.

A full checkpoint is copied without its engine state; every tensor, loaded from the copy, is then bitwise the one of the
checkpoint, rounded where another precision was asked for. LoRA adapters are merged into their base. Each merged weight has
to compute what base and adapter compute (models/adapters.py); loaded from the copy it has to be that sum, rounded once;
every other tensor has to be the base's own, in the base's precision; and the model's scores on a fixed probe have to be
those of base and adapters. The directory appears under its name when all of this holds, with a model card (cards/).
`--mask-token` gives a model without a mask its token: its tensors stay, but for rows that are appended.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from transformers.core_model_loading import revert_weight_conversion

from dfactory.commands.cards.card import write_card
from dfactory.commands.sglang import write_sglang
from dfactory.console import plain_console
from dfactory.errors import CheckpointError, ConfigError
from dfactory.models.adapters import Merge, is_adapters, merge_into_base, whole_model_dir
from dfactory.models.headers import INDEX, WEIGHTS, dtype_name, open_tensors, stored_dtype, weight_files
from dfactory.models.hub import resolve
from dfactory.models.mask_token import SPECIAL_TOKENS, TOKENIZER, TOKENIZER_CONFIG
from dfactory.models.policy import Policy
from dfactory.models.registry import load_policy
from dfactory.models.saving import CHAT_TEMPLATE, GENERATION_CONFIG, carry_files, layer_groups, save_policy
from dfactory.noise import masked_view
from dfactory.packing import PackedDocument, collate
from dfactory.runs.folder import sync_tree
from dfactory.runs.hashing import hash_file
from dfactory.runs.lineage import Averaged, Export, Lineage
from dfactory.runs.provenance import lineage_of, source_of, with_sums
from dfactory.types import AlignedDocument, TokenScores, ViewBatch
from dfactory.versions import version_of
from dfactory.vocabulary import read_vocabulary

TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
"""By how much the median log-probability of the probe's targets may change through merging. The median, because rounding
turns near ties of a router, and then a few targets change by any amount; the weights themselves are compared exactly."""
AS_TRAINED = (GENERATION_CONFIG, CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS)
"""Files that a run may have written otherwise than its model has them."""
PROBE_BLOCK, PROBE_LENGTH, PROBE_DOCUMENTS = 8, 64, 8


class About(NamedTuple):
    """What an export says of itself."""

    card: bool = True  # README.md and dfactory.json
    license: str | None = None  # None: that of what the model was made from
    repository: str | None = None  # on the hub, under which people will load it; None: the directory's name
    sglang: bool = False  # whether the files lie beside it that SGLang serves it with


WITH_CARD = About()


def export(
    model: str, output: str, dtype: str = "auto", mask_token: str | None = None, about: About = WITH_CARD
) -> int:
    """Write `model` (checkpoint, or run folder: its newest checkpoint) as the plain model directory `output`.

    `dtype` is float32, bfloat16, or auto: the checkpoint's own, of adapters that of their base. `mask_token` is the recipe's
    key: what becomes the mask of a model that knows none.
    Raises ConfigError if `output` is not free, CheckpointError if the checkpoint cannot be read or a proof fails; then
    no files are left.
    """
    source = resolve(model)
    wanted = None if dtype == "auto" else getattr(torch, dtype)

    def write(partial: Path) -> list[str]:
        if mask_token is not None:
            return _give_mask(source, partial, wanted or stored_dtype(source), mask_token)
        if is_adapters(source):
            return merge_adapters(lambda dtype: load_policy(source, dtype=dtype), source, partial, wanted)
        is_as_stored = wanted in (None, stored_dtype(source))
        return _copy_checkpoint(source, partial) if is_as_stored else _cast_checkpoint(source, partial, wanted)

    return write_proved(Path(output), str(source), write, describing(source, Path(output).resolve().name, about))


def describing(
    source: Path, name: str, about: About, metric: str | None = None, averaged: Sequence[Averaged] = ()
) -> Callable[[Path], None]:
    """What writes the card, the lineage and a server's files of an export into its directory, which will be called `name`.
    Raises CheckpointError where the lineage of the source is damaged."""
    if not about.card and not about.sglang:
        return lambda partial: None
    told, name = lineage_of(source), about.repository or name

    def describe(partial: Path) -> None:
        if about.sglang:
            plain_console(soft_wrap=True).print(write_sglang(partial, told))
        if about.card:
            write_card(partial, name, as_exported(partial))

    def as_exported(partial: Path) -> Lineage:
        lineage = with_sums(told, source)
        sums = {file.name: sha256 for file in weight_files(partial) if (sha256 := hash_file(file).sha256) is not None}
        entry = Export(
            name,
            source_of(source),
            dtype_name(stored_dtype(partial)),
            version_of("dfactory"),
            merged_adapters=is_adapters(source),
            metric=metric,
            averaged=list(averaged),
            license=about.license,
            weights=sums,
        )
        return lineage.then(entry)

    return describe


def write_proved(
    target: Path,
    named: str,
    write: Callable[[Path], list[str]],
    describe: Callable[[Path], None] = lambda partial: None,
) -> int:
    """Let `write` fill a directory, which takes the name `target` when `write` has returned what it proved, and `describe`
    has said what it is."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"--output {target} exists and is not an empty directory: give a new one")
    with _appears_whole(target) as partial:
        proofs = write(partial)
        describe(partial)
    console = plain_console(soft_wrap=True)
    for proof in proofs:
        console.print(proof)
    console.print(f"{named} is now {target}: {', '.join(sorted(file.name for file in target.iterdir()))}")
    return 0


@contextlib.contextmanager
def _appears_whole(target: Path) -> Iterator[Path]:
    """A hidden sibling to write into, which takes the name `target` at the end, or vanishes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.resolve().with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        sync_tree(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# --- full checkpoints -------------------------------------------------------------------------------------------------


def _copy_checkpoint(source: Path, partial: Path) -> list[str]:
    carry_files(source, partial)
    # weights that the checkpoint does not read (those of another format, or left over) are not part of it
    weights = weight_files(source)
    for file in weights if weights == [source / WEIGHTS] else [*weights, source / INDEX]:
        shutil.copyfile(file, partial / file.name)
    return [prove_copy(source, partial)]


def prove_copy(source: Path, partial: Path) -> str:
    """Load what was written; raises CheckpointError unless every tensor is bitwise that of the source."""
    dtype = stored_dtype(source)
    count = _require_same_tensors(load_policy(partial, dtype=dtype), open_tensors(source))
    return f"copied and loaded again: {count} tensors ({dtype_name(dtype)}) equal the checkpoint's bit by bit"


def _cast_checkpoint(source: Path, partial: Path, dtype: torch.dtype) -> list[str]:
    save_policy(load_policy(source, dtype=dtype), partial)
    count = _require_same_tensors(load_policy(partial, dtype=dtype), open_tensors(source))
    was = dtype_name(stored_dtype(source))
    return [f"cast and loaded again: {count} tensors ({dtype_name(dtype)}) are the checkpoint's, rounded from {was}"]


def _give_mask(source: Path, partial: Path, dtype: torch.dtype, mask_token: str) -> list[str]:
    if is_adapters(source):
        raise ConfigError(f"--mask-token with the adapters {source}: export them first, then the model that comes out")
    mask = read_vocabulary(source, mask_token_id=None, eos_token_id=None, mask_token=mask_token).chosen_mask
    if not mask.is_new:
        raise ConfigError(f"{source} has a mask token, {mask}: leave --mask-token out")
    save_policy(load_policy(source, dtype=dtype, mask=mask), partial)
    count = _require_same_tensors(load_policy(partial, dtype=dtype), open_tensors(source), mask.new_rows)
    found = read_vocabulary(partial, mask_token_id=None, eos_token_id=None).special.mask
    if found != mask.id:
        raise CheckpointError(f"the copy's mask came back as {found} instead of {mask.id}: nothing was exported")
    return [f"mask token: {mask}", f"loaded again: {count} tensors ({dtype_name(dtype)}) are the model's own"]


def _require_same_tensors(policy: Policy, stored: dict[str, safe_open], new_rows: int = 0) -> int:
    """Compare a loaded policy with stored tensors, a layer at a time, but for rows of the vocabulary that these lack.
    Returns how many tensors there are."""
    count = 0
    for group in layer_groups(policy.model):
        for name, loaded in revert_weight_conversion(policy.model, dict(group)).items():
            original = stored[name].get_tensor(name)
            if new_rows and len(loaded) == len(original) + new_rows:
                loaded = loaded[: len(original)]
            if not torch.equal(_bits(original.to(loaded.dtype)), _bits(loaded.detach())):
                raise CheckpointError(f"{name} came back differently from the copy: check the disk, then export again")
            count += 1
    return count


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes, so that equal NaNs are equal too."""
    return tensor.contiguous().flatten().view(torch.uint8)


# --- adapters ---------------------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """How one model directory differs from another."""

    names: tuple[str, ...]  # of the tensors that differ
    largest: float
    name: str  # of the tensor that holds the largest difference


def merge_adapters(
    read: Callable[[torch.dtype], Policy], source: Path, partial: Path, dtype: torch.dtype | None = None
) -> list[str]:
    """Merge the adapters of the policy that `read` gives, in the precision that it is asked for, into their base, into
    `partial`, rounded to `dtype` where one is given; `source` is where they lie. Returns the proofs, raises
    CheckpointError where one fails."""
    stored = stored_dtype(whole_model_dir(source))
    if dtype in (None, stored, torch.float32):  # what is wider than the base holds the sums more exactly
        return _merge(read, source, partial, dtype or stored)
    with tempfile.TemporaryDirectory(dir=partial.parent, prefix=f"{partial.name}.") as folder:
        whole = Path(folder) / "merged"
        whole.mkdir()
        return _merge(read, source, whole, stored) + _cast_checkpoint(whole, partial, dtype)


def _merge(read: Callable[[torch.dtype], Policy], source: Path, partial: Path, dtype: torch.dtype) -> list[str]:
    base_dir = whole_model_dir(source)
    adapted = read(dtype)
    probe = probe_batch(adapted.config.vocab_size)
    wanted = _score(adapted, probe)
    with adapted.model.disable_adapter():
        moved = _median_change(_score(adapted, probe), wanted)
    merge = merge_into_base(adapted, round_once=False)
    if not merge.changed:
        raise CheckpointError(
            f"the merged model equals its base {base_dir} in every tensor: the adapters are untrained, or too small to "
            "survive rounding; train them first"
        )
    changed = _write_merged(adapted, source, partial, dtype)
    del adapted  # one model in memory at a time
    change = compare(base_dir, partial)
    if set(change.names) != changed:
        names = sorted(changed.symmetric_difference(change.names))
        raise CheckpointError(f"{names[0]} came back differently from the copy: check the disk, then export again")
    merged = load_policy(partial, dtype=dtype)
    _require_merged_weights(merged, merge)
    difference = _require_same_scores(merged, probe, wanted, dtype)
    others = len(open_tensors(partial)) - len(changed)
    return [
        f"merged {source} into {base_dir}: {len(changed)} tensors changed, most of all {change.name}, by up to "
        f"{change.largest:.3g}; the other {others} are the base's, in its precision",
        f"loaded again ({dtype_name(dtype)}): {len(merge.weights)} weights are base plus adapter, rounded once; the median "
        f"log-probability of {probe.num_targets} targets is that of base and adapters within {difference:.2g} (allowed: "
        f"{TOLERANCE[dtype]:g}); the adapters move it by {moved:.2g}",
    ]


def _write_merged(merged: Policy, source: Path, partial: Path, dtype: torch.dtype) -> set[str]:
    """Returns the names of the tensors that are not the base's. Those are written as they lie in its files; where `dtype`
    is wider than most of them, those are widened."""
    for name in AS_TRAINED:  # before the base's own are carried along
        if (source / name).is_file():
            shutil.copyfile(source / name, partial / name)
    base_dir = whole_model_dir(source)
    originals, stored, changed = open_tensors(base_dir), stored_dtype(base_dir), set()

    def as_stored(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        written = {}
        for name, tensor in tensors.items():
            original = originals[name].get_tensor(name)
            is_base = torch.equal(original.to(tensor.dtype), tensor)
            changed.update(() if is_base else {name})
            precision = dtype if original.dtype == stored else original.dtype
            written[name] = (original if is_base else tensor).to(precision)
        return written

    whole = Policy(merged.model, source_dir=merged.source_dir)
    whole.logit_shift = merged.logit_shift
    save_policy(whole, partial, finish=as_stored, dtype=dtype)
    return changed


def compare(before: Path, after: Path) -> Change:
    """The tensors that two model directories share, one at a time. What is less exact after than before has changed."""
    old, new = open_tensors(before), open_tensors(after)
    changed, largest, where = [], 0.0, ""
    for name in sorted(set(old) & set(new)):
        difference = (old[name].get_tensor(name).double() - new[name].get_tensor(name).double()).abs().max()
        changed += [name] if difference > 0 else []
        if difference > largest:
            largest, where = float(difference), name
    return Change(tuple(changed), largest, where)


def _require_merged_weights(policy: Policy, merge: Merge) -> None:
    parameters = dict(policy.model.named_parameters())
    for name, weight in merge.weights.items():
        loaded = parameters[name].detach()
        if not torch.equal(weight.to(loaded.dtype), loaded):
            raise CheckpointError(
                f"{name} of the merged model is not base plus adapter: nothing was exported; check the disk, then try again"
            )


def probe_batch(vocab_size: int) -> ViewBatch:
    """Documents of random tokens, each with one view of its second half: the same for every model of that vocabulary."""
    rng = np.random.default_rng(0)
    documents = [_probe_document(rng, vocab_size, number) for number in range(PROBE_DOCUMENTS)]
    return collate([documents], PROBE_BLOCK)


def _probe_document(rng: np.random.Generator, vocab_size: int, number: int) -> PackedDocument:
    ids_T = rng.integers(0, vocab_size, PROBE_LENGTH, dtype=np.int32)
    position_P = np.arange(PROBE_LENGTH // 2, PROBE_LENGTH, dtype=np.int32)
    masked_P = rng.random(len(position_P)) < 0.5
    trainable_T = np.arange(PROBE_LENGTH) >= PROBE_LENGTH // 2
    document = AlignedDocument(number, ids_T, trainable_T, PROBE_BLOCK)
    view = masked_view(document, position_P, masked_P, np.full(len(position_P), 0.5), mask_id=vocab_size - 1)
    return PackedDocument(document, [view])


@torch.no_grad()
def _score(policy: Policy, batch: ViewBatch) -> TokenScores:
    return policy.eval().score(batch)


def _median_change(found: TokenScores, wanted: TokenScores) -> float:
    return float((found.logprob_N - wanted.logprob_N).abs().median())


def _require_same_scores(policy: Policy, probe: ViewBatch, wanted: TokenScores, dtype: torch.dtype) -> float:
    difference = _median_change(_score(policy, probe), wanted)
    if not difference <= TOLERANCE[dtype]:  # a NaN is not
        raise CheckpointError(
            f"the merged model's log-probabilities are {difference:.3g} away from those of base and adapters (median), in "
            f"{dtype_name(dtype)} {TOLERANCE[dtype]:g} is allowed: nothing was exported"
        )
    return difference
