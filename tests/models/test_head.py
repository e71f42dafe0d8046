"""The chunked head against whole logits and autograd, and what it keeps in memory."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dfactory.models import head as head_module
from dfactory.models.head import VocabularyHead
from dfactory.ranges import TokenRanges
from tests.reference import plain_scores

N, H, V = 37, 24, 101


def problem(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    head = VocabularyHead.adopt(nn.Linear(H, V, bias=False))
    head.weight.data = torch.randn(V, H, generator=generator).to(dtype)
    hidden = torch.randn(N, H, generator=generator).to(dtype).requires_grad_()
    target = torch.randint(0, V, (N,), generator=generator)
    upstream = torch.randn(2, N, generator=generator)
    return head, hidden, target, upstream


def run(head, hidden, target, upstream, plain: bool, temperature: float = 1.0):
    """Scores, and the gradients of a random mix of log-probabilities and entropies."""
    if plain:
        logprob, entropy, hit = plain_scores(hidden @ head.weight.T, target, temperature)
    else:
        logprob, entropy, hit, *_ = head(hidden, target, temperature)
    grads = torch.autograd.grad((upstream[0] * logprob + upstream[1] * entropy).sum(), (hidden, head.weight))
    return (logprob.detach(), entropy.detach(), hit), grads


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0], ids=lambda temperature: f"T {temperature}")
@pytest.mark.parametrize("rows", [1, 5, 36, 1000], ids=lambda rows: f"{rows} rows fit a tile")
@pytest.mark.parametrize("width", [7, 4096])
def test_scores_and_gradients_of_whole_logits(monkeypatch, width, rows, temperature):
    """Tiles of all targets and some columns, of all columns and some targets, and of some of both."""
    monkeypatch.setitem(head_module.CHUNK_BYTES, "cpu", 4 * V * rows)
    monkeypatch.setattr(head_module, "WIDTH", width)
    expected_scores, expected_grads = run(*problem(), plain=True, temperature=temperature)
    scores, grads = run(*problem(), plain=False, temperature=temperature)
    torch.testing.assert_close(scores, expected_scores, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grads, expected_grads, atol=3e-5, rtol=1e-4)  # entries reach 30


@pytest.mark.parametrize("temperature", [1.0, 0.5], ids=lambda temperature: f"T {temperature}")
@pytest.mark.parametrize("rows, width", [(1, 7), (5, 7), (36, 4096), (1000, 4096)])
def test_targets_of_a_range_are_scored_among_its_ids(monkeypatch, rows, width, temperature):
    """The same numbers as from whole logits in which the ids of other ranges are -inf; no gradient leaves the range."""
    monkeypatch.setitem(head_module.CHUNK_BYTES, "cpu", 4 * V * rows)
    monkeypatch.setattr(head_module, "WIDTH", width)
    ranges = TokenRanges.of({"action": [30, 50], "image": [90, V]}, "a test")
    head, hidden, target, upstream = problem()
    logits = hidden @ head.weight.T
    others = ranges.group_of(target)[:, None] != ranges.group_of(torch.arange(V))
    allowed = logits.masked_fill(others, -1e9)
    expected = plain_scores(allowed, target, temperature)
    scores = head(hidden, target, temperature, ranges)
    torch.testing.assert_close(tuple(scores[:3]), tuple(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.argmax_N, allowed.argmax(-1))
    torch.testing.assert_close(scores.argmax_logprob_N, allowed.log_softmax(-1).amax(-1))
    grads = [
        torch.autograd.grad((upstream[0] * logprob + upstream[1] * entropy).sum(), (hidden, head.weight))
        for logprob, entropy, *_ in (scores, expected)
    ]
    torch.testing.assert_close(*grads, atol=3e-5, rtol=1e-4)
    only = torch.tensor([35, 40])
    head(hidden[:2], only, temperature, ranges).logprob_N.sum().backward()
    assert head.weight.grad[30:50].abs().sum() > 0
    assert head.weight.grad[:30].abs().sum() == head.weight.grad[50:].abs().sum() == 0


@pytest.mark.parametrize("rows", [5, 36, 1000], ids=lambda rows: f"{rows} targets at once")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", ["both", "hidden"])
def test_gradients_made_in_the_forward(monkeypatch, rows, dtype, trained):
    """As whole logits give them, some targets at a time; the backward computes nothing again."""
    monkeypatch.setitem(head_module.ONE_PASS_BYTES, "cpu", 4 * V * rows)
    monkeypatch.setitem(head_module.ONE_PASS_TILE, "cpu", 4 * 7 * rows)
    monkeypatch.setattr(head_module, "WIDTH", 7)
    head, hidden, target, (gradient, _) = problem(dtype)
    head.weight.requires_grad_(trained == "both")
    inputs = (hidden, head.weight) if trained == "both" else (hidden,)
    logprob, *others = plain_scores(hidden.float() @ head.weight.float().T, target, 1.0)
    expected = torch.autograd.grad((gradient * logprob).sum(), inputs)
    scores = head(hidden, target, gradient_N=gradient)
    loss = (gradient * scores.logprob_N).sum()
    with ProductCounter() as again:
        grads = torch.autograd.grad(loss, inputs)
    assert again.count == 0
    precise = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}
    torch.testing.assert_close(tuple(scores[:2]), (logprob, others[0]), **precise)
    torch.testing.assert_close(grads, expected, **precise)


def test_another_gradient_than_the_one_that_was_known():
    """The backward then computes logits again. So does a second one, and one with a gradient of entropies."""
    head, hidden, target, (gradient, other) = problem()
    for loss_of in (
        lambda scores: (other * scores.logprob_N).sum(),
        lambda scores: (gradient * scores.logprob_N + other * scores.entropy_N).sum(),
    ):
        plain, known = head(hidden, target), head(hidden, target, gradient_N=gradient)
        expected, found = (torch.autograd.grad(loss_of(scores), (hidden, head.weight)) for scores in (plain, known))
        torch.testing.assert_close(found, expected)
    loss = (gradient * head(hidden, target, gradient_N=gradient).logprob_N).sum()
    first = torch.autograd.grad(loss, (hidden, head.weight), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, head.weight)), first)


class ProductCounter(TorchDispatchMode):
    """Counts products of matrices."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_softcapped_logits(monkeypatch, temperature):
    """Scores and gradients of c tanh(z / c), tile by tile."""
    monkeypatch.setitem(head_module.CHUNK_BYTES, "cpu", 4 * V * 5)
    monkeypatch.setattr(head_module, "WIDTH", 7)
    head, hidden, target, upstream = problem()
    VocabularyHead.adopt(head, softcap=3.0)
    logits = 3 * torch.tanh(hidden @ head.weight.T / 3)
    torch.testing.assert_close(head(hidden), logits)
    logprob, entropy, hit = plain_scores(logits, target, temperature)
    expected = torch.autograd.grad((upstream[0] * logprob + upstream[1] * entropy).sum(), (hidden, head.weight))
    scores, grads = run(head, hidden, target, upstream, plain=False, temperature=temperature)
    torch.testing.assert_close(scores, (logprob.detach(), entropy.detach(), hit), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grads, expected, atol=3e-5, rtol=1e-4)


def test_the_average_of_rows_under_each_distribution():
    head, hidden, *_ = problem()
    logits = head(hidden)
    torch.testing.assert_close(head(logits, averages=True), logits.softmax(-1) @ head.weight)


@pytest.mark.parametrize("rows, width", [(1, 7), (5, 7), (1000, 4096)])
def test_expected_rows_and_their_gradient(monkeypatch, rows, width):
    """The softmax is a constant: the rows have a gradient, the hidden states have none."""
    monkeypatch.setitem(head_module.CHUNK_BYTES, "cpu", 4 * V * rows)
    monkeypatch.setattr(head_module, "WIDTH", width)
    head, hidden, *_ = problem()
    VocabularyHead.adopt(head, softcap=3.0)
    probability = (3 * torch.tanh(hidden @ head.weight.T / 3)).softmax(-1).detach()
    upstream = torch.randn(N, H, generator=torch.Generator().manual_seed(1))
    found = head(hidden, expected=True)
    torch.testing.assert_close(found, probability @ head.weight)
    weight, nothing = torch.autograd.grad((upstream * found).sum(), (head.weight, hidden), allow_unused=True)
    torch.testing.assert_close(weight, probability.T @ upstream)
    assert nothing is None


def test_no_expected_rows_have_a_gradient_of_zeros():
    """Under ZeRO-3 a rank without targets runs the same backward as the others."""
    head, hidden, *_ = problem()
    head(hidden[:0], expected=True).sum().backward()
    assert (head.weight.grad == 0).all()


def test_by_hand():
    """Logits ln 1, ln 2, ln 5: p = 1/8, 2/8, 5/8. The second row's argmax is its target."""
    head = VocabularyHead.adopt(nn.Linear(1, 3, bias=False))
    head.weight.data = torch.tensor([[1.0], [2.0], [5.0]]).log()
    logprob, entropy, hit, argmax, top = head(torch.ones(2, 1), torch.tensor([1, 2]))
    assert logprob.exp().tolist() == pytest.approx([2 / 8, 5 / 8])
    assert entropy.tolist() == pytest.approx([0.9003, 0.9003], abs=1e-4)  # -sum p ln p
    assert hit.tolist() == [False, True]
    assert argmax.tolist() == [2, 2]
    sharp = head(torch.ones(2, 1), torch.tensor([1, 2]), entropy_temperature=0.5)  # squares: 1/30, 4/30, 25/30
    assert sharp.entropy_N.tolist() == pytest.approx([0.5340, 0.5340], abs=1e-4)
    assert sharp.logprob_N.tolist() == logprob.tolist()
    assert top.exp().tolist() == pytest.approx([5 / 8, 5 / 8])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_bfloat16_gradients_within_its_rounding(temperature):
    """Against fp32 arithmetic on the same rounded inputs: relative error of whole gradients below 2 percent."""
    head, hidden, target, upstream = problem(torch.bfloat16)
    (_, entropy, _), grads = run(head, hidden, target, upstream, False, temperature)
    exact_head, exact_hidden, _, _ = problem()
    exact_head.weight.data = head.weight.data.float()
    exact_hidden = hidden.detach().float().requires_grad_()
    (expected_logprob, expected_entropy, _), expected = run(
        exact_head, exact_hidden, target, upstream, True, temperature
    )
    logprob = head(hidden, target).logprob_N
    assert logprob.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprob, expected_logprob, atol=0.15, rtol=0)
    torch.testing.assert_close(entropy, expected_entropy, atol=0.05, rtol=0)
    for got, want in zip(grads, expected, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.float() - want).norm() / want.norm() < 0.02


@pytest.mark.parametrize("width", [7, 4096])
def test_gradients_do_not_depend_on_the_tile_in_bfloat16(monkeypatch, width):
    """Tiles add up in fp32."""
    _, (_, whole) = run(*problem(torch.bfloat16), plain=False)
    monkeypatch.setitem(head_module.CHUNK_BYTES, "cpu", 4 * V * 2)
    monkeypatch.setattr(head_module, "WIDTH", width)
    _, (_, chunked) = run(*problem(torch.bfloat16), plain=False)
    assert (chunked.float() - whole.float()).norm() / whole.float().norm() < 4e-3


def test_a_frozen_head_gets_no_gradient_and_no_targets_no_trouble():
    head, hidden, target, _ = problem()
    head.weight.requires_grad_(False)
    head(hidden, target).logprob_N.sum().backward()
    assert head.weight.grad is None
    assert hidden.grad.abs().sum() > 0

    head.weight.requires_grad_(True)
    empty = head(hidden[:0], target[:0])
    assert empty.logprob_N.shape == (0,)
    empty.logprob_N.sum().backward()
    assert head.weight.grad.abs().sum() == 0


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any one operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_of_targets_times_vocabulary_is_ever_made(monkeypatch):
    """LLaDA2's vocabulary, 1024 targets: whole fp32 logits would be 644 MB; no tensor may exceed one tile of 8 MiB."""
    targets, vocabulary, hidden_size = 1024, 157_184, 8
    monkeypatch.setitem(head_module.CHUNK_BYTES, "cpu", 8 * 2**20)
    tile = 8 * 2**20 // 4  # elements
    head = VocabularyHead.adopt(nn.Linear(hidden_size, vocabulary, bias=False))
    hidden = torch.randn(targets, hidden_size, requires_grad=True)
    target = torch.randint(0, vocabulary, (targets,))
    with LargestTensor() as forward:
        logprob, entropy, *_ = head(hidden, target)
    saved = logprob.grad_fn.saved_tensors
    with LargestTensor() as backward:
        (logprob.sum() + entropy.sum()).backward()
    assert forward.elements == backward.elements == tile
    assert max(tensor.numel() for tensor in saved) == vocabulary * hidden_size  # the weight itself, no logits
    assert hidden.grad.isfinite().all()
