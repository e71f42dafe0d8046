"""What decides about tokens besides the rule: acceptance, editing, and all of them together as DecodeRules.

    logits --Distribution--> Proposal --Acceptance--> confidence --DecodingRule--> which masks become tokens
                                                                 --Editing-------> which tokens become other tokens

With acceptance `top`, the confidence of a mask is a function of the distributions alone, whatever penalty or schedule there
is. Where the rule chooses positions by the distributions, the tokens at them are drawn independently, so the probability of
a trace without edits is exactly the product of the recorded ones. Edits look at what was drawn: where a draw does not
exceed the editing threshold the token stays, and that event is not recorded.

Letters: R responses that are decoded together, B block size.
"""

import dataclasses
import functools
from collections.abc import Collection

import torch

from dfactory.decoding.distribution import Distribution
from dfactory.decoding.keys import DecodeKeys, decode_problem, refuse_foreign_keys, rule_of
from dfactory.decoding.rules.base import CHANCE, CONFIDENCE, RULES, Column, Decision, DecodingRule, Forward, Proposal
from dfactory.errors import ConfigError
from dfactory.ranges import NO_RANGES, TokenRanges
from dfactory.types import NO_MASK


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """From a proposal to the confidence of a mask: the probability of `token` (`sampled`) or of `top_token` (`top`); and to
    that of an edit, which is always the probability of the token that it writes.

    EOS early rejection (CJ-GRPO; docs/method.md#acceptance): where that token is EOS, confidence is multiplied by a
    factor that rises linearly over the `num_steps` forwards that a block with masks may take. As it looks at the token
    whose probability is compared, with `top` it does not depend on what was drawn; the authors' code looks at the token
    drawn.

    eos_penalty 0.6, num_steps 4    step    0    1    2    3    no mask left
                                    factor  0.4  0.6  0.8  1    1

    `deferred_ids` (LLaDA's confidence_eos_eot_inf): where that token is one of them, confidence is 0, so that the position
    comes last; elsewhere it is the probability among the other tokens.
    """

    by: str = "sampled"
    eos_penalty: float = 0.0
    eos_token_id: int = -1
    num_steps: int = 1
    deferred_ids: tuple[int, ...] = ()

    def confidence(
        self,
        proposal_RB: Proposal,
        masked_RB: torch.Tensor,
        step_R: torch.Tensor,
        deferred_RB: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Of committing, float32 [R, B]. `step_R`: forwards that the block of each row has taken with masks, before this
        one. `deferred_RB`: the probability of `deferred_ids` together, where there are any."""
        logprob_RB = proposal_RB.logprob if self.by == "sampled" else proposal_RB.top_logprob
        compared_RB = self.compared(proposal_RB)
        confidence_RB = self._early(compared_RB, logprob_RB, masked_RB, step_R)
        if deferred_RB is None:
            return confidence_RB
        is_deferred_RB = torch.isin(compared_RB, torch.tensor(self.deferred_ids))
        return torch.where(is_deferred_RB, 0.0, confidence_RB / (1 - deferred_RB))

    @property
    def columns(self) -> tuple[Column, ...]:
        """What it reads of the distribution beside the proposal."""
        return (_deferred(self.deferred_ids),) if self.deferred_ids else ()

    def edit_confidence(self, proposal_RB: Proposal, masked_RB: torch.Tensor, step_R: torch.Tensor) -> torch.Tensor:
        """Of editing, float32 [R, B]."""
        return self._early(proposal_RB.token, proposal_RB.logprob, masked_RB, step_R)

    def compared(self, proposal_RB: Proposal) -> torch.Tensor:
        """The tokens whose probability a commit is judged by."""
        return proposal_RB.token if self.by == "sampled" else proposal_RB.top_token

    def _early(self, token_RB, logprob_RB, masked_RB: torch.Tensor, step_R: torch.Tensor) -> torch.Tensor:
        """Probabilities, those of EOS lowered early in a block."""
        if self.eos_penalty == 0:
            return logprob_RB.exp()
        progress_R = torch.where(masked_RB.any(dim=-1), step_R / max(self.num_steps - 1, 1), 1.0)
        factor_R1 = (1 - self.eos_penalty * (1 - progress_R))[:, None]
        return logprob_RB.exp() * torch.where(token_RB == self.eos_token_id, factor_R1, 1.0)


DEFERRED = "deferred"


@functools.cache
def _deferred(token_ids: tuple[int, ...]) -> Column:
    return Column(
        DEFERRED,
        "probability of the tokens that come last",
        lambda logprob_NV: logprob_NV[:, token_ids].exp().sum(dim=-1),
    )


@dataclasses.dataclass(frozen=True)
class Editing:
    """Token to token (LLaDA2.1; docs/method.md#editing): a visible response token gives way to the token drawn if that
    one's own probability exceeds the threshold. With acceptance `top` the most probable token never gives way, whatever
    was drawn.

    A block without masks continues for up to `max_post_steps` forwards and ends at the first that edits nothing.
    Threshold 0.0 edits wherever the model would have another token.
    """

    threshold: float
    max_post_steps: int = 16

    def edit(self, confidence_RB: torch.Tensor, differs_RB: torch.Tensor, editable_RB: torch.Tensor) -> torch.Tensor:
        """bool [R, B], True only where `editable_RB` is: response tokens that are not masked. `confidence_RB` is that of the
        tokens that would be written, `differs_RB` where the model would have another token than the one there."""
        return editable_RB & differs_RB & (confidence_RB > self.threshold)


@dataclasses.dataclass(frozen=True)
class DecodeRules:
    """Everything that decides what comes out of `decode`, apart from the model and the prompts."""

    block_size: int
    max_new_tokens: int
    mask_token_id: int
    eos_token_id: int
    distribution: Distribution
    acceptance: Acceptance
    rule: DecodingRule
    editing: Editing | None = None
    batch_size: int = 32
    seed: int = 0
    cuda_graphs: bool = False
    compile: bool = False
    ranges: TokenRanges = NO_RANGES  # of the model; no token of one comes out where a position holds another, or text
    answer_groups: tuple[int, ...] = ()  # the range of each position of an answer, as `ranges` numbers them; then text
    canvas: bool = False  # full attention: blocks are counted from the end of the prompt, and later ones are in sight
    stop_token_ids: tuple[int, ...] = ()  # end a response as EOS does
    min_new_tokens: int = 0  # no token that ends a response comes out before so many
    sub_block_size: int | None = None  # parts of a block whose masks are committed one part after another
    sub_block_cache: bool = False  # the other parts' keys stay as of a part's first forward
    blocks_from_prompt: bool = False  # one block begins where the prompt ends
    early_stop: bool = False  # a response ends as soon as its answer has no mask

    def decide(self, forward: Forward) -> Decision:
        """What becomes of the blocks, nothing in the decision left out; `forward` comes without the confidence."""
        confidence_RB = self.acceptance.confidence(
            forward.proposal_RB, forward.masked_RB, forward.step_R, forward.columns.get(DEFERRED)
        )
        forward = dataclasses.replace(forward, columns={**forward.columns, CONFIDENCE.name: confidence_RB})
        made = self.rule.decide(forward)
        nowhere_RB = torch.zeros_like(forward.masked_RB)
        edit_RB, remask_RB = (nowhere_RB if chosen is None else chosen for chosen in (made.edit_RB, made.remask_RB))
        commit_RB = made.commit_RB
        if self.rule.revises or self.rule.may_wait:
            last_R1 = (forward.step_R >= self.most_steps - 1)[:, None]
            commit_RB, remask_RB = commit_RB | (forward.masked_RB & last_R1), remask_RB & ~last_R1
        self._check(made, forward.masked_RB)
        if self.editing is not None:
            edit_RB = edit_RB | self._edits(forward)
        return Decision(commit_RB, edit_RB & ~remask_RB, remask_RB, made.memory or {})

    def _check(self, made: Decision, masked_RB: torch.Tensor) -> None:
        """That the rule does no more than it says, and enough."""
        if not self.rule.revises and (made.edit_RB is not None or made.remask_RB is not None):
            raise ValueError(f"decode.rule {self.rule.name} edits or remasks, but does not say that it revises")
        may_stand = self.rule.revises or self.rule.may_wait
        if not may_stand and (masked_RB.any(dim=-1) & ~made.commit_RB.any(dim=-1)).any():
            raise ValueError(
                f"decode.rule {self.rule.name} commits nothing in a block with masks: decoding would never end"
            )

    def _edits(self, forward: Forward) -> torch.Tensor:
        """bool [R, B]: the tokens that token-to-token editing replaces."""
        proposal_RB, tokens_RB = forward.proposal_RB, forward.tokens_RB
        differs_RB = (proposal_RB.token != tokens_RB) & (self.acceptance.compared(proposal_RB) != tokens_RB)
        confidence_RB = self.acceptance.edit_confidence(proposal_RB, forward.masked_RB, forward.step_R)
        return self.editing.edit(confidence_RB, differs_RB, forward.editable_RB)

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns that the decoder computes for each open position besides the proposal, on the device."""
        return *(column for column in self.rule.reads if column.of is not None), *self.acceptance.columns

    @property
    def reads_chance(self) -> bool:
        return CHANCE in self.rule.reads

    @property
    def most_steps(self) -> int:
        """Forwards within which a block, or a part of one, has lost its masks."""
        return self.rule.most_steps(self.sub_block_size or self.block_size)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end a response."""
        return self.eos_token_id, *self.stop_token_ids

    @property
    def compares(self) -> bool:
        """Whether the distributions of a block's last forward are needed at the next one."""
        return any(column.compares for column in self.rule.reads)

    @property
    def all_is_open(self) -> bool:
        """Whether a forward decides about the tokens of the response too, not about masks alone."""
        return self.editing is not None or self.rule.revises

    @property
    def deciding(self) -> tuple:
        """What makes a decision of a forward's logits: responses in which it is equal can be decided together."""
        return self.distribution, self.acceptance, self.rule, self.editing, self.ranges, self.most_steps

    @classmethod
    def of(
        cls,
        keys: DecodeKeys,
        *,
        mask_token_id: int | None = None,
        eos_token_id: int | None = None,
        special_ids: Collection[int] = (),
        stop_token_ids: Collection[int] = (),
        ranges: TokenRanges = NO_RANGES,
        canvas: bool = False,
    ) -> "DecodeRules":
        """The rules that the `decode` keys state; the tokenizer's and the checkpoint's ids fill in where the keys hold null.

        `special_ids` are never emitted unless they end a response or `suppress_special` is false; the mask is one of them
        without being named. Leave out the special tokens that responses are trained to hold, as the one that ends a
        turn. Raises ConfigError without a block size, where neither keys nor caller know the mask or EOS, and for keys
        that make no sense together.
        """
        if keys.block_size is None:
            raise ConfigError("decode.block_size is null and the model does not tell it: set decode.block_size")
        refuse_foreign_keys(keys, dict.fromkeys(vars(keys), "DecodeKeys"))
        problem = decode_problem(keys, keys.block_size)
        if problem is not None:
            raise ConfigError(problem)
        mask, eos = _mask_and_eos(keys, mask_token_id, eos_token_id)
        stops = stop_token_ids if keys.stop_token_ids is None else keys.stop_token_ids
        if mask in stops:
            raise ConfigError(f"decode.stop_token_ids holds the mask {mask}: a response ends at a token; leave it out")
        rule = rule_of(keys)
        _check_attention(keys, canvas)
        _check_noise(keys, rule, mask)
        ends = (eos, *stops)
        suppressed = sorted({*special_ids, mask} - {*ends, NO_MASK} - ranges.ids) if keys.suppress_special else []
        editing = None
        if keys.editing_threshold is not None:
            editing = Editing(keys.editing_threshold, keys.max_post_steps)
        num_steps = rule.most_steps(keys.sub_block_size or keys.block_size)
        return cls(
            block_size=keys.block_size,
            max_new_tokens=keys.max_new_tokens,
            mask_token_id=mask,
            eos_token_id=eos,
            distribution=Distribution(
                keys.temperature, keys.top_k, keys.top_p, tuple(suppressed), ends, keys.cfg_scale
            ),
            acceptance=Acceptance(keys.acceptance, keys.eos_penalty, eos, num_steps, ends if keys.defer_eos else ()),
            rule=rule,
            editing=editing,
            batch_size=keys.batch_size,
            seed=keys.seed,
            cuda_graphs=keys.cuda_graphs,
            compile=keys.compile,
            ranges=ranges,
            answer_groups=ranges.layout(keys.answer_ranges, keys.max_new_tokens),
            canvas=canvas or rule.renoises,
            stop_token_ids=tuple(stops),
            min_new_tokens=keys.min_new_tokens,
            sub_block_size=keys.sub_block_size,
            sub_block_cache=keys.sub_block_cache,
            blocks_from_prompt=keys.blocks_from == "prompt",
            early_stop=keys.early_stop,
        )


def _mask_and_eos(keys: DecodeKeys, mask_token_id: int | None, eos_token_id: int | None) -> tuple[int, int]:
    """What the keys state, else what the caller knows."""
    mask = mask_token_id if keys.mask_token_id is None else keys.mask_token_id
    eos = eos_token_id if keys.eos_token_id is None else keys.eos_token_id
    for name, value in (("mask_token_id", mask), ("eos_token_id", eos)):
        if value is None:
            raise ConfigError(f"decode.{name} is null and no tokenizer tells it: set decode.{name}")
    if mask == eos:
        raise ConfigError(f"decode.mask_token_id and decode.eos_token_id are both {mask}: they must differ")
    return mask, eos


def _check_attention(keys: DecodeKeys, canvas: bool) -> None:
    """Refuse keys that the model's decoder has no use for."""
    if keys.cfg_scale and not canvas:
        raise ConfigError(
            f"decode.cfg_scale {keys.cfg_scale:g} and a model that decodes over a cache: guidance needs full attention; "
            "set it to 0"
        )
    if keys.sub_block_cache and canvas:
        raise ConfigError("decode.sub_block_cache true with full attention, which keeps no keys: set it to false")


def _check_noise(keys: DecodeKeys, rule: DecodingRule, mask: int) -> None:
    """Refuse a rule for the other kind of noise, and keys that a rule without masks does not read."""
    if rule.renoises != (mask == NO_MASK):
        fitting = next(known.name for known in RULES if known.renoises == (mask == NO_MASK))
        noise = "uniform noise and no mask" if mask == NO_MASK else "a mask"
        raise ConfigError(
            f"decode.rule {rule.name}: it is not for a model with {noise}; set decode.rule, such as to {fitting}"
        )
    unread = ("editing_threshold", "defer_eos", "min_new_tokens", "answer_ranges", "sub_block_size", "early_stop")
    for name in unread if rule.renoises else ():
        if getattr(keys, name) not in (None, False, 0):
            raise ConfigError(
                f"decode.{name} {getattr(keys, name)} with {rule.selector}, which writes a whole canvas at once and "
                "does not read it; leave it out"
            )
