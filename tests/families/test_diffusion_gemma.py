"""DiffusionGemma against what the original code computed: logits, losses, gradients, generations, saved tensors."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import DiffusionGemmaForBlockDiffusion

from dfactory.algorithms.sft import SFT
from dfactory.decoding import DecodeKeys, DecodeRules
from dfactory.decoding.renoising import RenoisingDecoder
from dfactory.errors import CheckpointError
from dfactory.models import attention as attention_module
from dfactory.models.head import expected_rows
from dfactory.models.registry import load_policy, read_config, trained_block_size
from dfactory.models.saving import save_policy
from dfactory.packing import PackedDocument, align_canvases, collate
from dfactory.types import NO_MASK, PADDING, EmbeddingInputs, Example, Place, View
from tests.families.cases import golden, policy_of

FORMS = ["segments", "dense", "flex"]


@pytest.fixture(scope="module")
def case():
    return golden("diffusion_gemma")


@pytest.fixture(scope="module")
def policy():
    return policy_of("diffusion_gemma")


def laid_out(ids, positions, canvas_ids, canvas_positions, attended=None):
    """[clean | canvas] of each row: ids, positions and places."""
    (rows, length), size = ids.shape, canvas_ids.shape[1]
    document = torch.arange(rows)[:, None].expand(rows, length + size).clone()
    if attended is not None:
        document[:, :length][attended == 0] = PADDING
    view = (torch.arange(length + size) >= length).long().expand(rows, -1)
    block = torch.cat([positions, canvas_positions[:, :1].expand(-1, size)], dim=1)
    return (
        torch.cat([ids, canvas_ids], dim=1),
        torch.cat([positions, canvas_positions], dim=1),
        Place(document, view, block, document),
    )


def canvas_logits(policy, ids, positions, place, size, mean=None):
    """Logits of the canvas, `size` tokens at the end of each row."""
    chosen = torch.arange(ids.numel()).view_as(ids)[:, -size:].flatten()
    conditioned = {}
    if mean is not None:
        conditioned["conditioning_RSH"] = torch.cat(
            [mean.new_zeros(*ids[:, :-size].shape, mean.shape[-1]), mean], dim=1
        )
    inputs = EmbeddingInputs(ids, noise=None)
    hidden = policy.hidden_at(chosen, inputs, positions, policy.plan(place), **conditioned)
    return policy.logits(hidden).unflatten(0, (len(ids), size))


@torch.no_grad()
def test_the_clean_stream_is_the_encoder(case, policy):
    ids, positions = case.encoder_input_ids, case.encoder_position_ids
    _, _, place = laid_out(ids, positions, ids[:, :0], positions[:, :0])
    hidden = policy.hidden(ids, positions, policy.plan(place))
    torch.testing.assert_close(hidden, case.encoder_last_hidden_state, atol=1e-4, rtol=0)
    torch.testing.assert_close(policy.logits(hidden), case.encoder_logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_the_canvas_is_the_decoder(case, policy, form, monkeypatch):
    """In each form of attention, without and with the first pass's prediction."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(attention_module, "_compiled", flex_attention)
    monkeypatch.setattr(attention_module, "DENSE_BELOW", 0)
    monkeypatch.setattr(policy, "attn_implementation", form)
    row = laid_out(case.encoder_input_ids, case.encoder_position_ids, case.canvas_ids, case.canvas_position_ids)
    first = canvas_logits(policy, *row, 8)
    torch.testing.assert_close(first, case.canvas_logits, atol=1e-4, rtol=0)
    mean = expected_rows(first, policy.model.get_input_embeddings().weight)
    second = canvas_logits(policy, *row, 8, mean)
    torch.testing.assert_close(second, case.canvas_self_conditioned_logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["train", "short"])
@torch.no_grad()
def test_training_sees_what_sampling_sees(case, policy, name):
    """A canvas in the middle of a row, with the cache of the sliding layers cut where it begins: no token after the canvas
    begins takes room in their windows."""
    ids, attended, canvas, positions, mask, last = (
        getattr(case, f"{name}_{key}")
        for key in (
            "input_ids",
            "attention_mask_2d",
            "canvas_ids",
            "decoder_position_ids",
            "self_conditioning_mask",
            "self_conditioning_logits",
        )
    )
    row = laid_out(ids, torch.arange(ids.shape[1]).expand_as(ids), canvas, positions, attended)
    mean = expected_rows(last, policy.model.get_input_embeddings().weight) * mask[:, None, None]
    logits = canvas_logits(policy, *row, canvas.shape[1], mean)
    torch.testing.assert_close(logits, getattr(case, f"{name}_logits_cache_cut"), atol=1e-4, rtol=0)
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), getattr(case, f"{name}_canvas_targets").flatten())
    cut = case.expected["diffusion_loss_with_the_cache_cut_where_the_block_begins"]
    assert nll.item() == pytest.approx(cut if name == "train" else case.expected["short"]["diffusion_loss"], abs=1e-5)


def test_saved_tensors_are_the_original_ones(case, tmp_path):
    """Those of the vision tower too, which are not loaded; and the original class reads them."""
    save_policy(load_policy(case.directory, dtype="float32"), tmp_path)
    saved, source = load_file(tmp_path / "model.safetensors"), load_file(case.directory / "model.safetensors")
    assert saved.keys() == source.keys()
    assert all(torch.equal(saved[name], source[name]) for name in source)
    original = DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path)
    with torch.no_grad():
        logits = original(input_ids=case.encoder_input_ids, decoder_input_ids=case.canvas_ids).logits
    torch.testing.assert_close(logits, case.canvas_logits, atol=1e-4, rtol=0)


def test_a_trained_canvas_is_stated_where_the_original_reads_it(case, tmp_path):
    """In config.json: the original refuses keys of generation_config.json that it does not know."""
    save_policy(load_policy(case.directory, dtype="float32"), tmp_path, block_size=4)
    assert DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path).config.canvas_length == 4
    assert trained_block_size(tmp_path) == 4
    assert trained_block_size(case.directory) == 8


def test_both_spellings_of_the_config_are_one_model(case, tmp_path, write_config):
    """Head size and key heads of the full layers, as the hub states them and as transformers 5.23 writes them."""

    def as_on_the_hub(text):
        del text["per_layer_config"]
        text |= {"global_head_dim": 32, "num_global_key_value_heads": 1}

    config = read_config(write_config(as_on_the_hub))
    stated = read_config(case.directory)
    assert [vars(layer) for layer in config.text_config.per_layer_config] == [
        vars(layer) for layer in stated.text_config.per_layer_config
    ]


@pytest.fixture
def write_config(case, tmp_path):
    import json

    def write(change):
        keys = json.loads((case.directory / "config.json").read_text())
        change(keys["text_config"])
        (tmp_path / "config.json").write_text(json.dumps(keys))
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("use_bidirectional_attention", "all", "only 'vision' is supported"),
        ("final_logit_softcapping", 0, "a number above 0"),
        ("layer_types", ["full_attention", "sliding_attention"], "ends in full_attention"),
        ("attn_logit_softcapping", 50.0, "text_config of model_type diffusion_gemma has no such key"),
    ],
)
def test_keys_that_are_not_computed_are_refused(write_config, key, value, words):
    with pytest.raises(CheckpointError, match=f"{key}.*{words}"):
        read_config(write_config(lambda text: text.update({key: value})))


# --- losses and gradients, by way of views, packing and the objective -------------------------------------------------


def batch_of(case, name, rows, size=8):
    """The golden step: one canvas of each row, as the original drew it."""
    get = lambda key: getattr(case, f"{name}_{key}")  # noqa: E731
    eos = case.expected["eos_fill_id"]
    packed = []
    for d in range(2):
        length = int(get("attention_mask_2d")[d].sum())
        ids, labels = get("input_ids")[d, :length].numpy(), get("labels")[d, :length].numpy()
        document = align_canvases(Example(d, ids.astype(np.int32), labels != -100), size, eos)
        position = get("decoder_position_ids")[d].numpy().astype(np.int32)
        assert (document.canvas_T[position] == position[0]).all()
        assert (document.view_ids_T[position] == get("canvas_targets")[d].numpy()).all()
        view = View(
            position,
            get("canvas_ids")[d].numpy().astype(np.int32),
            np.ones(size, bool),
            np.full(size, get("t")[d], np.float32),
            np.ones(size, np.float32),
            {"conditioned": np.full(size, get("self_conditioning_mask")[d].item())},
        )
        packed.append(PackedDocument(document, [view], scores_context=True))
    return collate([[packed[d] for d in row] for row in rows], 1)


@pytest.mark.parametrize("rows", [((0,), (1,)), ((0, 1),)], ids=["two rows", "one packed row"])
@pytest.mark.parametrize("name", ["train", "short"])
def test_losses_and_gradients(case, policy, name, rows):
    """Of the canvases and of the clean tokens, the first pass included. In rows longer than the window both passes of the
    original see another context: there only the clean tokens have the same loss."""
    batch, objective = batch_of(case, name, rows), SFT(context_loss_weight=1.0)
    policy.zero_grad()
    terms = objective(batch, policy(batch))
    losses = {key: mean.total / mean.count for key, mean in terms.loss.items()}
    expected = case.expected if name == "train" else case.expected["short"]
    assert losses["context_nll"].item() == pytest.approx(expected["encoder_loss"], abs=1e-5)
    if name == "train":
        return
    assert losses["nll"].item() == pytest.approx(expected["diffusion_loss"], abs=1e-5)
    sum(losses.values()).backward()
    norms = {key: parameter.grad.norm().item() for key, parameter in policy.model.named_parameters()}
    assert norms == pytest.approx(expected["grad_norms"], rel=1e-5)
    assert sum(norm**2 for norm in norms.values()) ** 0.5 == pytest.approx(expected["grad_norm_total"], rel=1e-5)


# --- generations ------------------------------------------------------------------------------------------------------

KEYS = {  # the original's names, and those here
    "max_denoising_steps": "denoising_steps",
    "entropy_bound": "entropy_bound",
    "t_min": "temperature_low",
    "t_max": "temperature_high",
    "stability_threshold": "stable_forwards",
    "confidence_threshold": "confident_entropy",
    "max_new_tokens": "max_new_tokens",
}
GENERATIONS = golden("diffusion_gemma").expected["generations"]


def rules_of(case):
    stated = {ours: case[theirs] for theirs, ours in KEYS.items()}
    eos, *others = case["eos_token_id"]
    keys = DecodeKeys(block_size=8, rule="renoise", suppress_special=False, stop_token_ids=others, **stated)
    return DecodeRules.of(keys, mask_token_id=NO_MASK, eos_token_id=eos)


class Drawn(RenoisingDecoder):
    """With the random canvases of the golden files."""

    def random_canvas(self, response, number):
        return np.array(GENERATIONS[response.index]["random_canvases"][number - 1])


def assert_is(rollout, case):
    length = 1 + case["output"].index(53) if 53 in case["output"] else len(case["output"])  # the rest is padding
    assert rollout.token_ids[:length] == case["output"][:length]
    assert len(rollout.token_ids) == len(case["output"])
    assert rollout.output_ids == case["output"][: min(length, case["max_new_tokens"])]
    assert rollout.forwards == sum(rollout.block_forwards) == case["forwards"]
    assert rollout.finish_reason == ("eos" if 53 in case["output"] else "length")


@pytest.mark.parametrize("index", range(len(GENERATIONS)), ids=[case["name"] for case in GENERATIONS])
def test_generations(policy, index):
    """Token for token, with as many forwards."""
    case = GENERATIONS[index]
    decoder = Drawn(policy, 8, 1, 64)
    decoder.add(index, case["prompt"], rules_of(case))
    while decoder.live:
        (progress,) = decoder.step()
    assert_is(progress.rollout, case)
    steps = np.cumsum(progress.rollout.block_forwards) - 1
    assert progress.rollout.commit_step == np.repeat(steps, 8).tolist()  # a canvas is written at its last forward


def test_generations_together(policy):
    """Prompts of all lengths in three slots, each with rules of its own: what each gives alone."""
    decoder, waiting, rollouts = Drawn(policy, 8, 3, 64), list(range(len(GENERATIONS))), {}
    while waiting or decoder.live:
        while waiting and decoder.free:
            index = waiting.pop(0)
            decoder.add(index, GENERATIONS[index]["prompt"], rules_of(GENERATIONS[index]))
        rollouts |= {p.prompt: p.rollout for p in decoder.step() if p.rollout is not None}
    for index, case in enumerate(GENERATIONS):
        assert_is(rollouts[index], case)
