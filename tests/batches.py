"""ViewBatches put together by hand for tests, without dfactory.data and without noise."""

import dataclasses

import torch

from dfactory.types import PADDING, ViewBatch

# A dense decoder of about 30,000 parameters, by transformers' config keys.
TINY_SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}


@dataclasses.dataclass
class Document:
    """A clean document in whole blocks and its views: (tokens after noise, where to score) over all its positions.

    Of a view only the blocks from `first_block` on are put into the row.
    """

    ids: torch.Tensor
    views: list[tuple[torch.Tensor, torch.Tensor]]
    block_size: int
    first_block: int = 0


def make_batch(rows: list[list[Document]], row_length: int | None = None, pad_id: int = 0) -> ViewBatch:
    """Rows of documents, each [clean | view 1 | ... | view K], padded on the right to one length."""
    columns = [[[] for _ in range(6)] for _ in rows]  # ids, positions, document, view, block, trunk
    targets, lefts, clean_lefts, ids, document_ids, responses, views = [], [], [], [], [], [], []
    for r, row in enumerate(rows):
        for document in row:
            number = len(document_ids)
            document_ids.append(number)
            views.append(len(document.views))
            scored = torch.zeros(len(document.ids), dtype=torch.bool)
            position = torch.arange(len(document.ids))
            clean = len(columns[r][0])
            _extend(columns[r], document.ids, position, number, 0, document.block_size)
            for k, (noisy, target) in enumerate(document.views, start=1):
                start = len(columns[r][0])
                kept = position >= document.first_block * document.block_size
                _extend(columns[r], noisy[kept], position[kept], number, k, document.block_size)
                here = target[kept].nonzero()[:, 0].tolist()
                targets += [(r, start + i) for i in here]
                before = int(position[kept][0]) - 1  # the clean token before the view
                lefts += [(r, start + i - 1 if i else clean + before if before >= 0 else start) for i in here]
                at = [before + 1 + i for i in here]  # positions
                inside = [i > 0 and p % document.block_size > 0 for i, p in zip(here, at, strict=True)]
                clean_lefts += [
                    (r, start + i - 1 if within else clean + p - 1 if p else start)
                    for i, p, within in zip(here, at, inside, strict=True)
                ]
                ids += document.ids[target & kept].tolist()
                scored |= target
            responses.append(int(scored.sum()))
    length = row_length or max(len(row[0]) for row in columns)
    fill = (pad_id, 0, PADDING, 0, 0, PADDING)
    fields = [
        torch.tensor([row[f] + [fill[f]] * (length - len(row[f])) for row in columns], dtype=torch.int64)
        for f in range(6)
    ]
    weight = torch.full((len(targets),), 0.5)
    return ViewBatch(
        *fields,
        target_index_N=torch.tensor([r * length + i for r, i in targets], dtype=torch.int64),
        left_index_N=torch.tensor([r * length + i for r, i in lefts], dtype=torch.int64),
        clean_left_index_N=torch.tensor([r * length + i for r, i in clean_lefts], dtype=torch.int64),
        target_ids_N=torch.tensor(ids, dtype=torch.int64),
        real_N=torch.ones(len(ids), dtype=torch.bool),
        t_N=weight,
        elbo_weight_N=1 / weight,
        document_id_D=torch.tensor(document_ids),
        response_length_D=torch.tensor(responses),
        answer_length_D=torch.tensor(responses),
        num_views_D=torch.tensor(views),
    )


def _extend(columns, ids, position, document, view, block_size):
    count = len(ids)
    columns[0] += ids.tolist()
    columns[1] += position.tolist()
    columns[2] += [document] * count
    columns[3] += [view] * count
    columns[4] += (position // block_size).tolist()
    columns[5] += [document] * count


def random_document(generator, length: int, block_size: int, views: int, vocabulary: int, prompt: int) -> Document:
    """A document of `length` tokens whose positions from `prompt` on are masked at random, by the last id."""
    ids = torch.randint(0, vocabulary - 1, (length,), generator=generator)
    noised = []
    for _ in range(views):
        masked = (torch.rand(length, generator=generator) < 0.5) & (torch.arange(length) >= prompt)
        noised.append((torch.where(masked, vocabulary - 1, ids), masked))
    return Document(ids, noised, block_size, first_block=prompt // block_size)
