"""Slow, obvious versions of what dFactory computes quickly. The fast code must equal them; nothing here is shared with it
but the table that says which class reads a directory.

    reference_model(dir)     LLaDA2-MoE in plain torch from the ORIGINAL tensor names, expert by expert. That it reads an
                             exported directory is the proof that the original layout was kept.
    plain_model(dir)         any other family: the transformers class that reads the directory, whole logits; with causal
                             context one call a canvas
    step_mask, one_view_nll  one noisy ++ clean training step: 2L tokens, float mask by docs/method.md#visibility,
                             all logits, fp32 cross-entropy. K views are K such passes.
    dense_table              the same table for the rows of a ViewBatch
    plain_scores             log-probability, entropy and hit of full logits
    reference_losses         AdamW on whole windows of ViewBatches, the division done once

Everything is fp32 on the CPU. Letters as in dfactory.types.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import DynamicCache

from dfactory.models.families.base import FAMILIES, Attention
from dfactory.models.registry import known_shift, read_config

HIDDEN_FROM = torch.finfo(torch.float32).min  # what a float mask adds where nothing may be seen


# --- the model -------------------------------------------------------------------------------------------------------


def read_tensors(model_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of model.safetensors or its shards, by its name in the file."""
    tensors = {}
    for file in sorted(Path(model_dir).glob("model*.safetensors")):
        with safe_open(file, framework="pt") as part:
            tensors |= {name: part.get_tensor(name) for name in part.keys()}  # noqa: SIM118
    return tensors


class WholeRows:
    """Callable: ids, positions [R, S] and a float mask [R, 1, S, S] that is added to the scores -> logits [R, S, V]."""

    logit_shift = 0
    within_views = False

    def target_logits(self, batch) -> torch.Tensor:
        """[N, V] of a ViewBatch, through the dense mask and all logits. Padding sees itself, for a finite sum."""
        seen = dense_table(*batch.place_RS)
        padding = batch.document_RS < 0
        seen = seen | (torch.eye(seen.shape[1], dtype=torch.bool) & padding[:, :, None])
        logits = self(batch.input_ids_RS, batch.position_ids_RS, as_float_mask(seen))
        return logits.flatten(0, 1)[left_of(batch, self.within_views) if self.logit_shift else batch.target_index_N]


class ReferenceModel(WholeRows):
    """LLaDA2-MoE by its original tensors."""

    def __init__(self, config: dict, tensors: dict[str, torch.Tensor]):
        self.config = config
        self.tensors = {name: tensor.float() for name, tensor in tensors.items()}

    def parameters(self) -> dict[str, torch.Tensor]:
        """What is trained: every tensor but the expert biases, which are set by hand in the original."""
        return {name: tensor for name, tensor in self.tensors.items() if not name.endswith("expert_bias")}

    def __call__(self, ids_RS, position_RS, mask_R1SS):
        h = self.tensors["model.word_embeddings.weight"][ids_RS]
        for layer in range(self.config["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            h = h + self.attention(at + "attention.", self.norm(h, at + "input_layernorm"), position_RS, mask_R1SS)
            x = self.norm(h, at + "post_attention_layernorm")
            if layer < self.config["first_k_dense_replace"]:
                h = h + self.feed_forward(at + "mlp.", x)
            else:
                h = h + self.experts(at + "mlp.", x)
        return self.norm(h, "model.norm") @ self.tensors["lm_head.weight"].T

    def norm(self, x, name):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return x * scale * self.tensors[f"{name}.weight"]

    def feed_forward(self, at, x):
        gate, up, down = (self.tensors[f"{at}{part}_proj.weight"] for part in ("gate", "up", "down"))
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def attention(self, at, x, position_RS, mask_R1SS):
        c = self.config
        R, S, _ = x.shape
        heads, kv_heads, d = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        stacked = x @ self.tensors[f"{at}query_key_value.weight"].T
        q, k, v = stacked.split([heads * d, kv_heads * d, kv_heads * d], dim=-1)
        q = self.norm(q.view(R, S, heads, d), f"{at}query_layernorm")
        k = self.norm(k.view(R, S, kv_heads, d), f"{at}key_layernorm")
        q, k = self.rotate(q, position_RS), self.rotate(k, position_RS)
        k = k.repeat_interleave(heads // kv_heads, dim=2)
        v = v.view(R, S, kv_heads, d).repeat_interleave(heads // kv_heads, dim=2)
        scores = torch.einsum("rqhd,rkhd->rhqk", q, k) / math.sqrt(d) + mask_R1SS
        mixed = torch.einsum("rhqk,rkhd->rqhd", scores.softmax(-1), v)
        return mixed.reshape(R, S, heads * d) @ self.tensors[f"{at}dense.weight"].T

    def rotate(self, x_RShd, position_RS):
        """Turn the pairs (i, i + half) of the first `partial_rotary_factor` of a head; the rest passes."""
        turned = int(x_RShd.shape[-1] * self.config["partial_rotary_factor"])
        half = turned // 2
        frequency = self.config["rope_theta"] ** (-torch.arange(half) / half)
        angle = (position_RS[..., None] * frequency)[:, :, None]
        a, b, rest = x_RShd[..., :half], x_RShd[..., half:turned], x_RShd[..., turned:]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

    def experts(self, at, x):
        """Token by token in groups of one expert: route, weigh, add the shared expert unscaled."""
        flat = x.flatten(0, 1)
        chosen, weight = self.route(at, flat)
        mixed = torch.zeros_like(flat)
        for expert in range(self.config["num_experts"]):
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            out = self.expert(at, expert, flat[token]) * weight[token, slot, None]
            mixed = mixed.index_add(0, token, out)
        return mixed.view_as(x) + self.feed_forward(f"{at}shared_experts.", x)

    def expert(self, at, number, x):
        if f"{at}experts.gate_proj" in self.tensors:  # the stacked layout
            gate, up, down = (self.tensors[f"{at}experts.{part}_proj"][number] for part in ("gate", "up", "down"))
            return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
        return self.feed_forward(f"{at}experts.{number}.", x)

    def route(self, at, x):
        c = self.config
        score = torch.sigmoid(x @ self.tensors[f"{at}gate.weight"].T)
        biased = score + self.tensors[f"{at}gate.expert_bias"]
        groups = biased.view(len(x), c["n_group"], -1)
        best = groups.topk(2, dim=-1).values.sum(-1).topk(c["topk_group"], dim=-1).indices
        kept = torch.full_like(groups, -math.inf)
        kept.scatter_(1, best[..., None].expand(-1, -1, groups.shape[-1]), 0.0)
        chosen = (groups + kept).view_as(biased).topk(c["num_experts_per_tok"], dim=-1).indices
        weight = score.gather(1, chosen)
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
        return chosen, weight * c["routed_scaling_factor"]


def reference_model(model_dir: Path) -> ReferenceModel:
    """Read config.json and the original tensors of a directory."""
    return ReferenceModel(json.loads((Path(model_dir) / "config.json").read_text()), read_tensors(model_dir))


class PlainModel(WholeRows):
    """A transformers causal LM with its own attention."""

    def __init__(self, model, logit_shift: int, within_views: bool):
        self.model, self.logit_shift, self.within_views = model, logit_shift, within_views

    def parameters(self) -> dict[str, torch.Tensor]:
        return dict(self.model.named_parameters())

    def __call__(self, ids_RS, position_RS, mask_R1SS):
        return self.model(ids_RS, position_ids=position_RS, attention_mask=mask_R1SS, use_cache=False).logits


class PlainCanvasModel:
    """transformers' own encoder and decoder of a model with causal context: an encoder pass over each document, and a
    decoder pass over each of its canvases, with the encoder's cache cut where the canvas begins."""

    def __init__(self, model):
        self.model = model

    def parameters(self) -> dict[str, torch.Tensor]:
        """Under the decoder's names. The encoder's parameters are the same tensors; the vision tower is not trained."""
        named = self.model.named_parameters(remove_duplicate=False)
        return {name: parameter for name, parameter in named if name.startswith("model.decoder.")}

    def target_logits(self, batch) -> torch.Tensor:
        """[N, V] of a ViewBatch: a canvas token is predicted at its place, a clean token at the one before it."""
        ids, position, document, view, start, trunk = (
            field.flatten() for field in (batch.input_ids_RS, batch.position_ids_RS, *batch.place_RS)
        )
        conditioned = dict(zip(batch.target_index_N.tolist(), batch.columns["conditioned_N"].tolist(), strict=True))
        logits = {}  # by index into the flattened rows
        for number in range(len(batch.document_id_D)):
            own = document == number
            clean = ((own | (document == trunk[own][0])) & (view == 0)).nonzero()[:, 0]
            cache = DynamicCache()  # without a config it keeps all tokens in all layers
            logits |= zip(clean.tolist(), self.clean_logits(ids[clean], cache), strict=True)
            for v, before in torch.stack([view, start])[:, own & (view > 0)].unique(dim=1).T.tolist():
                canvas = (own & (view == v) & (start == before)).nonzero()[:, 0]
                inputs = {
                    "decoder_input_ids": ids[canvas][None],
                    "decoder_position_ids": position[canvas][None],
                    "past_key_values": self.cut(cache, before),
                }
                found = self.canvas_logits(inputs, conditioned[canvas[0].item()])
                logits |= zip(canvas.tolist(), found, strict=True)
        predicting_N = torch.where(batch.view_N > 0, batch.target_index_N, left_of(batch))
        return torch.stack([logits[index] for index in predicting_N.tolist()])

    def clean_logits(self, ids_T, cache: DynamicCache) -> torch.Tensor:
        hidden = self.model.model.encoder(input_ids=ids_T[None], past_key_values=cache).last_hidden_state[0]
        most = self.model.final_logit_softcapping
        return most * torch.tanh(self.model.lm_head(hidden) / most)

    def cut(self, cache: DynamicCache, before: int) -> DynamicCache:
        """What an encoder pass over the first `before` tokens leaves: sliding layers keep their window of these."""
        found = DynamicCache(config=self.model.config.text_config)
        for number, layer in enumerate(cache.layers):
            found.update(layer.keys[:, :, :before], layer.values[:, :, :before], number)
        return found

    def canvas_logits(self, inputs: dict, conditioned: bool) -> torch.Tensor:
        """`conditioned`: given the logits of a first pass, which has no gradient."""
        if conditioned:
            with torch.no_grad():
                inputs["self_conditioning_logits"] = self.model(**inputs).logits
        return self.model(**inputs).logits[0]


def plain_model(model_dir: Path) -> PlainModel | PlainCanvasModel:
    """In float32. Which class reads the directory is the family's to say, whether its logits are shifted the directory's."""
    config = read_config(model_dir)
    family, variant = FAMILIES.of(config), FAMILIES.variant_of(config)
    options = {"dtype": torch.float32, "experts_implementation": "eager", "use_safetensors": True}
    if family.attention is Attention.CAUSAL_CONTEXT:
        model = variant.base_class.from_pretrained(model_dir, attn_implementation="eager", **options)
        return PlainCanvasModel(model.eval())
    model = variant.model_class.from_pretrained(model_dir, config=config, attn_implementation="sdpa", **options)
    return PlainModel(model.eval(), known_shift(model_dir), family.shifts_within_views)


# --- one view, as 2L tokens ------------------------------------------------------------------------------------------


def as_float_mask(seen_RSS: torch.Tensor) -> torch.Tensor:
    return torch.where(seen_RSS, 0.0, HIDDEN_FROM)[:, None]


def block_causal_mask(length: int, block_size: int) -> torch.Tensor:
    """A clean document alone: block b sees blocks <= b. [1, 1, L, L]"""
    block = torch.arange(length) // block_size
    return as_float_mask((block[:, None] >= block[None, :])[None])


def step_mask(length: int, block_size: int) -> torch.Tensor:
    """noisy ++ clean of one document, quadrant by quadrant from the table. [1, 1, 2L, 2L]"""
    block = torch.arange(length) // block_size
    q, k = block[:, None], block[None, :]
    seen = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    seen[:length, :length] = q == k  # a view token sees its own block of its view
    seen[:length, length:] = k < q  # and the clean blocks before it
    seen[length:, length:] = k <= q  # a clean token sees clean blocks up to its own; never a view
    return as_float_mask(seen[None])


def one_view_nll(model, clean_RL, noisy_RL, target_RL, block_size: int) -> torch.Tensor:
    """-log p(clean | view) at the targets, in row order, of one noisy ++ clean pass. `model` as ReferenceModel."""
    rows, length = clean_RL.shape
    position = torch.arange(length).repeat(2).expand(rows, -1)
    logits = model(torch.cat([noisy_RL, clean_RL], dim=1), position, step_mask(length, block_size))
    return F.cross_entropy(logits[:, :length][target_RL].float(), clean_RL[target_RL], reduction="none")


# --- rows of a ViewBatch ---------------------------------------------------------------------------------------------


def dense_table(document_RS, view_RS, block_RS, trunk_RS) -> torch.Tensor:
    """The table of docs/method.md#visibility, case by case, for whole rows. [R, S, S], True where query may see key. Of
    the trunk that a document names, everything before the query's block counts as clean past."""
    seen = []
    for d, v, b, trunk in zip(*(field.tolist() for field in (document_RS, view_RS, block_RS, trunk_RS)), strict=True):

        def sees(i: int, j: int, d=d, v=v, b=b, trunk=trunk) -> bool:
            if d[i] < 0 or d[j] < 0:
                return False
            if d[i] != d[j]:
                return d[j] == trunk[i] and v[j] == 0 and b[j] < b[i]
            if v[i] == 0:
                return v[j] == 0 and b[j] <= b[i]
            if v[j] == 0:
                return b[j] < b[i]
            return v[j] == v[i] and b[j] == b[i]

        seen.append([[sees(i, j) for j in range(len(d))] for i in range(len(d))])  # item by item a tensor takes seconds
    return torch.tensor(seen)


class Scores(NamedTuple):
    logprob: torch.Tensor
    entropy: torch.Tensor
    hit: torch.Tensor


def plain_scores(logits_NV, target_N, entropy_temperature: float = 1.0) -> Scores:
    """From whole logits: log-probability of the target, entropy of softmax(logits / temperature), argmax == target."""
    log_p = F.log_softmax(logits_NV.float(), dim=-1)
    log_q = F.log_softmax(logits_NV.float() / entropy_temperature, dim=-1)
    chosen = log_p.gather(1, target_N[:, None])[:, 0]
    return Scores(chosen, -(log_q.exp() * log_q).sum(-1), log_p.argmax(-1) == target_N)


def batch_scores(model, batch, entropy_temperature: float = 1.0) -> Scores:
    """The scores of a ViewBatch's targets by a WholeRows or a PlainCanvasModel."""
    return plain_scores(model.target_logits(batch), batch.target_ids_N, entropy_temperature)


def left_of(batch, within_views: bool = True) -> torch.Tensor:
    """Which position predicts each target with shifted logits: that of the token before it in its view, else in the clean
    stream or the trunk; of a document's first position its own. Not `within_views`: a view's other blocks do not count."""
    d, v, position, trunk, block = (
        field.flatten().tolist()
        for field in (batch.document_RS, batch.view_RS, batch.position_ids_RS, batch.trunk_RS, batch.block_RS)
    )
    found = {(d[i], v[i], position[i]): i for i in range(len(d))}

    def left(i: int) -> int:
        before = position[i] - 1
        places = [(d[i], v[i], before), (d[i], 0, before), (trunk[i], 0, before)]
        beside = found.get(places[0])
        if beside is not None and block[beside] != block[i] and not within_views:
            del places[0]
        return i if before < 0 else next(found[place] for place in places if place in found)

    return torch.tensor([left(i) for i in batch.target_index_N.tolist()], dtype=torch.int64)


# --- training --------------------------------------------------------------------------------------------------------


def reference_losses(
    model_dir: Path,
    windows: list,
    lr: float | list[float],
    *,
    betas: tuple[float, float] | list = (0.9, 0.999),
    eps: float | list[float] = 1e-8,
    weight_decay: float | list[float] = 0.0,
    max_grad_norm: float | list[float] = 1.0,
    embedding_max_grad_norm: float | None = None,
    loss_weight: str = "uniform",
    confidence_beta: float = 0.0,
    entropy_temperature: float = 1.0,
    preference_beta: float | None = None,
    sft_loss_coef: float = 0.0,
    context_loss_weight: float = 0.0,
    model: WholeRows | PlainCanvasModel | None = None,
) -> list[float]:
    """The loss before each step of SFT, CAP or DPO, one step a window (a list of ViewBatches), by AdamW in plain torch.

    uniform: sum of -log p over the window / its number of targets. elbo: sum of -log p / t over the window / the response
    tokens of its documents, once a view. A record's weight multiplies its targets in sum and number. Clean targets have a
    mean of their own, times context_loss_weight. CAP: plus confidence_beta times the mean entropy of the views' targets that
    the argmax predicts. With preference_beta DPO of `dpo_loss`, against the model as it was. A list has an entry a step.
    Gradients of embedding and head are clipped by their norm, then all by their global norm; 0 is off. Norms and other
    vectors do not decay. Give `model` to keep its trained tensors.
    """
    start = reference_model(model_dir) if preference_beta is not None else None
    model = model or reference_model(model_dir)
    parameters = list(model.parameters().values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    groups = [{"params": [p for p in parameters if p.ndim > 1]}, {"params": [p for p in parameters if p.ndim == 1]}]
    optimiser = torch.optim.AdamW(groups, lr=1.0)
    losses = []
    for step, window in enumerate(windows):
        for group, decays in zip(optimiser.param_groups, (1, 0), strict=True):
            group |= {"lr": _at(step, lr), "betas": _at(step, betas), "eps": _at(step, eps)}
            group["weight_decay"] = decays * _at(step, weight_decay)
        scored = [(batch, batch_scores(model, batch, entropy_temperature)) for batch in window]
        if preference_beta is None:
            loss = sft_loss(scored, loss_weight, confidence_beta, context_loss_weight)
        else:
            loss = dpo_loss(scored, start, preference_beta, sft_loss_coef)
        optimiser.zero_grad()
        loss.backward()
        if embedding_max_grad_norm:
            ends = ("model.word_embeddings.weight", "lm_head.weight")
            torch.nn.utils.clip_grad_norm_([model.parameters()[name] for name in ends], embedding_max_grad_norm)
        if largest := _at(step, max_grad_norm):
            torch.nn.utils.clip_grad_norm_(parameters, largest)
        optimiser.step()
        losses.append(loss.item())
    return losses


def _at(step: int, value):
    return value[step] if isinstance(value, list) else value


def sft_loss(scored: list, loss_weight: str, confidence_beta: float, context_loss_weight: float = 0.0) -> torch.Tensor:
    """SFT and CAP of a window: (batch, scores) of each micro-batch."""
    total, count = torch.zeros(()), 0
    entropy, hits = torch.zeros(()), 0
    context, clean = torch.zeros(()), 0
    for batch, scores in scored:
        noised, nll = batch.view_N > 0, -scores.logprob
        hit = scores.hit & noised
        entropy, hits = entropy + scores.entropy[hit].sum(), hits + int(hit.sum())
        context, clean = context + nll[~noised].sum(), clean + int((~noised).sum())
        weight_D = batch.columns.get("weight_D", torch.ones(len(batch.document_id_D)))
        total = total + ((nll / batch.t_N if loss_weight == "elbo" else nll) * weight_D[batch.document_N])[noised].sum()
        responses = float((weight_D * batch.response_length_D * batch.num_views_D).sum())
        count += responses if loss_weight == "elbo" else float(weight_D[batch.document_N][noised].sum())
    return total / count + confidence_beta * entropy / max(hits, 1) + context_loss_weight * context / max(clean, 1)


def dpo_loss(scored: list, start: WholeRows, beta: float, sft_loss_coef: float) -> torch.Tensor:
    """Sigmoid DPO of a window, pair by pair, with sums of -log p / t over views in place of -log p; plus the chosen answers'
    mean of it for each response token."""
    losses, nll, tokens = [], torch.zeros(()), 0
    for batch, scores in scored:
        with torch.no_grad():
            before = batch_scores(start, batch).logprob
        for pair in range(len(batch.document_id_D) // 2):
            elbo, score = [], []
            for document in (2 * pair, 2 * pair + 1):
                own = batch.document_N == document
                weight = 1 / batch.t_N[own] / int(batch.num_views_D[document])
                elbo.append((weight * scores.logprob[own]).sum())
                score.append(elbo[-1] - (weight * before[own]).sum())
            losses.append(-F.logsigmoid(beta * (score[0] - score[1])))
            nll, tokens = nll - elbo[0], tokens + int(batch.response_length_D[2 * pair])
    return torch.stack(losses).mean() + sft_loss_coef * nll / tokens
