"""Whether a decoder of transformers computes what it has to under the visibility rule: a check by numbers, in a second.

A small model of random weights with the switches of the checkpoint's config.json (small.py) runs twice: through Policy,
with the attention of this house, and as transformers' own class, with its own attention under a dense mask. Both must agree
in logits, scores and gradients. Nothing of the class is trusted: that each layer attends through the interface, that the
head is a plain matrix and that experts are routed alike shows in the numbers.

Letters: S tokens of a row, B block size, N targets, H hidden size, V vocabulary.
"""

import copy
import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dfactory.errors import CheckpointError
from dfactory.models import attention, experts
from dfactory.models.attention import AttentionPlan, SegmentPlan
from dfactory.models.families.base import Family
from dfactory.models.policy import Policy
from dfactory.models.saving import save_policy
from dfactory.models.selfcheck.parts import (
    BLOCK,
    PACKED,
    UNFIT,
    OfSlot,
    Row,
    Slots,
    Stream,
    Unfit,
    draw,
    moe_blocks,
    randomise,
    require_structure,
    scores_of_logits,
    watch_experts,
)
from dfactory.types import PADDING, EmbeddingInputs

RECORDED = "dfactory_recorded"  # the attention implementation of the small model: the house's, with a note of each call
OF_LOGITS = 1e-4  # how far logits and scores may differ, in float32
OF_GRADIENTS = 1e-3  # how far a parameter's gradient may, as a share of its norm
MOST_PARAMETERS = 20_000_000  # of a small model: else a width is not known to small.py

# What a layer may hand to its attention beyond the visibility rule.
_BEYOND_THE_RULE = {
    "sliding_window": "a sliding window hides clean tokens that block diffusion attends to",
    "s_aux": "attention sinks are weights beside the keys, which the attention here does not compute",
    "softcap": "capped attention scores are not computed here",
    "position_bias": "a bias of attention scores by position is not computed here",
}


@dataclasses.dataclass(frozen=True)
class Checked:
    """A decoder that passed, and what the check found."""

    last_layer_at_targets: bool
    moe_blocks: tuple[str, ...]
    logit_scale: float
    found: tuple[str, ...]  # what was compared, with the numbers


_calls: list[tuple[int, dict[str, Any]]] = []  # of the attention function: the layer, and what it was given


def _recorded_attention(module, query, key, value, attention_mask, **given):
    _calls.append((getattr(module, "layer_idx", -1), given))
    return ALL_ATTENTION_FUNCTIONS[attention.ATTENTION](module, query, key, value, attention_mask, **given)


AttentionInterface.register(RECORDED, _recorded_attention)


def self_check(
    config: PreTrainedConfig, model_class: type[PreTrainedModel], family: Family, window_allowed: bool = False
) -> Checked:
    """Check the class with a small configuration. `window_allowed` says that its windows are as long as any sequence, so
    that layers may state one. Raises Unfit with the reason."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
        torch.manual_seed(0)
        try:
            return _Check(config, model_class, family, window_allowed).run()
        except (*UNFIT, CheckpointError) as problem:
            raise Unfit(f"a small model of it does not run here: {type(problem).__name__}: {problem}") from problem


class _Check:
    def __init__(self, config: PreTrainedConfig, model_class, family: Family, window_allowed: bool):
        with torch.device("meta"):
            size = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
        if size > MOST_PARAMETERS:
            raise Unfit(
                f"it has {size:,} parameters even where all known widths are small: a width of it is not known here"
            )
        self.window_allowed = window_allowed
        self.own = draw(model_class, config, attn_implementation="eager", experts_implementation="eager")
        randomise(self.own)
        require_structure(self.own)
        ours = draw(model_class, config, attn_implementation=RECORDED, experts_implementation=experts.EXPERTS)
        ours.load_state_dict(self.own.state_dict())
        self.size, self.vocabulary = size, config.vocab_size
        watch_experts(ours)
        self.policy = Policy(ours.eval(), source_dir=None, family=family)
        self.own.eval()

    def run(self) -> Checked:
        layers = self.own.config.num_hidden_layers
        found = [
            f"{layers} layers and {self.size:,} random parameters, against transformers' own attention and dense masks"
        ]
        found.append(self.causal())
        found.append(self.under_the_rule("block-causal, packed, with a shared prefix", Row.of(PACKED, self.vocabulary)))
        whole = (Stream(0, 1, 0, 0, 1), Stream(1, 1, 1, 0, 1))
        found.append(self.under_the_rule("full attention, packed", Row.of(whole, self.vocabulary, block=3 * BLOCK)))
        found.append(self.last_layer())
        found.append(self.gradients())
        found.append(self.cached())
        found.append(self.saved())
        blocks = tuple(sorted({type(block).__name__ for block in moe_blocks(self.own)}))
        return Checked(self.policy.ends_at_targets, blocks, self.policy.logit_scale, tuple(found))

    @torch.no_grad()
    def causal(self) -> str:
        """Blocks of one token are a causal pass of the class, without a mask from here."""
        row = Row.of((Stream(0, 0, 0, 0, 3 * BLOCK),), self.vocabulary, block=1)
        _calls.clear()
        hidden = self._hidden(row)
        self._require_calls()
        own = self.own(input_ids=row.ids_RS, use_cache=False).logits
        self.policy.logit_scale, said = self._scale(self.policy.logits(hidden), own)
        return self._equal("causal, at block size 1: logits", self.policy.logits(hidden), own, OF_LOGITS) + said

    @torch.no_grad()
    def under_the_rule(self, what: str, row: Row) -> str:
        real_RS = row.place_RS.document != PADDING
        own = self._own_logits(row)[real_RS]
        return self._equal(f"{what}: logits", self.policy.logits(self._hidden(row))[real_RS], own, OF_LOGITS)

    @torch.no_grad()
    def last_layer(self) -> str:
        """Whether the last layer may run at targets only; where it may not, all of it runs."""
        row = Row.of(PACKED, self.vocabulary)
        if self.policy.ends_at_targets:
            whole_NH = self._hidden(row).flatten(0, 1)[row.target_N]
            try:
                difference = float((self._at_targets(row) - whole_NH).abs().max())
            except UNFIT:
                difference = math.inf
            if difference <= OF_LOGITS:
                return f"last layer at targets only: hidden states differ by {difference:.1e}"
            self.policy.ends_at_targets = False
        return "last layer at targets only: not for this class, all of it runs"

    def gradients(self) -> str:
        """Of a loss of scores and entropies, in training mode, by parameter."""
        row = Row.of(PACKED, self.vocabulary)
        for model in (self.policy, self.own):
            model.train()
        scores = self.policy.scores_of(self._at_targets(row), row.wanted_N)
        (scores.logprob_N.sum() + 0.1 * scores.entropy_N.sum()).backward()
        own = scores_of_logits(self._own_logits(row).flatten(0, 1)[row.target_N], row.wanted_N)
        (own.logprob_N.sum() + 0.1 * own.entropy_N.sum()).backward()
        for model in (self.policy, self.own):
            model.eval()
        said = self._equal("gradients, in training mode: scores", scores.logprob_N, own.logprob_N, OF_LOGITS)
        worst, where = max(self._differences())
        if worst > OF_GRADIENTS:
            raise Unfit(f"the gradient of {where} differs by {worst:.1e} of its norm from transformers' own")
        return f"{said}, norms of gradients by {worst:.1e} of themselves"

    def _differences(self):
        """The relative distance of every parameter's gradient, with its name."""
        ours = dict(self.policy.model.named_parameters())
        for name, parameter in self.own.named_parameters():
            mine, theirs = ours[name].grad, parameter.grad
            if (mine is None) != (theirs is None):
                raise Unfit(
                    f"{name} has {'no' if mine is None else 'a'} gradient here, unlike in transformers' own class"
                )
            if theirs is not None and theirs.norm() > 0:
                yield float((mine - theirs).norm() / theirs.norm()), name

    @torch.no_grad()
    def cached(self) -> str:
        """A block decoded over a cache of the clean ones, in the second of two slots."""
        row = Row.of((Stream(0, 0, 0, 0, 2), Stream(0, 1, 0, 2, 1)), self.vocabulary)
        whole = self._hidden(row)[:, 2 * BLOCK :]
        cache = Slots(capacity=3 * BLOCK)
        for block in range(3):
            tokens = slice(block * BLOCK, (block + 1) * BLOCK)
            cache.position_N = torch.arange(tokens.start, tokens.stop)
            inputs = EmbeddingInputs(row.ids_RS[:, tokens], noise=None)
            chosen = torch.arange(BLOCK)
            plan = OfSlot(tokens.stop)
            hidden_NH = self.policy.hidden_at(chosen, inputs, row.position_RS[:, tokens], plan, cache)
        return self._equal("a block over a cache of the clean ones: hidden states", hidden_NH[None], whole, OF_LOGITS)

    @torch.no_grad()
    def saved(self) -> str:
        """What is saved has the names of config.json's class, and reads as the same numbers."""
        with tempfile.TemporaryDirectory() as folder:
            source, saved = Path(folder, "source"), Path(folder, "saved")
            saved.mkdir()
            self.own.config.save_pretrained(source)
            self.policy.source_dir = source
            save_policy(self.policy, saved)
            again, loading = type(self.own).from_pretrained(
                saved, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
        left = {name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in loading[kind]}
        left -= set(self.own.all_tied_weights_keys or ())
        state, own = again.state_dict(), self.own.state_dict()
        left |= {name for name in own if name not in state or not torch.equal(state[name], own[name])}
        if left:
            raise Unfit(f"of what is saved, {', '.join(sorted(map(str, left)))[:200]} is not read again as it was")
        return f"saved and read again: all {len(own)} tensors are the same"

    # --- what the steps share ---------------------------------------------------------------------------------------

    def _hidden(self, row: Row) -> torch.Tensor:
        return self.policy.hidden(row.ids_RS, row.position_RS, self._plan(row))

    def _at_targets(self, row: Row) -> torch.Tensor:
        """Through embeddings given, as noise on them gives them."""
        table, nowhere = torch.zeros(1, self.policy.config.hidden_size), torch.full_like(row.ids_RS, -1)
        inputs = EmbeddingInputs(row.ids_RS, noise=nowhere)
        return self.policy.hidden_at(row.target_N, inputs, row.position_RS, self._plan(row), noise_table_TH=table)

    def _plan(self, row: Row) -> AttentionPlan:
        return SegmentPlan.of(row.place_RS, chunk=2 * BLOCK)

    def _own_logits(self, row: Row) -> torch.Tensor:
        mask_RSS = row.mask_RSS
        bias = torch.zeros(mask_RSS.shape).masked_fill(~mask_RSS, torch.finfo(torch.float32).min)[:, None]
        outputs = self.own(input_ids=row.ids_RS, position_ids=row.position_RS, attention_mask=bias, use_cache=False)
        return outputs.logits

    def _require_calls(self) -> None:
        """Raise Unfit unless each layer attended once through the interface, by nothing but the rule."""
        calls, layers = _calls.copy(), self.own.config.num_hidden_layers
        _calls.clear()
        if sorted(layer for layer, _ in calls) != list(range(layers)):
            raise Unfit(
                f"its {layers} layers call transformers' attention interface {len(calls)} times, not once each; layers of "
                "another kind pass information from view to view"
            )
        for _, given in calls:
            for name, why in _BEYOND_THE_RULE.items():
                if given.get(name) is not None and not (name == "sliding_window" and self.window_allowed):
                    raise Unfit(why)

    def _scale(self, mine: torch.Tensor, own: torch.Tensor) -> tuple[float, str]:
        """By what the class multiplies the head's logits, and the key of config.json that says so."""
        factor = float((own * mine).sum() / (mine * mine).sum())
        if abs(factor - 1) < 1e-5 or not float((own - factor * mine).abs().max()) < OF_LOGITS:
            return 1.0, ""  # where it is no factor, the comparison says by how much they differ
        for name, value in _scales(self.own.config):
            for exact, how in ((value, "multiplied by"), (1 / value, "divided by")):
                if math.isclose(exact, factor, rel_tol=1e-4):
                    return exact, f"; logits are {how} {name} {value}"
        raise Unfit(
            f"its logits are {factor:.6g} times the head's, which no key of config.json with logit in its name says"
        )

    def _equal(self, what: str, mine: torch.Tensor, own: torch.Tensor, limit: float) -> str:
        """What differs by how much. The limit falls with numbers that hardly differ among themselves."""
        difference = float((mine - own).detach().abs().max())
        limit *= min(1.0, float(own.detach().std()))
        if not difference <= limit:
            raise Unfit(f"{what} differ by {difference:.1e} from transformers' own, more than {limit:.0e}")
        return f"{what} differ by {difference:.1e}"


def _scales(config: PreTrainedConfig) -> list[tuple[str, float]]:
    """The numbers of a configuration that may scale logits. Others could equal the factor by chance."""
    named = ((name, value) for name, value in config.to_dict().items() if "logit" in name or "lm_head" in name)
    return [(name, float(value)) for name, value in named if isinstance(value, int | float) and value > 0]
