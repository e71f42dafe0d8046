"""The vocabulary head that answers with five numbers a target, TokenScores, never with logits.

With a vocabulary of 157,184 the logits of one row outweigh the model, so they are made in chunks of a bounded size, both
in the forward and, again, in the backward pass. Nothing of size [targets, V] outlives its chunk. The head owns its
weight and reads it inside its own forward, which is what ZeRO-3 needs to gather it.

With z the logits, p = softmax(z), q = softmax(z / T) and H the entropy of q:

    d log p_y / dz = onehot(y) - p          d H / dz = -q * (log q + H) / T

The temperature T concerns the entropy alone ([DP] trains it at 0.5); everything else is said of p.
"""

import torch
from torch import nn

from dfactory.types import TokenScores

CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}  # fp32 logits of one chunk: a CPU's cache likes little


class VocabularyHead(nn.Linear):
    """`nn.Linear` over the vocabulary, with a second mode: given targets it returns TokenScores."""

    @staticmethod
    def adopt(head: nn.Linear) -> "VocabularyHead":
        """Give an existing head the second mode; its parameters, names and ties stay."""
        head.__class__ = VocabularyHead
        return head

    def forward(self, hidden: torch.Tensor, target_ids_N: torch.Tensor | None = None, entropy_temperature: float = 1.0):
        """hidden [..., H] -> logits [..., V]; or hidden [N, H] with targets [N] -> TokenScores."""
        if target_ids_N is None:
            return super().forward(hidden)
        return TokenScores(*_Scores.apply(hidden, self.weight, target_ids_N, entropy_temperature))


def _chunks(targets: int, weight_VH: torch.Tensor) -> list[slice]:
    rows = max(1, CHUNK_BYTES[weight_VH.device.type] // (4 * len(weight_VH)))
    return [slice(start, min(start + rows, targets)) for start in range(0, targets, rows)]


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, target_ids_N, temperature):
        count = len(target_ids_N)
        # log q = (log p) / T - shift
        numbers = (hidden_NH.new_zeros(count, dtype=torch.float32) for _ in range(5))
        logprob_N, entropy_N, log_sum_N, argmax_logprob_N, shift_N = numbers
        argmax_N = torch.empty_like(target_ids_N)
        for part in _chunks(count, weight_VH):
            logits = (hidden_NH[part] @ weight_VH.T).float()
            top, argmax_N[part] = logits.max(dim=-1)
            below_top = logits.sub_(top[:, None])
            weight = below_top.exp()
            log_sum = weight.sum(dim=-1).log()
            logprob_N[part] = below_top.gather(1, target_ids_N[part, None])[:, 0] - log_sum
            argmax_logprob_N[part], log_sum_N[part] = -log_sum, top + log_sum
            log_sum_q = log_sum
            if temperature != 1:
                torch.exp(below_top.div_(temperature), out=weight)
                log_sum_q = weight.sum(dim=-1).log()
                shift_N[part] = log_sum_q - log_sum / temperature
            # H = sum of q (log sum - x), with q = weight / sum
            entropy_N[part] = log_sum_q - weight.mul_(below_top).sum(dim=-1) * (-log_sum_q).exp()
        ctx.temperature = temperature
        ctx.save_for_backward(hidden_NH, weight_VH, target_ids_N, log_sum_N, shift_N, entropy_N)
        hit_N = argmax_N == target_ids_N
        ctx.mark_non_differentiable(hit_N, argmax_N, argmax_logprob_N)
        ctx.set_materialize_grads(False)  # an unused entropy is told by None, without a look at the device
        return logprob_N, entropy_N, hit_N, argmax_N, argmax_logprob_N

    @staticmethod
    def backward(ctx, grad_logprob_N, grad_entropy_N, *_):
        hidden_NH, weight_VH, target_ids_N, log_sum_N, shift_N, entropy_N = ctx.saved_tensors
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        parts = _chunks(len(target_ids_N), weight_VH)
        grad_hidden = torch.empty_like(hidden_NH) if needs_hidden else None
        # Chunks add up in fp32: sums of rounded bf16 parts would depend on the chunk size.
        grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32) if needs_weight else None
        if grad_logprob_N is None:
            grad_logprob_N = torch.zeros_like(entropy_N)
        for part in parts:
            log_p = (hidden_NH[part] @ weight_VH.T).float().sub_(log_sum_N[part, None])
            upstream = grad_logprob_N[part, None].expand(-1, 1)
            p = log_p.exp_() if grad_entropy_N is None else log_p.exp()
            grad_logits = p.mul_(-upstream)
            grad_logits.scatter_add_(1, target_ids_N[part, None], upstream.contiguous())
            if grad_entropy_N is not None:
                log_q = log_p.div_(ctx.temperature).sub_(shift_N[part, None])
                slope = log_q.exp().mul_(log_q.add_(entropy_N[part, None]))
                grad_logits.sub_(slope.mul_(grad_entropy_N[part, None] / ctx.temperature))
                del slope
            grad_logits = grad_logits.to(weight_VH.dtype)
            if needs_hidden:
                torch.matmul(grad_logits, weight_VH, out=grad_hidden[part])
            if needs_weight:
                if grad_weight.dtype == grad_logits.dtype:
                    grad_weight.addmm_(grad_logits.T, hidden_NH[part])
                else:
                    grad_weight += grad_logits.T @ hidden_NH[part]
        return grad_hidden, grad_weight.to(weight_VH.dtype) if needs_weight else None, None, None
