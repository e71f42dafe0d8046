"""The evidence lower bound of a response, estimated from the scores of its views (docs/method.md#elbo).

    elbo = mean over views of  sum over masked i of  w_i log p(y_i | view)

w_i is the view's `elbo_weight`: 1/t, or (n + 1) / l where the number of masks is drawn (noise/mask.py). A complementary
pair is two views, so the mean averages its 1/t and 1/(1 - t) halves; with t drawn per block every block is a term of its
own. Each of these is unbiased on the range that t is drawn from. Two policies that score the same batch share the noise.
"""

import torch

from dfactory.types import ViewBatch


def elbo(batch: ViewBatch, logprob_N: torch.Tensor) -> torch.Tensor:
    """The estimate for each document in nats, [D], float32 and differentiable; 0 for a document without views."""
    return batch.sum_by_document(batch.elbo_weight_N * logprob_N) / batch.num_views_D.clamp(min=1)


def elbo_by_view(batch: ViewBatch, logprob_N: torch.Tensor, num_views: int) -> torch.Tensor:
    """The estimate of every view alone, [D, K], whose mean over K is `elbo`. Raises ValueError if a document has not
    `num_views` views."""
    if not bool((batch.num_views_D == num_views).all()):
        raise ValueError(f"documents with {batch.num_views_D.unique().tolist()} views, not {num_views}")
    sums = torch.zeros(len(batch.document_id_D) * num_views, dtype=torch.float32, device=logprob_N.device)
    index_N = batch.document_N * num_views + batch.view_N - 1
    return sums.index_add(0, index_N, batch.elbo_weight_N * logprob_N.float()).view(-1, num_views)
