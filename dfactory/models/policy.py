"""The model as everybody here uses it: a ViewBatch in, TokenScores out."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from dfactory.models import last_layer, norms
from dfactory.models.attention import AttentionPlan, PlanByLayer, plan_attention
from dfactory.models.families.base import FAMILIES, Attention, Family
from dfactory.models.head import VocabularyHead
from dfactory.models.mask_token import MaskToken
from dfactory.ranges import NO_RANGES
from dfactory.types import NOISE_TABLE_ROWS, EmbeddingInputs, Place, TokenScores, ViewBatch


class Policy(nn.Module):
    """A transformers decoder run as a block-diffusion model.

    `policy(batch)` scores the targets of a ViewBatch; its one forward holds backbone and head, so that DeepSpeed can wrap
    it whole. `hidden_at` and `logits` are the two halves, for the decoder.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        attn_implementation: str = "auto",
        source_dir: Path | None = None,
        family: Family | None = None,
    ):
        super().__init__()
        self.model = model
        self.family: Family = FAMILIES.of(model.config) if family is None else family
        self.source_dir = source_dir  # where `saving` finds the files to carry along
        self.attn_implementation = attn_implementation
        self.entropy_temperature = 1.0  # TokenScores.entropy_N is that of softmax(logits / this)
        self.logit_shift = self.family.logit_shift  # the family's, or where that is open, the run's
        self.mask: MaskToken | None = None  # that a model without one was given; saved with it
        self.ranges = NO_RANGES  # each target is scored among the ids of its own range; saved with the model
        VocabularyHead.adopt(self._causal_lm.lm_head, getattr(self.config, "final_logit_softcapping", None))
        norms.adopt(model)
        self.logit_scale = self.family.logit_scale
        # whether `hidden_at` can leave the rest of the last layer out
        self.ends_at_targets = self.family.last_layer_at_targets and last_layer.adopt(self._causal_lm.model.layers[-1])

    @property
    def sees_whole_document(self) -> bool | None:
        """Whether attention is full: the decoder needs a canvas then, and no cache. None: as the block size says."""
        return self.family.sees_whole_document

    @property
    def has_adapters(self) -> bool:
        """Whether peft has wrapped the model."""
        return hasattr(self.model, "get_base_model")

    @property
    def _causal_lm(self) -> PreTrainedModel:
        """The model without the wrapper that peft puts around it."""
        return self.model.get_base_model() if self.has_adapters else self.model

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, first to last."""
        return self._causal_lm.model.layers

    @property
    def config(self):
        return self._causal_lm.config

    @property
    def device(self) -> torch.device:
        return self._causal_lm.device

    @property
    def has_dropout(self) -> bool:
        """Whether a forward in training mode drops anything, so that two of them differ."""
        module_rates = (module.p for module in self.modules() if isinstance(module, nn.Dropout))
        return any(module_rates) or bool(getattr(self.config, "attention_dropout", 0.0))

    @property
    def can_be_recorded(self) -> bool:
        """Whether forwards of equal shape can become a CUDA graph: in 16 bits (in float32 the grouped matmul asks a GPU how
        many tokens each expert got), with weights that stay where they are (ZeRO-3 gathers them)."""
        still = not any(hasattr(parameter, "ds_id") for parameter in self.parameters())
        return still and self._causal_lm.dtype in (torch.bfloat16, torch.float16)

    @property
    def compile_problem(self) -> str | None:
        """What keeps the decoder's forwards from being compiled, and the remedy; None: nothing known."""
        if self.has_adapters:
            return "LoRA adapters that are not merged: merge them (`dfactory merge`)"
        if any(hasattr(parameter, "ds_id") for parameter in self.parameters()):
            return "weights that ZeRO 3 spreads over ranks: decode under another stage"
        if any(type(module).__module__.startswith("deepspeed.") for module in self.modules()):
            return "experts that ranks share: decode with expert_parallel_size 1"
        return None

    def forward(self, batch: ViewBatch) -> TokenScores:
        """log p, entropy and hit of every target of the batch, in the batch's target order."""
        plan = self.plan(batch.place_RS)
        read_M, row_N = batch.target_index_N, None
        if self.logit_shift:
            left_N = batch.left_index_N if self.family.shifts_within_views else batch.clean_left_index_N
            read_M, row_N = left_N.unique(return_inverse=True)  # what predicts two targets is computed once
        if self.family.attention is Attention.CAUSAL_CONTEXT:  # a clean token is in sight of itself
            read_M = torch.where(batch.view_N > 0, read_M, batch.left_index_N)
        conditioned = (
            {"conditioning_RSH": self._first_prediction(batch, plan)} if "conditioned_N" in batch.columns else {}
        )
        hidden_MH = self.hidden_at(
            read_M,
            batch.embedding_inputs,
            batch.position_ids_RS,
            plan,
            noise_table_TH=self._noise_table(batch),
            **conditioned,
        )
        hidden_NH = hidden_MH if row_N is None else hidden_MH.index_select(0, row_N)
        return self.scores_of(hidden_NH, batch.target_ids_N, batch.columns.get("gradient_N"))

    def scores_of(
        self, hidden_NH: torch.Tensor, target_ids_N: torch.Tensor, gradient_N: torch.Tensor | None = None
    ) -> TokenScores:
        """The scores of targets, from the hidden states that predict them. `gradient_N`: the loss's by the
        log-probabilities, where it is known."""
        options = {"gradient_N": gradient_N, "ranges": self.ranges}
        return self._causal_lm.lm_head(self._scaled(hidden_NH), target_ids_N, self.entropy_temperature, **options)

    def _first_prediction(self, batch: ViewBatch, plan: AttentionPlan | PlanByLayer) -> torch.Tensor:
        """The expected embedding of each target of `conditioned_N` by a pass without gradient, [R, S, H]; 0 elsewhere. The
        embeddings that are averaged have a gradient. Where no target is conditioned the pass runs all the same: under
        ZeRO-3 other ranks wait for its modules."""
        index_M = batch.target_index_N[batch.columns["conditioned_N"]]
        with torch.no_grad():
            hidden_MH = self.hidden_at(index_M, batch.embedding_inputs, batch.position_ids_RS, plan)
        mean_MH = self._causal_lm.lm_head(self._scaled(hidden_MH), expected=True)
        rows, length = batch.input_ids_RS.shape
        everywhere = mean_MH.new_zeros(rows * length, mean_MH.shape[-1])
        return everywhere.index_copy(0, index_M, mean_MH).unflatten(0, (rows, length))

    def plan(self, place_RS: Place) -> AttentionPlan | PlanByLayer:
        """The attention among tokens of these places."""
        if self.family.attention is Attention.CAUSAL_CONTEXT:
            return PlanByLayer.of(place_RS, self.attn_implementation)
        return plan_attention(place_RS, self.attn_implementation)

    def plan_by_layer(self, noised_RS: torch.Tensor, make: Callable[[int | None], AttentionPlan]) -> PlanByLayer:
        """Attention that differs between layers: `make` takes a layer's sliding window, None where it has none."""
        return PlanByLayer(noised_RS, make)

    def predicting(self, index_N: torch.Tensor, position_ids_RS: torch.Tensor) -> torch.Tensor:
        """Which of the flattened [R, S] positions predict the tokens at `index_N`: these themselves, or with shifted logits
        their neighbours on the left. A document's first position has none and predicts itself.

        shift 1    position  0 1 2 3 | 0 1 2     of two documents in a row
                   from      0 0 1 2 | 4 4 5     flattened index

        For whole documents, such as canvases. In a ViewBatch the neighbour may lie in another stream: `left_index_N`.
        """
        if not self.logit_shift:
            return index_N
        return index_N - (position_ids_RS.flatten()[index_N] > 0).long()

    def score(self, batch: ViewBatch) -> TokenScores:
        """`forward`, after moving the batch to the model's device."""
        return self(batch.to(self.device))

    def hidden(self, input_ids_RS, position_ids_RS, visibility: AttentionPlan, cache=None) -> torch.Tensor:
        """Final hidden states [R, S, H] of plain tokens. `cache` is a transformers Cache whose keys the plan counts too."""
        return self._backbone(EmbeddingInputs(input_ids_RS, noise=None), position_ids_RS, visibility, cache)

    def hidden_at(
        self,
        chosen_N: torch.Tensor,
        inputs_RS: EmbeddingInputs,
        position_ids_RS,
        visibility: AttentionPlan | PlanByLayer,
        cache=None,
        noise_table_TH: torch.Tensor | None = None,
        **conditioned: torch.Tensor,
    ) -> torch.Tensor:
        """Final hidden states [N, H] of some positions, which ascend through the flattened rows: those of `hidden`, at less
        cost. Keys of all positions go to the cache; the noise of `inputs_RS` are rows of `noise_table_TH`. A model with
        self-conditioning takes `conditioning_RSH`, the expected embeddings by an earlier prediction."""
        inputs = (inputs_RS, position_ids_RS, visibility, cache, noise_table_TH)
        # Without any position all modules run all the same, on one: under ZeRO-3 other ranks wait for them.
        somewhere = chosen_N if len(chosen_N) else chosen_N.new_zeros(1)
        if self.ends_at_targets:
            hidden_NH = self._backbone(*inputs, chosen_N=somewhere, **conditioned)[0]
        else:
            hidden_NH = self._backbone(*inputs, **conditioned).flatten(0, 1).index_select(0, somewhere)
        return hidden_NH[: len(chosen_N)]

    def _backbone(
        self, inputs_RS, position_ids_RS, visibility, cache, noise_table_TH=None, **further: torch.Tensor
    ) -> torch.Tensor:
        outputs = self._causal_lm.model(
            **self._embedded(inputs_RS, noise_table_TH),
            position_ids=position_ids_RS,
            visibility=visibility,
            past_key_values=cache,
            use_cache=cache is not None,
            **further,
        )
        return outputs.last_hidden_state

    def _embedded(self, inputs_RS: EmbeddingInputs, noise_table_TH: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """What the backbone is given for its input embeddings: a function of `inputs_RS`, and of nothing else that differs
        from token to token, or what is shared between documents and prompts would be wrong."""
        if inputs_RS.noise is None:
            return {"input_ids": inputs_RS.token}
        assert noise_table_TH is not None  # a batch with noise comes with its table
        noise_RSH = noise_table_TH[inputs_RS.noise.clamp(min=0)] * (inputs_RS.noise >= 0)[..., None]
        embedded_RSH = self._causal_lm.get_input_embeddings()(inputs_RS.token)
        return {"inputs_embeds": embedded_RSH + noise_RSH.to(self._causal_lm.dtype)}

    def _noise_table(self, batch: ViewBatch) -> torch.Tensor | None:
        """The vectors of noise that the batch's masks take theirs from (see noise/embedding.py)."""
        if "embedding_noise_row_RS" not in batch.columns:
            return None
        generator = torch.Generator().manual_seed(batch.columns["embedding_noise_seed_1"].item())
        # drawn on the CPU: other devices have other random numbers
        table_TH = torch.randn(NOISE_TABLE_ROWS, self.config.hidden_size, generator=generator).to(
            batch.input_ids_RS.device
        )
        return batch.columns["embedding_noise_std_1"] * table_TH

    def expected_embedding(self, logits_NV: torch.Tensor) -> torch.Tensor:
        """The mean embedding under each softmax, [N, H], without the scale that some models multiply embeddings by."""
        return self._causal_lm.lm_head(logits_NV, averages=True)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., V], in the model's precision."""
        return self._causal_lm.lm_head(self._scaled(hidden))

    def _scaled(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scaled hidden states are scaled logits."""
        return hidden if self.logit_scale == 1 else hidden * self.logit_scale
