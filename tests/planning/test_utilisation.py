"""Model FLOPs utilisation: exact pairs, torch's operations, and peaks by the device's name."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from benchmarks import parts
from dfactory.models.registry import load_policy, read_config
from dfactory.planning.memory import count_parameters
from dfactory.planning.utilisation import model_flops, peak_of, visible_pairs
from dfactory.types import Place
from dfactory.visibility import dense_mask
from tests.test_scale import batch_and_model  # noqa: F401


def test_pairs_are_those_of_the_dense_mask(batch_and_model):  # noqa: F811
    batch, _ = batch_and_model
    mask_RSS = dense_mask(batch.place_RS)
    found = visible_pairs(batch)
    assert found.all == int(mask_RSS.sum())
    assert found.of_targets == int(mask_RSS.sum(-1).flatten()[batch.target_index_N].sum())


def test_pairs_count_a_shared_prefix_and_leave_padding_out():
    """Two answers in blocks of 2 that share a prefix of 4 tokens; then padding."""
    document = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2, -1, -1]])
    view = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 0, 0]])
    block = torch.tensor([[0, 0, 1, 1, 2, 2, 2, 2, 0, 0]])
    trunk = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 0, -1, -1]])

    class Batch:
        place_RS = Place(document, view, block, trunk)
        target_index_N = torch.tensor([4, 7])

    assert visible_pairs(Batch) == (2 * 2 + 2 * 4 + 4 * 6, 2 * 6)


def test_operations_are_those_that_torch_counts_where_all_is_visible(batch_and_model):  # noqa: F811
    """A dense mask computes all pairs, so their difference is added. The head computes its logits once more."""
    batch, model_dir = batch_and_model
    policy, config = load_policy(model_dir, dtype="float32"), read_config(model_dir)
    assert torch.ops.aten._grouped_mm in flop_registry, f"{parts.__name__} registers what torch does not count on CPUs"
    with FlopCounterMode(display=False) as counter:
        policy(batch).logprob_N.sum().backward()
    expected = model_flops(config, count_parameters(model_dir), batch, ends_at_targets=True)
    rows, length = batch.place_RS.document.shape
    pairs, layers = visible_pairs(batch), config.num_hidden_layers
    heads = 4 * config.num_attention_heads * config.head_dim
    everywhere = (layers - 1) * rows * length**2 + batch.num_targets * length
    computed = 3.5 * heads * everywhere - 3 * heads * ((layers - 1) * pairs.all + pairs.of_targets)
    head_again = 2 * config.hidden_size * config.vocab_size * batch.num_targets
    padding = 1 - batch.num_tokens / (rows * length)
    assert padding < 0.2
    assert expected + computed + head_again == pytest.approx(counter.get_total_flops(), rel=0.2)


@pytest.mark.parametrize(
    "name, dtype, peak",
    [
        ("NVIDIA H200", "bfloat16", 989.0),
        ("NVIDIA H100 PCIe", "bfloat16", 756.0),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.0),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312.0),
        ("NVIDIA H200", "float32", None),
        ("", "bfloat16", None),
    ],
)
def test_peaks_are_known_by_the_name_that_torch_tells(name, dtype, peak):
    assert peak_of(name, dtype) == peak
