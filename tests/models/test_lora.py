"""LoRA adapters on the same adapter: frozen base, gradients through it, a directory that is read back."""

import pytest
import torch

from dfactory.errors import ConfigError
from dfactory.models.registry import add_adapters, load_policy
from dfactory.models.saving import save_policy
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
    with pytest.raises(ConfigError, match=r"lora_target_modules \['query_proj'\]"):
        with_adapters(random_policy("qwen3"), ["query_proj"])
