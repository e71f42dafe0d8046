"""`decode.compile`: the tokens of the obvious loop by one graph, and clear words where a model cannot be compiled."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from dfactory.decoding import compiled as compiled_code
from dfactory.decoding import decode, decoder
from dfactory.decoding.compiled import compiled_forward
from dfactory.errors import ConfigError
from tests.decoding.test_decoder import equals_uncached, make_rules, random_prompts


@pytest.fixture
def traced_only(monkeypatch):
    """What torch.compile traces, run as it is: no C++ to compile."""
    monkeypatch.setattr(compiled_code, "BACKEND", "eager")


RAGGED = (3, 17, 8, 30, 11)


def test_equals_the_uncached_loop_by_one_graph(policy, traced_only):
    """Prefills, ragged slots, edits and a last mask alone all are lengths of one graph."""
    prompts = random_prompts(*RAGGED)
    for keys in ({"threshold": 0.9}, {"editing_threshold": 0.7, "threshold": 0.4}, {"temperature": 1.0}):
        equals_uncached(policy, [*prompts, prompts[1]], make_rules(batch_size=3, compile=True, **keys))
    assert compiled_forward(policy).graphs == 1


def test_trained_weights_are_seen(make_policy, traced_only, caplog):
    """The weights are inputs of the graph."""
    policy, prompts = make_policy(num_hidden_layers=2, seed=3), random_prompts(5, 12)
    first = decode(policy, prompts, make_rules(compile=True))
    with torch.no_grad():
        for parameter in policy.layers.parameters():
            parameter.mul_(0.5)
    second = equals_uncached(policy, prompts, make_rules(compile=True))
    assert [r.token_ids for r in first] != [r.token_ids for r in second]
    assert caplog.text.count("decode.compile: compiled the model's forward in") == 1
    assert compiled_forward(policy).graphs == 1


@pytest.mark.slow
def test_inductors_code_equals_the_uncached_loop(make_policy):
    policy = make_policy(num_hidden_layers=2)
    equals_uncached(policy, random_prompts(*RAGGED), make_rules(batch_size=3, compile=True))
    assert compiled_forward(policy).graphs == 1


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"has_adapters": True}, "with LoRA adapters that are not merged: merge them"),
        ({"parameters": [SimpleNamespace(ds_id=0)]}, "with weights that ZeRO 3 spreads over ranks"),
    ],
)
def test_models_that_cannot_be_compiled(policy, monkeypatch, changes, told):
    for name, value in changes.items():
        given = property(lambda self, v=value: v) if name == "has_adapters" else lambda self, v=value: iter(v)
        monkeypatch.setattr(type(policy), name, given)
    monkeypatch.setattr(compiled_code, "_COMPILED", {})
    with pytest.raises(ConfigError, match=f"decode.compile true {told}.*set decode.compile to false"):
        compiled_forward(policy)


def test_a_model_that_is_not_one_graph(policy, traced_only, monkeypatch):
    monkeypatch.setattr(compiled_code, "_COMPILED", {})
    monkeypatch.setattr(compiled_code, "_traced", lambda *inputs: torch._dynamo.graph_break())
    with pytest.raises(
        ConfigError, match=r"decode\.compile true: torch\.compile does not take this model \(.*\); set it to"
    ):
        compiled_forward(policy)


def test_without_a_compiler(policy, monkeypatch):
    monkeypatch.setattr(compiled_code, "_COMPILED", {})
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"needs the C\+\+ compiler .*not installed; install it.*name another one in CXX"
    ):
        compiled_forward(policy)


def test_full_attention_is_refused(policy):
    with pytest.raises(ConfigError, match=r"decode\.compile true with full attention"):
        decoder.make_decoder(SimpleNamespace(sees_whole_document=True), make_rules(compile=True), 1, 32)


def test_compiled_or_recorded():
    with pytest.raises(ConfigError, match=r"decode\.compile true with decode\.cuda_graphs true: .*leave out one"):
        make_rules(compile=True, cuda_graphs=True)
