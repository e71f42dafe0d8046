"""Weights through Ray's object store: bit for bit, in several precisions and buckets, one put for many gets."""

import pytest
import ray
import torch
from torch import nn

from dfactory.rl import weights as weights_module
from dfactory.rl.weights import load_weights, pack_tensor, put_weights


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    ray.init(num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", logging_level="error")
    yield
    ray.shutdown()


def make_module() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3).to(torch.bfloat16), nn.BatchNorm1d(3))
    return module


def groups_of(module: nn.Module):
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        yield {name: tensor}


@pytest.mark.parametrize("bucket_bytes", [1, 100, 10**9])
def test_a_module_arrives_bit_for_bit(monkeypatch, bucket_bytes):
    monkeypatch.setattr(weights_module, "BUCKET_BYTES", bucket_bytes)
    source, target = make_module(), make_module()
    for tensor in target.parameters():
        tensor.data.zero_()
    sent = put_weights(3, groups_of(source))
    assert sent.version == 3
    assert sent.nbytes == sum(t.nbytes for t in (*source.parameters(), *source.buffers()))
    load_weights(target, sent, timeout_s=30)
    for (name, a), b in zip(source.state_dict().items(), target.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_two_actors_get_what_was_put_once():
    @ray.remote(num_cpus=0)
    class Holder:
        def load(self, sent):
            module = make_module()
            load_weights(module, sent, 30)
            return dict(module.state_dict())

    source = make_module()
    with torch.no_grad():
        source[0].weight.add_(1)
    sent = put_weights(0, groups_of(source))
    for state in ray.get([Holder.remote().load.remote(sent) for _ in range(2)]):
        assert torch.equal(state["0.weight"], source[0].weight)


def test_a_name_that_the_module_lacks_is_told():
    with pytest.raises(KeyError, match="other"):
        load_weights(make_module(), put_weights(0, iter([{"other": torch.zeros(2)}])), 30)


def test_scalars_and_empty_tensors():
    for tensor in (torch.tensor(3.5), torch.zeros(0, 4), torch.tensor([True, False])):
        _, array, shape = pack_tensor(tensor)
        assert shape == tuple(tensor.shape)
        assert array.nbytes == tensor.nbytes
