"""The last layer at chosen positions is the whole layer, read there; for every family and every plan of attention."""

import copy

import pytest
import torch

from dfactory.models import attention as attention_module
from dfactory.models import last_layer
from dfactory.models.adapters import add_adapters
from dfactory.models.attention import FlexPlan, plan_attention
from dfactory.models.registry import load_policy
from tests.batches import make_batch, random_document
from tests.models.conftest import CONFIGS, GOLDEN_DIR


@pytest.fixture(params=["llada2_moe", *CONFIGS])
def policy(request, random_policy):
    if request.param == "llada2_moe":
        return load_policy(GOLDEN_DIR / "llada2_tiny", dtype="float32")
    return random_policy(request.param)


def rows(policy):
    """Three rows that end in padding, the middle one without a target."""
    g, vocabulary = torch.Generator().manual_seed(5), policy.config.vocab_size
    document = [random_document(g, length, 4, views, vocabulary, 5) for length, views in ((24, 2), (16, 0), (20, 3))]
    return make_batch([[one] for one in document], row_length=96)


def outcome(policy, batch, hidden_NH):
    """Hidden states and the gradients of all parameters but the head's."""
    upstream = torch.randn(hidden_NH.shape, generator=torch.Generator().manual_seed(2))
    parameters = [p for p in policy.parameters() if p.requires_grad]
    gradients = torch.autograd.grad((hidden_NH * upstream).sum(), parameters, allow_unused=True)
    return [hidden_NH, *(gradient for gradient in gradients if gradient is not None)]


def both(policy, batch, plan):
    """What the chosen positions get, from the last layer there alone and from the whole layer."""
    inputs = (batch.input_ids_RS, batch.position_ids_RS, plan)
    whole = policy.hidden(*inputs).flatten(0, 1)[batch.target_index_N]
    chosen = policy.hidden_at(batch.target_index_N, batch.embedding_inputs, *inputs[1:])
    return outcome(policy, batch, chosen), outcome(policy, batch, whole)


def close(got, wanted):
    """Where a tensor's largest number is above 10, its small ones are sums of large ones: rounding is a share of the largest
    (the golden model's embedding has gradients of 247, and 5e-5 of one was rounding on a CPU with AVX-512)."""
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=max(1e-5, 1e-6 * other.abs().max().item()), rtol=1e-4)


@pytest.mark.parametrize("implementation", ["dense", "segments"])
def test_the_whole_layer_read_at_the_chosen_positions(policy, implementation, monkeypatch):
    monkeypatch.setattr(attention_module, "DENSE_BELOW", 0)
    batch = rows(policy)
    assert policy.ends_at_targets
    assert 0 < batch.num_targets < batch.num_tokens / 3
    got, wanted = both(policy, batch, plan_attention(batch.place_RS, implementation))
    close(got, wanted)


def test_positions_in_disorder_are_refused(policy):
    batch = rows(policy)
    plan = plan_attention(batch.place_RS)
    with pytest.raises(ValueError, match="target_index_N must ascend through the flattened"):
        policy.hidden_at(batch.target_index_N.flip(0), batch.embedding_inputs, batch.position_ids_RS, plan)


@pytest.mark.parametrize("family", ["llada2_moe", *CONFIGS])
def test_by_flex_attention_uncompiled(family, random_policy, monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(attention_module, "_compiled", flex_attention)
    if family == "llada2_moe":
        policy = load_policy(GOLDEN_DIR / "llada2_tiny", dtype="float32")
    else:
        policy = random_policy(family, head_dim=16)  # flex_attention takes no smaller heads
    batch = rows(policy)
    with torch.no_grad():
        plan = FlexPlan.of(batch.place_RS)
        inputs = (batch.input_ids_RS, batch.position_ids_RS, plan)
        whole = policy.hidden(*inputs).flatten(0, 1)[batch.target_index_N]
        chosen = policy.hidden_at(batch.target_index_N, batch.embedding_inputs, *inputs[1:])
    torch.testing.assert_close(chosen, whole, atol=1e-5, rtol=1e-4)


def test_nowhere_all_modules_run_all_the_same(policy):
    """Under ZeRO-3 the other ranks wait for each of them, in either direction."""
    batch, ran = rows(policy), []
    for name, module in policy.model.model.layers[-1].named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    plan = plan_attention(batch.place_RS)
    policy.hidden_at(batch.target_index_N, batch.embedding_inputs, batch.position_ids_RS, plan)
    expected, ran[:] = list(ran), []
    nothing_0H = policy.hidden_at(batch.target_index_N[:0], batch.embedding_inputs, batch.position_ids_RS, plan)
    assert ran == expected
    assert nothing_0H.shape == (0, policy.config.hidden_size)
    layer = list(policy.model.model.layers[-1].parameters())
    gradients = torch.autograd.grad(nothing_0H.sum(), layer)
    assert all(gradient.eq(0).all() for gradient in gradients)


def test_with_checkpointing_and_adapters(random_policy):
    policy = add_adapters(random_policy("qwen3"), r=2, alpha=4, dropout=0.0, target_modules=["q_proj", "o_proj"])
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    batch = rows(policy)
    plain, _ = both(policy, batch, plan_attention(batch.place_RS))
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    policy.train()
    got, wanted = both(policy, batch, plan_attention(batch.place_RS))
    close(got, wanted)
    torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-4)


def test_it_costs_what_it_should(random_policy):
    """Queries, what attention gives and the mlp: at the targets. Keys and values: everywhere."""
    policy, lengths = random_policy("llama"), {}
    layer, batch = policy.model.model.layers[-1], rows(policy)
    for module, name in ((layer.self_attn, "attn"), (layer.mlp, "mlp")):
        for part, child in module.named_children():
            child.register_forward_hook(
                lambda _, args, out, name=f"{name}.{part}": lengths.update({name: out.shape[:-1].numel()})
            )
    policy(batch)
    everywhere = batch.input_ids_RS.numel()
    assert lengths.pop("attn.k_proj") == lengths.pop("attn.v_proj") == everywhere
    assert set(lengths.values()) == {batch.num_targets}


def test_a_copy_is_adopted_too(policy):
    """The frozen reference is a deep copy: its modules are its own."""
    copied = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
    batch = rows(policy)
    with torch.no_grad():
        assert copied(batch).logprob_N.std() > 0
        assert policy(batch).logprob_N.std() < 1e-5


def test_a_layer_put_together_otherwise_is_left_alone(random_policy):
    policy = random_policy("llama")
    layer = policy.model.model.layers[0]
    layer.extra_norm = torch.nn.Identity()
    before = type(layer)
    assert not last_layer.adopt(layer)
    assert type(layer) is before
    policy.ends_at_targets = False
    batch = rows(policy)
    scores = policy(batch)
    policy.ends_at_targets = True
    torch.testing.assert_close(scores.logprob_N, policy(batch).logprob_N, atol=1e-5, rtol=1e-5)
