"""Scores of the initial model, computed once before training and kept in one file.

`reference.safetensors` holds for each set of records (named by its checksum) the pairs' document ids and visits, sorted,
the ELBOs of chosen and rejected, and a digest of what was scored: tokens, fill, views, targets and weights of the pair.
Its header says what the scores were computed from: weights and config.json by SHA-256, special ids, noise, seed. A file
with another origin is refused, because a reference that is not the initial model would be a silent fault. The header is
compared at the start, and the error names the key. The digests are compared at every lookup, so that they cover keys that
the header leaves out.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dfactory import distributed, faults
from dfactory.config.noise import NoiseKeys
from dfactory.data.chat import SpecialIds
from dfactory.data.source import RecordSource
from dfactory.engine.reference import Reference
from dfactory.errors import CheckpointError
from dfactory.models.adapters import ADAPTER_CONFIG, adapter_base, is_adapters
from dfactory.models.headers import weight_files
from dfactory.models.hub import resolve
from dfactory.recipe import Recipe
from dfactory.runs.folder import writing
from dfactory.types import PADDING, ViewBatch

FILE = "reference.safetensors"
HEADER = "computed_from"
KEY = np.dtype([("document_id", np.int64), ("visit", np.int64)])


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """The scores of one set of records: the ELBOs of both sides of a pair, for each visit. U counts pairs and visits."""

    key_U: np.ndarray  # KEY, ascending
    elbo_U2: np.ndarray  # float32: chosen, rejected
    content_U: np.ndarray  # int64: digest of what was scored

    @classmethod
    def sort(cls, key_U: np.ndarray, elbo_U2: np.ndarray, content_U: np.ndarray) -> "Scores":
        order_U = np.lexsort((key_U["visit"], key_U["document_id"]))
        return cls(key_U[order_U], elbo_U2[order_U], content_U[order_U])

    def find(self, key_U: np.ndarray, file: Path) -> np.ndarray:
        """The index of each key. Raises CheckpointError if one is missing."""
        index_U = np.minimum(np.searchsorted(self.key_U, key_U), len(self.key_U) - 1)
        missing_U = self.key_U[index_U] != key_U
        if missing_U.any():
            document_id, visit = key_U[missing_U][0]
            raise CheckpointError(
                f"{file} has no score of document {document_id} on visit {visit}: it was computed for a shorter run; remove "
                "it, or leave reference_path out, to compute it again"
            )
        return index_U


class StoredReference:
    """A Reference that looks its scores up."""

    def __init__(self, file: Path, scores: dict[int, Scores]):
        self.file, self.scores = file, scores

    def __call__(self, batch: ViewBatch, data: int) -> torch.Tensor:
        scores, key_U = self.scores[data], _keys(batch)
        index_U = scores.find(key_U, self.file)
        differs_U = scores.content_U[index_U] != content_of(batch)
        if differs_U.any():
            document_id, visit = key_U[differs_U][0]
            raise CheckpointError(
                f"{self.file} was computed from other documents or views: those of document {document_id} on visit {visit} "
                "differ; remove it, or leave reference_path out, to compute it again"
            )
        return torch.from_numpy(scores.elbo_U2[index_U]).flatten()

    def check(self, source: RecordSource, num_windows: int) -> None:
        """Raise CheckpointError unless every score that a source will need is there."""
        data = source.state_dict()["data"]
        if data not in self.scores:
            raise CheckpointError(
                f"{self.file} was computed from other records: it holds those with checksums {sorted(self.scores)}, not "
                f"{data}; remove it, or leave reference_path out, to compute it again"
            )
        self.scores[data].find(np.array(list(source.visits(num_windows)), KEY), self.file)


Sources = list[tuple[RecordSource, int]]  # unused sources, and how many global batches of each a run takes


def stored_reference(
    recipe: Recipe, special: SpecialIds, sources: Sources, model: Reference, resuming: bool
) -> StoredReference:
    """The reference from its file, or computed by `model`, the policy before its first step; all ranks call this together.

    The file is read if `reference_path` names one, or if a resumed run has one. Raises CheckpointError if it was computed
    from another model, noise or data, or for fewer visits.
    """
    file = Path(recipe.reference_path or Path(recipe.output_dir) / FILE)
    origin = distributed.on_first_rank(lambda: origin_of(recipe, special))
    if recipe.reference_path is not None or (resuming and distributed.on_first_rank(file.is_file)):
        reference = StoredReference(file, _read(file, origin))
    else:
        scores = {source.state_dict()["data"]: _compute(source, count, model) for source, count in sources}
        distributed.on_first_rank(lambda: _write(file, scores, origin))
        reference = StoredReference(file, scores)
    for source, count in sources:
        reference.check(source, count)
    return reference


def origin_of(recipe: Recipe, special: SpecialIds) -> dict[str, Any]:
    """What the scores depend on, apart from the records. `content_of` covers what else shapes documents and views."""
    noise = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(NoiseKeys)}
    weights = recipe.init_weights == "pretrained"
    model_dir = resolve(recipe.model_name_or_path, recipe.model_revision, weights=weights)
    return {
        "model": _sha256(_model_files(model_dir, recipe.init_weights)),
        "init_weights": recipe.init_weights,
        "dtype": recipe.dtype,
        "mask_token_id": special.mask,
        "eos_token_id": special.eos,
        "seed": recipe.seed,
        **noise,
    }


def _model_files(model_dir: Path, init_weights: str) -> list[Path]:
    """config.json and the weight files; for LoRA adapters their own files and those of their base."""
    if is_adapters(model_dir):
        own = [model_dir / ADAPTER_CONFIG, *sorted(model_dir.glob("adapter_model*.safetensors"))]
        return own + _model_files(adapter_base(model_dir), init_weights)
    weights = weight_files(model_dir) if init_weights == "pretrained" else []
    return [model_dir / "config.json", *weights]


def _sha256(files: list[Path]) -> str:
    """A digest of the files' digests. Files are read in parallel, because hashing releases the interpreter lock."""

    def digest(path: Path) -> bytes:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    with concurrent.futures.ThreadPoolExecutor() as threads:
        return hashlib.sha256(b"".join(threads.map(digest, files))).hexdigest()


def _keys(batch: ViewBatch) -> np.ndarray:
    pairs = (batch.document_id_D[0::2].tolist(), batch.columns["visit_D"][0::2].tolist())
    return np.array(list(zip(*pairs, strict=True)), KEY)


def content_of(batch: ViewBatch) -> np.ndarray:
    """A digest of everything that is scored in each pair, int64. It does not depend on the rest of the batch."""
    # Documents 2i and 2i + 1 are the sides of pair i; a shared prefix has the number D + that of its first document.
    document_S, count = batch.document_RS.flatten(), len(batch.document_id_D)
    is_trunk_S = document_S >= count
    pair_S = torch.where(document_S == PADDING, PADDING, (document_S - count * is_trunk_S) // 2)
    side_S = torch.where(is_trunk_S, 2, document_S % 2)
    at_S = [side_S, batch.view_RS.flatten(), batch.block_RS.flatten(), batch.position_ids_RS.flatten()]
    rows_S = torch.stack([*at_S, batch.input_ids_RS.flatten()], dim=1)
    places_N = torch.stack([field[batch.target_index_N] for field in at_S] + [batch.target_ids_N], dim=1)
    digests = []
    for pair in range(count // 2):
        mine_N = batch.document_N // 2 == pair
        parts = (rows_S[pair_S == pair], places_N[mine_N], batch.elbo_weight_N[mine_N])
        hashed = hashlib.blake2b(digest_size=8)
        for part in parts:
            hashed.update(part.contiguous().numpy())
        digests.append(int.from_bytes(hashed.digest(), "little", signed=True))
    return np.array(digests, np.int64)


def _compute(source: RecordSource, num_windows: int, model: Reference) -> Scores:
    """The scores of the first global batches, gathered over all ranks."""
    data, parts = source.state_dict()["data"], []
    silent = dist.get_rank() != 0
    for _ in track(range(num_windows), "reference scores", disable=silent):
        for batch in source.next_window():
            parts.append((_keys(batch), model(batch, data).cpu().numpy().reshape(-1, 2), content_of(batch)))
    mine = tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))
    return Scores.sort(*(np.concatenate(columns) for columns in zip(*distributed.gather(mine), strict=True)))


def _write(file: Path, scores: dict[int, Scores], origin: dict[str, Any]) -> None:
    tensors = {}
    for data, one in scores.items():
        tensors |= {f"{data}.{name}": np.ascontiguousarray(one.key_U[name]) for name in KEY.names}
        tensors |= {f"{data}.elbo": one.elbo_U2, f"{data}.content": one.content_U}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    with writing(file):
        save_file(tensors, partial, metadata={HEADER: json.dumps(origin)})
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        faults.at(f"{FILE}.written", partial)
    _read(partial, origin)  # refuses a truncated file before it gets the final name
    partial.replace(file)
    faults.at(f"{FILE}.renamed")


def _read(file: Path, origin: dict[str, Any]) -> dict[int, Scores]:
    try:
        with safe_open(file, framework="np") as stored:
            header = (stored.metadata() or {}).get(HEADER)
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as problem:
        raise CheckpointError(
            f"{file} cannot be read as a precomputed reference: {problem}; remove it, or leave reference_path out, to "
            "compute it again"
        ) from problem
    if header is None:
        raise CheckpointError(f"{file} is no precomputed reference: give the {FILE} of a run")
    _refuse_another_origin(file, json.loads(header), origin)
    scores = {}
    for data in {name.partition(".")[0] for name in tensors}:
        key_U = np.empty(len(tensors[f"{data}.elbo"]), KEY)
        for name in KEY.names:
            key_U[name] = tensors[f"{data}.{name}"]
        scores[int(data)] = Scores(key_U, tensors[f"{data}.elbo"], tensors[f"{data}.content"])
    return scores


def _refuse_another_origin(file: Path, found: dict[str, Any], origin: dict[str, Any]) -> None:
    for name in origin.keys() | found.keys():
        if found.get(name) != origin.get(name):
            what = "another model (SHA-256 of config.json and weights)" if name == "model" else f"another {name}"
            raise CheckpointError(
                f"{file} was computed from {what}: {found.get(name)} there, {origin.get(name)} here; remove it, or leave "
                "reference_path out, to compute it again"
            )
