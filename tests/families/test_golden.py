"""What the original code of each family computed from its golden files is what a Policy computes.

Families with another noise than masks have their own file. DFACTORY_GOLDEN_DIR names another folder of such files.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import revert_weight_conversion

from dfactory.algorithms.elbo import elbo
from dfactory.algorithms.sft import SFT
from dfactory.models.adapters import add_adapters
from dfactory.models.attention import plan_attention
from dfactory.models.registry import load_policy
from dfactory.models.saving import save_policy
from dfactory.noise.mask import masked_view
from dfactory.packing import PackedDocument, collate
from dfactory.types import PADDING, AlignedDocument, Place
from dfactory.visibility import dense_mask
from tests.families.cases import FAMILIES_WITH_GOLDENS, golden, policy_of
from tests.families.steps import batch_of, expected_nll, published_steps

ALL = pytest.mark.parametrize("name", FAMILIES_WITH_GOLDENS)
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["dense", "segments"])


# --- logits -----------------------------------------------------------------------------------------------------------

PREFIXES = ("", "full_", "block_")  # of a family whose attention the block size chooses: both
LOGITS = [
    (name, f"{prefix}{logits}")
    for name in FAMILIES_WITH_GOLDENS
    for prefix in PREFIXES
    for logits in ("logits", "noisy_logits")
    if hasattr(golden(name), f"{prefix}{logits}")
]
PADDED = [name for name in FAMILIES_WITH_GOLDENS if hasattr(golden(name), "padded_logits")]
DOUBLED = [name for name in FAMILIES_WITH_GOLDENS if hasattr(golden(name), "train_position_ids")]


def places(shape: torch.Size, block_size: int | None, view: int = 0) -> Place:
    """Whole documents, one a row."""
    document = torch.arange(shape[0])[:, None].expand(shape)
    block = (torch.arange(shape[1]) // (block_size or shape[1])).expand(shape)
    return Place(document, torch.full(shape, view), block, document)


def logits_of(policy, ids, position_ids, place: Place, implementation: str) -> torch.Tensor:
    with torch.no_grad():
        return policy.logits(policy.hidden(ids, position_ids, plan_attention(place, implementation)))


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@IMPLEMENTATIONS
@pytest.mark.parametrize("name, logits", LOGITS)
def test_logits(name, logits, implementation):
    g = golden(name)
    prefix = next((prefix for prefix in PREFIXES[1:] if logits.startswith(prefix)), "")
    size = g.expected["block_size"] if prefix != "full_" and "block_size" in g.expected else None
    place = places(g.input_ids.shape, size)
    assert torch.equal(dense_mask(place)[:1], getattr(g, f"{prefix}attention_mask"))
    ids = g.noisy_ids if "noisy" in logits else g.input_ids
    assert_close(logits_of(policy_of(name), ids, g.position_ids, place, implementation), getattr(g, logits))


@IMPLEMENTATIONS
@pytest.mark.parametrize("name", PADDED)
def test_logits_of_padded_rows(name, implementation):
    """A pad is no key. Where it counts as a position depends on the family, so positions come from the file."""
    g, real = golden(name), golden(name).padded_attention_mask_2d.bool()
    place = places(real.shape, None)
    place = Place(*(field.masked_fill(~real, PADDING) if field is place.document else field for field in place))
    positions = getattr(g, "padded_position_ids", g.position_ids)
    found = logits_of(policy_of(name), g.padded_input_ids, positions, place, implementation)
    assert_close(found[real], g.padded_logits[real])


@IMPLEMENTATIONS
@pytest.mark.parametrize("name", DOUBLED)
def test_logits_of_noisy_and_clean_together(name, implementation):
    g, length = golden(name), golden(name).input_ids.shape[1]
    noisy, clean = (places((len(g.train_input_ids), length), g.expected["block_size"], view) for view in (1, 0))
    place = Place(*(torch.cat(fields, dim=1) for fields in zip(noisy, clean, strict=True)))
    assert torch.equal(dense_mask(place)[:1], g.train_attention_mask)
    found = logits_of(policy_of(name), g.train_input_ids, g.train_position_ids, place, implementation)
    assert_close(found[:, :length], g.train_logits)


# --- losses and gradients, by way of views, packing and the objective -------------------------------------------------

STEPS = [
    pytest.param(name, step, id=f"{name}-{step.name}")
    for name in FAMILIES_WITH_GOLDENS
    for step in published_steps(golden(name))
]
PACKINGS = pytest.mark.parametrize("packed", [False, True], ids=["a row each", "one packed row"])


def original_norms(policy) -> dict[str, float]:
    """Of gradients under the original names: merged parameters are taken apart as in saving."""
    gradients = {name: parameter.grad for name, parameter in policy.model.named_parameters()}
    return {name: g.norm().item() for name, g in revert_weight_conversion(policy.model, gradients).items()}


@PACKINGS
@pytest.mark.parametrize("name, step", STEPS)
def test_published_steps(name, step, packed):
    """The loss, the nll of each target, and the norm of every tensor's gradient. Where the padding token's row of the
    embedding gets no gradient in the original, it gets none here."""
    g, policy = golden(name), policy_of(name)
    documents = range(len(g.input_ids))
    batch = batch_of(g, step, [documents] if packed else [[d] for d in documents])
    policy.zero_grad()
    with torch.set_grad_enabled(step.grad_norms is not None):
        scores = policy(batch)
        loss = SFT("elbo")(batch, scores).loss["nll"].total
    assert loss.item() == pytest.approx(step.loss, abs=1e-5, rel=1e-6)
    if (nll := expected_nll(g, step)) is not None:
        torch.testing.assert_close(-scores.logprob_N.detach(), nll, atol=5e-5, rtol=0)
    if step.grad_norms is None:
        return
    loss.backward()
    norms = original_norms(policy)
    assert norms == pytest.approx(step.grad_norms, rel=1e-3)
    assert sum(norm**2 for norm in norms.values()) ** 0.5 == pytest.approx(step.grad_norm_total, rel=1e-4)


@pytest.mark.parametrize("name", [n for n in FAMILIES_WITH_GOLDENS if "log_likelihood" in golden(n).expected])
def test_log_likelihood_from_stored_draws(name):
    """The ELBO of an answer over eight views of exact mask counts, each masked token weighed by 1 / masked share."""
    g, drawn = golden(name), golden(name).expected["log_likelihood"]
    ids, prompt = torch.tensor(drawn["prompt"] + drawn["answer"]).int().numpy(), len(drawn["prompt"])
    position, noisy_KL = torch.arange(len(ids)).int().numpy(), torch.tensor(drawn["noisy"]).flatten(0, 1)
    document = AlignedDocument(0, ids, position >= prompt, len(ids))
    masked_KL = (noisy_KL == g.expected["mask_token_id"]).numpy()
    share_K = masked_KL.sum(1) / len(drawn["answer"])
    assert share_K.tolist() == pytest.approx(torch.tensor(drawn["mask_ratio"]).flatten().tolist())
    views = [
        masked_view(document, position, masked, (0 * position + share).astype("float32"), g.expected["mask_token_id"])
        for masked, share in zip(masked_KL, share_K, strict=True)
    ]
    assert all((view.input_ids_P == noisy.numpy()).all() for view, noisy in zip(views, noisy_KL, strict=True))
    batch = collate([[PackedDocument(document, views)]], 1)
    with torch.no_grad():
        (value,) = elbo(batch, policy_of(name)(batch).logprob_N).tolist()
    assert value == pytest.approx(drawn["value"], rel=1e-6)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def tensors_of(directory) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(directory.glob("model*.safetensors")) for n, t in load_file(file).items()}


def config_of(directory) -> dict:
    return json.loads((directory / "config.json").read_text())


def saved(policy, directory, **options):
    directory.mkdir()
    save_policy(policy, directory, **options)
    return directory


def assert_identical(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@ALL
def test_what_is_saved_is_what_was_read(name, tmp_path):
    """Tensors, config.json and all other files; read again and saved in shards it is still the same."""
    source = tmp_path / "source"
    shutil.copytree(golden(name).directory, source, ignore=shutil.ignore_patterns("forward.*", "expected.json"))
    (source / "modeling_original.py").write_text("raise RuntimeError('never run here')\n")
    out = saved(load_policy(source, dtype="float32"), tmp_path / "out")
    assert {file.name for file in out.iterdir()} == {file.name for file in source.iterdir()}
    assert_identical(tensors_of(out), tensors_of(source))
    assert config_of(out) == config_of(source)
    again = load_policy(out, dtype="float32")
    torch.testing.assert_close(dict(again.state_dict()), dict(policy_of(name).state_dict()), atol=0, rtol=0)
    sharded = saved(again, tmp_path / "sharded", max_shard_bytes=100_000)
    assert len(list(sharded.glob("*.safetensors"))) > 3
    assert_identical(tensors_of(sharded), tensors_of(source))
    assert_identical(tensors_of(saved(load_policy(sharded, dtype="float32"), tmp_path / "whole")), tensors_of(source))


@ALL
def test_bfloat16_is_saved_under_the_same_names(name, tmp_path):
    source = golden(name).directory
    out = saved(load_policy(source, dtype="bfloat16"), tmp_path / "out")
    assert_identical(tensors_of(out), {n: t.bfloat16() for n, t in tensors_of(source).items()})
    keys = config_of(source)
    stated = "dtype" if "dtype" in keys else "torch_dtype"
    assert config_of(out) == keys | {stated: "bfloat16"}


TIED = ("tie_word_embeddings", "weight_tying")  # how config.json may call it


@pytest.mark.parametrize("name", [n for n in FAMILIES_WITH_GOLDENS if n != "diffusion_gemma"])  # tied in two ways
def test_tied_and_untied_heads(name, tmp_path):
    """A checkpoint of the other kind: with tied weights the head is not stored."""
    source, other = golden(name).directory, tmp_path / "other"
    tensors, keys = tensors_of(source), config_of(source)
    (key,) = [key for key in TIED if key in keys]
    model = policy_of(name).model
    head, embedding = (
        next(iter(revert_weight_conversion(model, {n: torch.zeros(1)})))
        for n in ("lm_head.weight", "model.embed_tokens.weight")
    )
    tensors = {n: t for n, t in tensors.items() if n != head}
    if keys[key]:
        tensors[head] = tensors[embedding].clone()
    other.mkdir()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    (other / "config.json").write_text(json.dumps(keys | {key: not keys[key]}))
    policy = load_policy(other, dtype="float32")
    tied = policy.model.lm_head.weight is policy.model.get_input_embeddings().weight
    assert tied != keys[key]
    assert_identical(tensors_of(saved(policy, tmp_path / "out")), tensors)


@ALL
def test_adapters_merged_are_the_sum_by_hand(name, tmp_path):
    """Attach, train a little, save, merge, export: under the original names each adapted weight has grown by
    alpha / r B A, and no other tensor has changed."""
    source = golden(name).directory
    policy = load_policy(source, dtype="float32")
    add_adapters(policy, r=4, alpha=8, dropout=0.0, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    generator, by_hand = torch.Generator().manual_seed(0), {}
    modules = dict(policy.model.get_base_model().named_modules())
    for path, module in modules.items():
        if hasattr(module, "lora_B"):
            b = module.lora_B["default"].weight
            b.data.normal_(std=0.1, generator=generator)
            by_hand[f"{path}.weight"] = 2 * b.detach() @ module.lora_A["default"].weight.detach()
    adapters = saved(policy, tmp_path / "adapters")
    assert not (adapters / "config.json").exists()
    out = saved(load_policy(adapters, dtype="float32", merged=True), tmp_path / "out")
    grown = revert_weight_conversion(policy_of(name).model, by_hand)
    found, before = tensors_of(out), tensors_of(source)
    assert found.keys() == before.keys()
    assert set(grown) <= set(before)
    for tensor in before:
        expected = before[tensor] + grown[tensor] if tensor in grown else before[tensor]
        torch.testing.assert_close(found[tensor], expected, atol=1e-6, rtol=0, msg=tensor)
    assert config_of(out) == config_of(source)


ORIGINALS = Path(os.environ.get("DFACTORY_ORIGINAL_CODE", "/nonexistent"))
READ_BY_ORIGINAL = [name for name in FAMILIES_WITH_GOLDENS if (ORIGINALS / name).is_dir()]


@pytest.mark.parametrize("name", READ_BY_ORIGINAL)
def test_the_original_code_reads_an_export(name, tmp_path):
    """Where DFACTORY_ORIGINAL_CODE names a folder with the Python files of each original, by the names of the golden files.
    DFACTORY_ORIGINAL_PYTHON is the interpreter that has its packages. Without a mask it computes full attention, so of
    other families only the tensors are compared."""
    out = saved(load_policy(golden(name).directory, dtype="float32"), tmp_path / "out")
    for file in (ORIGINALS / name).glob("*.py"):
        shutil.copy(file, out)
    script = Path(__file__).with_name("read_by_original.py")
    python = os.environ.get("DFACTORY_ORIGINAL_PYTHON", sys.executable)
    command = [python, script, out, golden(name).directory / "forward.safetensors"]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["left"] == []
    if policy_of(name).family.sees_whole_document:
        assert found["difference"] < 1e-4
