"""Block decoding the obvious way: one prompt, no cache, every forward over the whole prefix (docs/method.md#decoding).

What the decoder must equal, token for token. It shares nothing with `dfactory.decoding`.
"""

import dataclasses
import math
from collections.abc import Callable

import torch

from dfactory.models.attention import MaskPlan
from dfactory.types import Place
from dfactory.visibility import dense_mask
from tests.reference import ReferenceModel, block_causal_mask


@dataclasses.dataclass
class Settings:
    """The knobs, under the names of the decode keys."""

    block_size: int
    max_new_tokens: int
    mask_token_id: int
    eos_token_id: int
    threshold: float = 0.95
    min_commit: int = 1
    editing_threshold: float | None = None
    max_post_steps: int = 16
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    acceptance: str = "sampled"
    steps: int | None = None
    step_schedule: str = "even"
    eos_penalty: float = 0.0
    suppressed_ids: tuple[int, ...] = ()


@dataclasses.dataclass
class Outcome:
    """As in a Rollout, where `mask` is never emitted."""

    token_ids: list[int]
    output_ids: list[int]
    commit_step: list[int]
    commit_logprob: list[float]
    first_commit_step: list[int]
    edits: list[tuple[int, int, int, int]]
    block_forwards: list[int]
    forwards: int


def block_causal_logits(policy, ids_S: torch.Tensor, block_size: int) -> torch.Tensor:
    """[S] -> [S, V], the whole sequence as one clean stream. `policy` is a Policy or a ReferenceModel."""
    position_S = torch.arange(len(ids_S))
    if isinstance(policy, ReferenceModel):
        return policy(ids_S[None], position_S[None], block_causal_mask(len(ids_S), block_size))[0]
    zero_S = torch.zeros_like(position_S)
    mask_SS = dense_mask(Place(zero_S, zero_S, position_S // block_size, zero_S))
    return policy.logits(policy.hidden(ids_S[None], position_S[None], MaskPlan(mask_SS[None])))[0]


def processed(logits_V: torch.Tensor, s: Settings) -> torch.Tensor:
    """Logits of one position -> the distribution that confidence, sample and log-probability come from."""
    logits_V = logits_V.float().clone()
    logits_V[list(s.suppressed_ids)] = -math.inf
    if s.temperature == 0:
        return torch.softmax(logits_V, dim=0)
    logits_V = logits_V / s.temperature
    if s.top_k is not None and s.top_k < len(logits_V):
        logits_V[logits_V < torch.topk(logits_V, s.top_k).values[-1]] = -math.inf
    if s.top_p is not None:
        p_V, order_V = torch.softmax(logits_V, dim=0).sort(descending=True, stable=True)
        mass = 0.0
        for p, token in zip(p_V.tolist(), order_V.tolist(), strict=True):
            if mass >= s.top_p and mass > 0:
                logits_V[token] = -math.inf
            mass += p
    return torch.softmax(logits_V, dim=0)


def draw(p_V: torch.Tensor, uniform: float, s: Settings) -> int:
    if s.temperature == 0:
        return int(p_V.argmax())
    cumulative_V = p_V.double().cumsum(0)
    return int((cumulative_V <= uniform * cumulative_V[-1]).sum())


def budget(s: Settings) -> int:
    """Forwards with masks that a block takes at most."""
    return s.steps if s.steps is not None else math.ceil(s.block_size / s.min_commit)


def least(s: Settings, masks: int, step: int) -> int:
    """What the forward numbered `step` of a block that has `masks` masks left commits at least."""
    if s.steps is None:
        return s.min_commit
    if s.step_schedule == "even":
        return math.ceil(masks / (s.steps - step))
    shares = sum(2**later for later in range(s.steps - step))
    return max(1, math.floor(masks / shares))


def judged(p_V: torch.Tensor, token: int, s: Settings, factor: float) -> float:
    """The confidence of a token."""
    return float(p_V[token]) * (factor if token == s.eos_token_id else 1.0)


@torch.inference_mode()
def uncached(
    policy,
    prompt: list[int],
    s: Settings,
    uniform: Callable[[int], list[float]] | None = None,
    draft: list[int] = (),
    choose: Callable[[dict[int, torch.Tensor]], list[int]] | None = None,
) -> Outcome:
    """`uniform(step)` gives the block_size numbers in [0, 1) that the draws of that forward use; `draft` stands first.
    `choose` is another rule than the threshold: the distribution at each masked position -> the positions to commit."""
    n, B, mask, eos = len(prompt), s.block_size, s.mask_token_id, s.eos_token_id
    blocks = math.ceil((n + s.max_new_tokens) / B)
    x = torch.tensor(prompt + [mask] * (blocks * B - n))
    x[n : n + len(draft)] = torch.tensor(draft, dtype=torch.long)
    given = {n + i for i, token in enumerate(draft) if token != mask}
    first_step_of, step_of, logprob_of, edits, forwards, block_forwards = {}, {}, {}, [], 0, []
    end = blocks * B

    for block in range(n // B, blocks):
        post_steps, mask_steps = 0, 0
        block_forwards.append(0)
        while True:
            places = [i for i in range(block * B, (block + 1) * B) if i >= n]
            masked = [i for i in places if x[i] == mask]
            if masked and mask_steps == budget(s):
                break
            if not masked and (s.editing_threshold is None or post_steps == s.max_post_steps):
                break
            count, factor = 0, 1.0
            if masked:
                count = least(s, len(masked), mask_steps)
                factor = 1 - s.eos_penalty * (1 - mask_steps / max(budget(s) - 1, 1))
            mask_steps += bool(masked)
            post_steps += not masked

            logits = block_causal_logits(policy, x[: (block + 1) * B], B)
            numbers = uniform(forwards) if uniform else [0.0] * B
            token, top, confidence, written, logprob, p_of = {}, {}, {}, {}, {}, {}
            for i in places:
                p_V = p_of[i] = processed(logits[i], s)
                token[i] = draw(p_V, numbers[i - block * B], s)
                logprob[i] = math.log(p_V[token[i]])
                top[i] = int(p_V.argmax()) if s.acceptance == "top" else token[i]
                confidence[i] = judged(p_V, top[i], s, factor)
                written[i] = judged(p_V, token[i], s, factor)

            commit = [i for i in masked if confidence[i] > s.threshold]
            if len(commit) < count:
                commit = sorted(masked, key=lambda i: -confidence[i])[:count]
            if choose is not None:
                commit = choose({i: p_of[i] for i in masked})
            change = []
            if s.editing_threshold is not None:
                visible = [i for i in places if i not in masked]
                change = [i for i in visible if token[i] != x[i] != top[i] and written[i] > s.editing_threshold]
                edits += [(i - n, forwards, int(x[i]), token[i]) for i in change]
            for i in commit + change:
                x[i], step_of[i], logprob_of[i] = token[i], forwards, logprob[i]
                first_step_of.setdefault(i, -2 if i in given else forwards)
            forwards += 1
            block_forwards[-1] += 1
            if not masked and not change:
                break

        response = x[n : (block + 1) * B].tolist()
        if eos in response and mask not in response[: response.index(eos)]:
            end = (block + 1) * B
            break

    token_ids = x[n:end].tolist()
    output_ids = token_ids[: s.max_new_tokens]
    if eos in output_ids and mask not in output_ids[: output_ids.index(eos)]:
        output_ids = output_ids[: output_ids.index(eos) + 1]
    return Outcome(
        token_ids,
        output_ids,
        [-1 if x[i] == mask else step_of.get(i, -2) for i in range(n, end)],
        [0.0 if x[i] == mask else logprob_of.get(i, 0.0) for i in range(n, end)],
        [-1 if x[i] == mask else first_step_of.get(i, -2) for i in range(n, end)],
        edits,
        block_forwards,
        forwards,
    )
