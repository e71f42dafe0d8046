"""use_liger_kernel: every norm and every gated product of a model goes through Liger's functions, and nothing changes."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from dfactory.assembly import load_initial, make_policy
from dfactory.errors import ConfigError
from dfactory.models.fused import fuse
from dfactory.models.registry import load_policy
from dfactory.recipe import load_recipe
from tests.batches import make_batch, random_document
from tests.models.conftest import CONFIGS, GOLDEN_DIR


class Norm:
    """What LigerRMSNormFunction computes, in torch; Triton's kernels run on a GPU alone."""

    calls = 0

    @staticmethod
    def apply(x, weight, eps, offset, casting_mode, in_place):
        assert (offset, casting_mode, in_place) == (0.0, "llama", False)
        Norm.calls += 1
        return nn.functional.rms_norm(x.float(), weight.shape, eps=eps).to(x.dtype) * weight


class SiluMul:
    calls = 0

    @staticmethod
    def apply(gate, up):
        assert gate.is_contiguous() and up.is_contiguous()  # noqa: PT018
        SiluMul.calls += 1
        return nn.functional.silu(gate) * up


@pytest.fixture
def liger(monkeypatch):
    """A stand-in for the package, and a machine that says it had a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, contents in {
        "liger_kernel": {},
        "liger_kernel.ops": {},
        "liger_kernel.ops.rms_norm": {"LigerRMSNormFunction": Norm},
        "liger_kernel.ops.swiglu": {"LigerSiLUMulFunction": SiluMul},
    }.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    Norm.calls = SiluMul.calls = 0


def outcome(policy):
    g, vocabulary = torch.Generator().manual_seed(5), policy.config.vocab_size
    batch = make_batch([[random_document(g, 24, 4, 2, vocabulary, 5)], [random_document(g, 16, 4, 1, vocabulary, 3)]])
    scores = policy.score(batch)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    return [scores.logprob_N, *torch.autograd.grad(scores.logprob_N.sum() / 50, parameters)]


@pytest.mark.parametrize("family", ["llada2_moe", *CONFIGS])
def test_every_norm_and_every_gated_product(family, random_policy, liger):
    if family == "llada2_moe":
        policy = load_policy(GOLDEN_DIR / "llada2_tiny", dtype="float32")
    else:
        policy = random_policy(family)
    plain, names = outcome(policy), set(policy.state_dict())
    fuse(policy.model)
    torch.testing.assert_close(outcome(policy), plain, atol=1e-5, rtol=1e-4)
    norms = [name for name, _ in policy.named_modules() if name.endswith("norm")]
    products = [name for name, module in policy.named_modules() if hasattr(module, "act_fn")]
    assert (Norm.calls, SiluMul.calls) == (len(norms), len(products))
    assert set(policy.state_dict()) == names


def recipe(tmp_path, *overrides):
    (tmp_path / "data.jsonl").write_text("")
    keys = "model_name_or_path: tiny\ninit_weights: random\ndtype: float32\noutput_dir: out\n"
    (tmp_path / "recipe.yaml").write_text(keys + "datasets: [{path: data.jsonl}]\n")
    return load_recipe(tmp_path / "recipe.yaml", list(overrides))


def test_by_the_recipe(tmp_path, liger):
    outcome(make_policy(recipe(tmp_path)))
    assert (Norm.calls, SiluMul.calls) == (0, 0)
    outcome(make_policy(recipe(tmp_path, "use_liger_kernel=true")))
    assert min(Norm.calls, SiluMul.calls) > 0
    trained = Norm.calls, SiluMul.calls
    outcome(load_initial(recipe(tmp_path, "use_liger_kernel=true")))  # DPO's frozen reference
    assert (Norm.calls, SiluMul.calls) == tuple(2 * calls for calls in trained)


def test_without_a_gpu_or_the_package_it_is_refused(tmp_path, liger, monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", None)
    with pytest.raises(ConfigError, match=r"use_liger_kernel: .*pip install 'dfactory\[liger\]', or set it to false"):
        make_policy(recipe(tmp_path, "use_liger_kernel=true"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"use_liger_kernel: .*need a CUDA device.*set it to false"):
        make_policy(recipe(tmp_path, "use_liger_kernel=true"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="Liger's kernels need a CUDA device")
def test_liger_itself_on_a_gpu():
    """Log-probabilities and the gradients of all parameters."""
    pytest.importorskip("liger_kernel")
    policy = load_policy(GOLDEN_DIR / "llada2_tiny", dtype="float32", device="cuda")
    plain = outcome(policy)
    fuse(policy.model)
    torch.testing.assert_close(outcome(policy), plain, atol=1e-4, rtol=1e-3)
