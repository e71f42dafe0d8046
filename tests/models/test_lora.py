"""LoRA adapters on the same adapter: frozen base, gradients through it, a directory that is read back."""

import json
from types import SimpleNamespace

import pytest
import torch

from dfactory.errors import CheckpointError, ConfigError
from dfactory.models.adapters import adapted_linears, add_adapters, unreached_experts
from dfactory.models.registry import load_policy, meta_model, read_config, trained_block_size
from dfactory.models.saving import save_policy
from dfactory.planning.memory import count_adapters
from dfactory.vocabulary import read_vocabulary
from tests.batches import make_batch, random_document
from tests.models.conftest import GOLDEN_DIR

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def batch():
    return make_batch([[random_document(torch.Generator().manual_seed(2), 16, 4, 2, 96, prompt=5)]])


def with_adapters(policy, target_modules=TARGETS):
    return add_adapters(policy, r=4, alpha=8, dropout=0.0, target_modules=target_modules)


def test_adapters_start_as_nothing_and_train_alone(random_policy, tmp_path):
    policy = random_policy("qwen3")
    with torch.no_grad():
        before = policy(batch()).logprob_N
    frozen = {name: p.clone() for name, p in policy.model.named_parameters()}
    with_adapters(policy)
    scores = policy(batch())
    torch.testing.assert_close(scores.logprob_N.detach(), before, atol=1e-6, rtol=0)

    trainable = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 4 * 2  # layers, modules, A and B
    assert all("lora_" in name for name in trainable)
    for _ in range(3):
        loss = -policy(batch()).logprob_N.mean()
        loss.backward()
        with torch.no_grad():
            for p in trainable.values():
                p -= 0.5 * p.grad
                p.grad = None
    with torch.no_grad():
        after = policy(batch()).logprob_N
    assert after.mean() > before.mean() + 0.05
    base = dict(policy.model.get_base_model().named_parameters())
    for name, tensor in frozen.items():
        kept = base.get(name, base.get(name.replace("_proj.weight", "_proj.base_layer.weight")))
        assert torch.equal(kept, tensor), name

    whole = random_policy(
        "qwen3"
    )  # the same weights, drawn anew; adapters are read on top of a directory that holds them
    save_policy(whole, whole.source_dir)
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    save_policy(policy, adapters)
    assert not (adapters / "model.safetensors").exists()
    with torch.no_grad():
        again = load_policy(adapters, dtype="float32")(batch()).logprob_N
    torch.testing.assert_close(again, after, atol=1e-6, rtol=0)


def test_adapters_on_llada2_split_the_stacked_heads():
    policy = with_adapters(load_policy(GOLDEN_DIR / "llada2_tiny", dtype="float32"))
    document = random_document(torch.Generator().manual_seed(2), 16, 8, 1, 160, prompt=3)
    policy(make_batch([[document]])).logprob_N.sum().backward()
    gradients = [p.grad for name, p in policy.named_parameters() if "lora_B" in name]
    assert len(gradients) == 3 * 4
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_gradient_checkpointing_reaches_the_adapters(random_policy):
    def gradients(checkpointing):
        policy = random_policy("qwen3").train()
        torch.manual_seed(0)
        with_adapters(policy)
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.data.normal_(std=0.1)
        if checkpointing:
            policy.model.gradient_checkpointing_enable()
        policy(batch()).logprob_N.sum().backward()
        return [p.grad for p in policy.parameters() if p.requires_grad]

    torch.testing.assert_close(gradients(True), gradients(False), atol=1e-6, rtol=1e-5)


def test_an_unknown_module_name_is_refused(random_policy):
    """Also beside names that the model has; at the start and in the forecast alike."""
    policy = random_policy("qwen3")
    for refuse in (
        lambda names: with_adapters(policy, names),
        lambda names: count_adapters(policy.source_dir, 8, tuple(names)),
    ):
        for names in (["query_proj"], ["q_proj", "query_proj"]):
            with pytest.raises(
                ConfigError, match=r"lora_target_modules query_proj: the model has no such module; its lin"
            ):
                refuse(names)
        for name, kind in (("embed_tokens", "Embedding"), ("mlp", "Qwen3MLP"), ("norm", "Qwen3RMSNorm")):
            with pytest.raises(ConfigError, match=rf"{name} is a {kind}, and adapters go on linear layers only"):
                refuse(["q_proj", name])
        with pytest.raises(ConfigError, match="the head is scored in chunks"):
            refuse(["lm_head"])
    assert not policy.has_adapters


def test_routed_experts_that_adapters_miss_are_told(random_policy):
    model = meta_model(read_config(GOLDEN_DIR / "llada2_tiny"))
    routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    share = f"{routed / sum(p.numel() for p in model.parameters()):.0%}"
    (told,) = unreached_experts(model, ["q_proj", "up_proj", "down_proj"])
    assert f"up_proj, down_proj reach dense layers and shared experts only: the routed experts, {share} of" in told
    assert unreached_experts(model, ["q_proj"]) == []
    assert unreached_experts(random_policy("qwen3").model, ["down_proj"]) == []
    with pytest.raises(ConfigError, match=r"experts is a .*adapters go on linear layers only"):
        adapted_linears(model, ["experts"])


# --- directories of adapters ------------------------------------------------------------------------------------------


@pytest.fixture
def lora_dir(random_policy, tmp_path):
    """Adapters with random second factors on a saved base with a mask id on record, and the policy that they came from."""
    policy = random_policy("qwen3")
    save_policy(policy, policy.source_dir)
    with_adapters(policy)
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    (directory := tmp_path / "adapters").mkdir()
    save_policy(policy, directory, block_size=8, mask_token_id=95)
    return SimpleNamespace(path=directory, policy=policy.eval(), base=policy.source_dir)


def logprob_N(policy) -> torch.Tensor:
    with torch.no_grad():
        return policy(batch()).logprob_N


def test_adapters_are_read_as_they_are_and_merged_where_a_run_starts(lora_dir):
    expected = logprob_N(lora_dir.policy)
    assert (logprob_N(load_policy(lora_dir.base, dtype="float32")) - expected).abs().max() > 0.1
    as_they_are = load_policy(lora_dir.path, dtype="float32")
    assert as_they_are.has_adapters
    torch.testing.assert_close(logprob_N(as_they_are), expected, atol=1e-6, rtol=0)
    merged = load_policy(lora_dir.path, dtype="float32", merged=True)
    assert not merged.has_adapters
    torch.testing.assert_close(logprob_N(merged), expected, atol=1e-5, rtol=0)
    assert read_config(lora_dir.path).hidden_size == read_config(lora_dir.base).hidden_size
    assert trained_block_size(lora_dir.path) == 8
    assert read_vocabulary(str(lora_dir.path), mask_token_id=None, eos_token_id=94).special.mask == 95


def test_what_starts_from_adapters_is_saved_whole(lora_dir, tmp_path):
    """All weights under the base's names and config.json, and nothing that makes it look like adapters."""
    merged = load_policy(lora_dir.path, dtype="float32", merged=True)
    (out := tmp_path / "out").mkdir()
    save_policy(merged, out)
    assert {file.name for file in out.iterdir()} >= {"config.json", "model.safetensors", "generation_config.json"}
    assert not (out / "adapter_config.json").exists()
    assert torch.equal(logprob_N(load_policy(out, dtype="float32")), logprob_N(merged))


def rewritten(directory, **keys):
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    return directory


@pytest.mark.parametrize(
    "keys",
    [
        {"use_dora": True},
        {"megatron_config": {}, "megatron_core": "antigravity"},
        {"target_modules": "(a+)+$"},
        {"target_modules": ["(a+)+$"]},
        {"rank_pattern": {"(a+)+$": 3}},
        {"init_lora_weights": "pissa"},
        {"modules_to_save": ["lm_head"]},
        {"layers_to_transform": [0]},
        {"layer_replication": [[0, 2]]},
        {"bias": "all"},
        {"fan_in_fan_out": True},
        {"r": 10**9},
        {"r": 0},
        {"lora_alpha": "16"},
        {"some_new_key": 1},
    ],
    ids=str,
)
def test_adapters_of_another_kind_are_refused_by_name(lora_dir, keys):
    with pytest.raises(CheckpointError, match=rf"^{next(iter(keys))} .* in .*adapter_config\.json"):
        load_policy(rewritten(lora_dir.path, **keys))


def test_adapters_that_do_not_fit_are_refused(lora_dir, tmp_path):
    with pytest.raises(CheckpointError, match=r"lora_A.* has shape \[4, 32\], but .* states r 8"):
        load_policy(rewritten(lora_dir.path, r=8))
    with pytest.raises(CheckpointError, match="lora_target_modules up_projection: the model has no such module"):
        load_policy(rewritten(lora_dir.path, r=4, target_modules=["up_projection"]))
    with pytest.raises(CheckpointError, match=r"does not fit adapter_config.json and base: missing .*up_proj"):
        load_policy(rewritten(lora_dir.path, target_modules=[*TARGETS, "up_proj"]))
    with pytest.raises(CheckpointError, match=r"does not fit .*unexpected .*o_proj"):
        load_policy(rewritten(lora_dir.path, target_modules=TARGETS[:3]))
    for base in ("/nowhere", "x" * 5_000, "a\0b", 7, None, ["x"]):
        with pytest.raises(CheckpointError, match="is not a directory: adapters are nothing without their base"):
            load_policy(rewritten(lora_dir.path, base_model_name_or_path=base))
    for base in ("/etc", str(tmp_path)):
        with pytest.raises(CheckpointError, match=r"holds no config\.json: it is not a model directory"):
            load_policy(rewritten(lora_dir.path, base_model_name_or_path=base))
