"""The block decoder: ragged prompts in slots, every slot at its own block, an exact cache (docs/method.md#decoding).

One forward serves all slots (see cache.py for what it runs over). The tokens live on the host; a forward takes the ids
and returns four numbers for each open position, in one transfer. Open are the masked positions; with editing, all
positions of the response. A finished response frees its slot for the next prompt at once.

Responses join and leave between forwards, each with rules of its own apart from the block size (slots.py). `decode` feeds
a decoder a list of prompts, the server what comes in. Models with full attention have a decoder of their own (canvas.py).

What a response draws is a pure function of (rules.seed, its prompt's noise id, its own forward): it depends neither on
the other prompts of the batch nor on the slot.

With `cuda_graphs` the denoising forwards have few fixed shapes and a GPU replays them (static.py). With `compile` all
forwards are code that torch.compile makes once for a model (compiled.py).

Letters: R responses in slots, B block size, N tokens of a forward or open positions, T document length.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Sequence

import numpy as np
import torch

from dfactory.decoding.cache import BlockCache, Span, attend_spans
from dfactory.decoding.canvas import CanvasDecoder
from dfactory.decoding.compiled import compiled_forward
from dfactory.decoding.deciding import decide_leads
from dfactory.decoding.decisions import DecodeRules
from dfactory.decoding.renoising import RenoisingDecoder
from dfactory.decoding.response import Response, document_length
from dfactory.decoding.slots import Decodable, Progress, Slots
from dfactory.decoding.static import StaticForward
from dfactory.errors import ConfigError, DataError
from dfactory.types import NO_MASK, EmbeddingInputs, Rollout

CLEAN_TOKENS = 4096  # clean tokens that one forward takes beside the blocks being denoised; bounds a prefill's memory


def make_decoder(policy: Decodable, rules: DecodeRules, slots: int, capacity: int) -> Slots:
    """The decoder for the attention of a model; where the block size chooses, for that of the rules."""
    whole = rules.canvas if policy.sees_whole_document is None else policy.sees_whole_document
    decoder = RenoisingDecoder if rules.rule.renoises else CanvasDecoder if whole else BlockDecoder
    if decoder is BlockDecoder:
        return BlockDecoder(
            policy, rules.block_size, slots, capacity, cuda_graphs=rules.cuda_graphs, compiled=rules.compile
        )
    _refuse_fixed(rules)
    return decoder(policy, rules.block_size, slots, capacity)


def _refuse_fixed(rules: DecodeRules) -> None:
    """Raise ConfigError for keys that only the forwards of block-causal models know."""
    seen = "uniform noise" if rules.rule.renoises else "full attention"
    for name in ("cuda_graphs", "compile"):
        if getattr(rules, name):
            raise ConfigError(
                f"decode.{name} true with {seen}: only the forwards of block-causal models can be recorded or compiled; set "
                "it to false"
            )


def decode(
    policy: Decodable,
    prompt_ids: Sequence[Sequence[int]],
    rules: DecodeRules,
    *,
    drafts: Sequence[Sequence[int]] | None = None,
    noise_ids: Sequence[int] | None = None,
    on_step: Callable[[Progress], None] | None = None,
) -> list[Rollout]:
    """Decode a response to every prompt; rollouts come back in the order of the prompts.

    `drafts` gives the first tokens of each response: masks among them are filled in, the others are edited if the rules
    edit, else they stay. Behind a draft stand masks. `noise_ids` names the random numbers of each prompt (default: its
    index), so that a prompt draws the same in any batch.
    Raises DataError for a prompt that is empty or holds the mask, for ids outside the vocabulary and for a draft that is
    longer than the longest response; ConfigError for a mask or EOS outside the vocabulary.
    """
    check_prompts(prompt_ids, rules, policy.config.vocab_size)
    drafts = [()] * len(prompt_ids) if drafts is None else drafts
    _check_drafts(prompt_ids, drafts, rules, policy.config.vocab_size)
    noise_ids = range(len(prompt_ids)) if noise_ids is None else noise_ids
    longest = max((document_length(len(prompt), rules) for prompt in prompt_ids), default=0)
    slots = min(rules.batch_size, len(prompt_ids))
    decoder = make_decoder(policy, rules, slots, longest)
    waiting = deque(zip(range(len(prompt_ids)), prompt_ids, drafts, noise_ids, strict=True))
    rollouts: list[Rollout | None] = [None] * len(prompt_ids)
    while waiting or decoder.live:
        while waiting and decoder.free:
            index, prompt, draft, noise_id = waiting.popleft()
            rollouts[index] = decoder.add(index, prompt, rules, draft=draft, noise_id=noise_id)
        for progress in decoder.step():
            rollouts[progress.prompt] = progress.rollout
            if on_step is not None:
                on_step(progress)
    return rollouts


def check_prompts(prompt_ids: Sequence[Sequence[int]], rules: DecodeRules, vocabulary: int) -> None:
    """Raises DataError for a prompt that cannot be decoded, ConfigError for a mask or EOS outside the vocabulary."""
    stops = [("stop_token_ids", token) for token in rules.stop_token_ids]
    for name, token in (("mask_token_id", rules.mask_token_id), ("eos_token_id", rules.eos_token_id), *stops):
        if not 0 <= token < vocabulary and token != NO_MASK:
            raise ConfigError(f"{name} {token} is outside the model's vocabulary of {vocabulary}")
    for index, prompt in enumerate(prompt_ids):
        if len(prompt) == 0:
            raise DataError(
                f"prompt {index} is empty: masks alone look the same at every position, so that rounding would choose "
                "where a response begins; start it with at least one token"
            )
        if rules.mask_token_id in prompt:
            raise DataError(
                f"prompt {index} holds the mask token {rules.mask_token_id} at position "
                f"{list(prompt).index(rules.mask_token_id)}: a prompt is clean text; escape or drop it"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise DataError(
                f"prompt {index} holds ids outside the model's vocabulary of {vocabulary}: wrong tokenizer?"
            )


def _check_drafts(prompt_ids, drafts: Sequence[Sequence[int]], rules: DecodeRules, vocabulary: int) -> None:
    if len(drafts) != len(prompt_ids):
        raise DataError(f"{len(drafts)} drafts for {len(prompt_ids)} prompts: give one each, an empty one for none")
    for index, (prompt, draft) in enumerate(zip(prompt_ids, drafts, strict=True)):
        room = document_length(len(prompt), rules) - len(prompt)
        if len(draft) > room:
            raise DataError(
                f"draft {index} has {len(draft)} tokens, a response at most {room}: raise max_new_tokens to {len(draft)}"
            )
        if len(draft) and not 0 <= min(draft) <= max(draft) < vocabulary:
            raise DataError(f"draft {index} holds ids outside the model's vocabulary of {vocabulary}: wrong tokenizer?")


class BlockDecoder(Slots):
    """Responses of block-causal models, over a cache of the blocks that are finished."""

    canvas = False

    def __init__(
        self, policy: Decodable, block_size: int, slots: int, capacity: int, *, cuda_graphs=False, compiled=False
    ):
        super().__init__(policy, block_size, slots, capacity)
        self.has_leads = policy.logit_shift == 1
        self.cache = BlockCache(slots, capacity + block_size)  # the last block is for what stands in, see static.py
        self.static = StaticForward(policy, self.cache, block_size) if cuda_graphs else None
        self.hidden_at = compiled_forward(policy).hidden_at if compiled else policy.hidden_at
        self._someone_joined = False

    def add(
        self, index: int, prompt: Sequence[int], rules: DecodeRules, *, draft: Sequence[int] = (), noise_id: int = 0
    ) -> Rollout | None:
        finished = super().add(index, prompt, rules, draft=draft, noise_id=noise_id)
        self._someone_joined |= finished is None
        return finished

    def _prepare(self) -> list[Progress]:
        """Compute clean blocks, of new prompts mostly, as far as the next step's forward cannot take them along, and draw
        the leads."""
        if self._someone_joined:
            self._share_prompts()
            self._someone_joined = False
        finished = []
        while waiting := [response for response in self.live if response.awaits_lead]:
            finished += self._draw_leads(waiting)
        while not self._fits_a_step():
            self._forward_clean(self.live, self._most_clean)
        return finished

    def _draw_leads(self, responses: list[Response]) -> list[Progress]:
        """Run over the last clean block of each, which predicts the first token of the next. Returns what that finished."""
        while any(response.pending > 1 for response in responses):
            self._forward_clean(responses, self._most_clean, ahead=1)
        spans = [response.clean_span(response.block - 1, response.block) for response in responses]
        last_R = np.cumsum([self._length(span) for span in spans]) - 1
        hidden_RH = self._forward(responses, spans, last_R)
        finished = []
        for response, token, logprob in decide_leads(self.policy, responses, hidden_RH):
            if not response.lead(token, logprob):
                finished.append(self._progress(response, response.decoded.stop, None, goes_on=False))
                self._let_go(response)
        return finished

    def _length(self, span: Span) -> int:
        """Tokens that a forward over the span runs over."""
        here = span.positions(self.block_size)
        return here.stop - here.start

    @property
    def _most_clean(self) -> int:
        """Clean blocks that one forward may take; every response can always bring its finished block."""
        return max(CLEAN_TOKENS // self.block_size, len(self.live))

    def _fits_a_step(self) -> bool:
        if self.static is not None:  # its blocks are whole
            return all(response.pending <= (response.cached > 0 or response.origin == 0) for response in self.live)
        return sum(response.pending for response in self.live) <= self._most_clean

    def _share_prompts(self) -> None:
        """Let responses to one prompt compute its whole blocks once: a group of rollouts costs one prefill."""
        groups = defaultdict(list)
        for response in self.live:
            groups[response.prompt_key].append(response)
        for group in groups.values():
            blocks = group[0].prompt_blocks
            donor = max(group, key=lambda response: response.cached)
            others = [response for response in group if response.cached < blocks and response is not donor]
            while others and donor.cached < blocks:
                self._forward_clean([donor], self._most_clean)
            for response in others:
                self.cache.copy_prefix(donor.slot, response.slot, response.origin + blocks * self.block_size)
                response.cached = blocks

    def _forward_clean(self, responses: list[Response], most: int, ahead: int = 0) -> None:
        """One forward over the next clean blocks of `responses` that are not cached, `most` blocks at most; the last
        `ahead` ones are left out."""
        spans, taken = [], []
        for response in responses:
            stop = min(response.cached + most, response.block - ahead)
            if stop > response.cached:
                spans.append(response.clean_span(response.cached, stop))
                taken.append(response)
                most -= stop - response.cached
        self._forward(taken, spans, np.zeros(0, dtype=np.int64))
        for response, span in zip(taken, spans, strict=True):
            response.cached = span.stop

    def _denoise(self, open_RB: np.ndarray) -> torch.Tensor:
        """Hidden states [N, H] of the open positions, row by row, after a forward over the live responses' spans."""
        spans = [response.span for response in self.live]
        if self.static is not None:
            return self.static(self.live, spans, open_RB)
        start_R = np.cumsum([0, *(self._length(span) for span in spans[:-1])])
        first_R = np.array([span.positions(self.block_size).start for span in spans])
        here_R = np.array([response.here.start for response in self.live])
        index_RB = (start_R + here_R - first_R)[:, None] + np.arange(self.block_size)
        # With shifted logits a position is predicted from the left. The first one of a block is never open then.
        return self._forward(self.live, spans, index_RB[open_RB] - self.policy.logit_shift)

    def _forward(self, responses: list[Response], spans: list[Span], chosen: np.ndarray) -> torch.Tensor:
        """A forward over the concatenated spans, whose keys go to the cache. Hidden states [chosen, H]."""
        size, device = self.block_size, self.policy.device
        parts = [span.positions(size) for span in spans]
        inputs = [response.embedding_inputs(part) for response, part in zip(responses, parts, strict=True)]
        position_N = np.concatenate([np.arange(part.start, part.stop) for part in parts])
        slot_N = np.repeat([span.slot for span in spans], [part.stop - part.start for part in parts])
        inputs_1N = EmbeddingInputs(*(_row(field, device) for field in zip(*inputs, strict=True)))
        position_N, slot_N = torch.from_numpy(np.stack([position_N, slot_N])).to(device)
        self.cache.expect(slot_N, position_N)
        plan = attend_spans(spans, size, device)
        chosen = torch.from_numpy(chosen).to(device)
        return self.hidden_at(chosen, inputs_1N, position_N[None], plan, self.cache)


def _row(parts: tuple[np.ndarray | None, ...], device: torch.device) -> torch.Tensor | None:
    """An embedding input of neighbouring spans as one row [1, N]; None where none of them has it."""
    return None if parts[0] is None else torch.from_numpy(np.concatenate(parts))[None].to(device)
