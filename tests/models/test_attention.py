"""Segments, the dense mask and flex_attention are one function; padding stays finite; long dense masks are refused."""

import pytest
import torch

from dfactory.errors import ConfigError
from dfactory.models import attention as attention_module
from dfactory.models.attention import FlexPlan, MaskPlan, SegmentPlan, plan_attention
from dfactory.types import PADDING, Place
from dfactory.visibility import dense_mask
from tests.batches import make_batch, random_document
from tests.reference import as_float_mask, dense_table

HEADS, KV_HEADS, DIM, SCALING = 4, 2, 16, 0.3  # flex_attention takes no smaller heads


def rows_of_every_kind(length: int | None = None):
    """Three rows: two documents with two and one views, one document without views, one long document; then padding."""
    g = torch.Generator().manual_seed(3)
    return make_batch(
        [
            [random_document(g, 12, 4, 2, 50, prompt=5), random_document(g, 8, 4, 1, 50, prompt=2)],
            [random_document(g, 16, 4, 0, 50, prompt=8)],
            [random_document(g, 20, 4, 3, 50, prompt=4)],
        ],
        length,
    ).place_RS


def inputs(length: int, rows: int = 3, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(rows, heads, length, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(shape, generator=g, requires_grad=True) for shape in shapes]


def outcome(plan, place, length):
    """What is attended and its gradients, over the positions that hold a token."""
    token = place.document != PADDING
    tensors = [tensor.detach().to(token.device).requires_grad_() for tensor in inputs(length)]
    out = plan.attend(*tensors, SCALING)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(token.device)
    gradients = torch.autograd.grad((out * upstream)[token].sum(), tensors)
    return out, [out[token].detach(), *gradients]


def plain(place, length):
    """softmax(q k) v by the table, key heads repeated; nothing of the package in it."""
    tensors = q, k, v = inputs(length)
    token = place.document != PADDING
    seen = dense_table(*place) | (torch.eye(length, dtype=torch.bool) & ~token[:, :, None])
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    out = (((q @ k.transpose(2, 3)) * SCALING + as_float_mask(seen)).softmax(-1) @ v).transpose(1, 2)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    gradients = torch.autograd.grad((out * upstream)[token].sum(), tensors)
    return [out[token].detach(), *gradients]


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("chunk", [1, 4, 10, 64, 1000], ids=lambda chunk: f"chunk {chunk}")
def test_segments_are_the_plain_softmax(chunk, padding):
    place = rows_of_every_kind(68 + padding)
    length = place.document.shape[1]
    out, got = outcome(SegmentPlan.of(place, chunk), place, length)
    assert out.shape == (3, length, HEADS, DIM)
    torch.testing.assert_close(got, plain(place, length), atol=1e-5, rtol=1e-5)
    assert out[place.document == PADDING].eq(0).all()


@pytest.mark.parametrize("make_plan", [SegmentPlan.of, lambda place: MaskPlan(dense_mask(place))])
def test_a_row_of_padding_alone_stays_in_the_graph(make_plan):
    """Under ZeRO-3 a rank whose row is empty still has to run every module's backward, or the others wait for it."""
    tensors = inputs(9, rows=1)
    nowhere = torch.full((1, 9), PADDING)
    out = make_plan(Place(*[nowhere] * 4)).attend(*tensors, SCALING)
    gradients = torch.autograd.grad(out[torch.zeros_like(out, dtype=torch.bool)].sum(), tensors, allow_unused=True)
    assert all(gradient is not None and gradient.eq(0).all() for gradient in gradients)


def test_the_dense_plan_is_the_plain_softmax():
    place = rows_of_every_kind(75)
    out, got = outcome(MaskPlan(dense_mask(place)), place, 75)
    torch.testing.assert_close(got, plain(place, 75), atol=1e-5, rtol=1e-5)
    assert out.isfinite().all()


def causal_rows():
    """Two packed documents with a canvas each, and padding; a clean token is a block of its own."""
    clean, canvas = torch.arange(30), torch.full((8,), 20)
    block = torch.cat([clean, canvas, clean[:12], torch.full((4,), 8), torch.zeros(6, dtype=torch.long)])[None]
    document = torch.tensor([0] * 38 + [1] * 16 + [PADDING] * 6)[None]
    view = torch.tensor([0] * 30 + [1] * 8 + [0] * 12 + [1] * 4 + [0] * 6)[None]
    return Place(document, view, block, document)


@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_windows_in_all_three_forms(monkeypatch, window):
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(attention_module, "_compiled", flex_attention)
    place = causal_rows()
    token = place.document != PADDING
    tensors = [tensor[:1].detach() for tensor in inputs(60)]
    dense = MaskPlan(dense_mask(place, window)).attend(*tensors, SCALING)[token]
    for plan in (SegmentPlan.of(place, 7, window), SegmentPlan.of(place, window=window), FlexPlan.of(place, window)):
        torch.testing.assert_close(plan.attend(*tensors, SCALING)[token], dense, atol=1e-5, rtol=1e-5)


def test_flex_attention_is_the_plain_softmax_uncompiled(monkeypatch):
    """The arithmetic of the GPU's plan on a CPU: the same mask and call, without the compiler."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(attention_module, "_compiled", flex_attention)
    place = rows_of_every_kind(75)
    out = FlexPlan.of(place).attend(*(tensor.detach() for tensor in inputs(75)), SCALING)  # no backward on CPUs
    token = place.document != PADDING
    torch.testing.assert_close(out[token], plain(place, 75)[0], atol=1e-5, rtol=1e-5)
    assert out[~token].eq(0).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiled flex_attention needs a CUDA device")
def test_flex_attention_is_segments_on_a_gpu():
    """What is attended and the gradients of queries, keys and values."""
    place = rows_of_every_kind(700)
    _, expected = outcome(SegmentPlan.of(place), place, 700)
    on_gpu = Place(*(field.cuda() for field in place))
    _, got = outcome(FlexPlan.of(on_gpu), on_gpu, 700)
    torch.testing.assert_close([tensor.cpu() for tensor in got], expected, atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiled flex_attention needs a CUDA device")
def test_rows_of_many_lengths_compile_flex_attention_few_times():
    """A kernel a length would spend a run's first hours in the compiler."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    for length in range(200, 1200, 100):
        place = Place(*(field.cuda() for field in rows_of_every_kind(length)))
        outcome(FlexPlan.of(place), place, length)
    assert counters["stats"]["unique_graphs"] <= 6  # the mask's and the attention's: a first length, then any


def test_segments_compute_little_of_a_long_row():
    """A row of 16 documents of 64 tokens with a view each: chunks of 64 hold far fewer pairs than 2048 x 2048."""
    g = torch.Generator().manual_seed(0)
    place = make_batch([[random_document(g, 64, 8, 1, 50, prompt=0) for _ in range(16)]]).place_RS
    (chunks,) = SegmentPlan.of(place, 64).chunks_by_row
    pairs = sum((c.queries.stop - c.queries.start) * _key_count(c.keys) for c in chunks)
    assert pairs <= 16 * (64 * 64 + 64 * 128)
    seen = dense_mask(place).sum().item()
    assert seen <= pairs < 0.06 * 2048**2


def _key_count(keys):
    return keys.stop - keys.start if isinstance(keys, slice) else len(keys)


def test_how_a_plan_is_chosen():
    short, long = rows_of_every_kind(100), rows_of_every_kind(600)
    assert isinstance(plan_attention(short), MaskPlan)  # one masked call beats many small ones
    assert isinstance(plan_attention(long), SegmentPlan)
    assert isinstance(plan_attention(long, "dense"), MaskPlan)
    assert isinstance(plan_attention(rows_of_every_kind(4100), "segments"), SegmentPlan)
    with pytest.raises(ConfigError, match=r"attn_implementation dense with sequences of 4100.*use segments or flex"):
        plan_attention(rows_of_every_kind(4100), "dense")


def test_chunk_by_chunk_as_on_other_devices(monkeypatch):
    """Other devices have no kernel for CPUs: there every chunk is an operation of autograd."""
    place = rows_of_every_kind()
    length = place.document.shape[1]
    plan = SegmentPlan.of(place, chunk=10)
    _, found = outcome(plan, place, length)
    monkeypatch.setattr(attention_module.cpu_attention, "suits", lambda query, value: False)
    _, expected = outcome(plan, place, length)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
