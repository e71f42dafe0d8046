"""Groups of documents -> the rows of every rank: documents that begin alike stand side by side, and ranks have equal loads.

    group    the rollouts of one prompt                     [a a a b b c]      a, b, c: rollouts; a letter is a part
    piece    what goes to one rank together                 [a a a] [b b c]    by `_cut`
    bundle   what shares a prefix in one row                [a a] [a] [b b c]  by `_bundles`
    row      bundles, packed; those of one group join       [a a | d] [a | b b c]

Every rank computes the same plan from the same documents, so that nothing has to be communicated.
"""

from collections.abc import Sequence

from dfactory.packing.pack import pack_rows
from dfactory.packing.share import PackedDocument, share, total_cost
from dfactory.types import AlignedDocument, View

Documents = list[PackedDocument]  # the parts of one rollout, a bundle, or a row


def spread(document: AlignedDocument, views: Sequence[View], row_length: int) -> Documents:
    """The document as often as its views need rows: each time with as many of them as fit, in order. A single view that is
    too long for a row is left to the packer, which names it."""
    parts, here = [], []
    for view in views:
        if here and PackedDocument(document, [*here, view]).cost > row_length:
            parts.append(PackedDocument(document, here))
            here = []
        here.append(view)
    return [*parts, PackedDocument(document, here)]


def plan_ranks(groups: Sequence[Sequence[Documents]], row_length: int, world_size: int) -> list[list[Documents]]:
    """The rows of each rank, from the parts of each rollout of each group. All parts of a rollout go to one rank, because
    the ratio of a sequence needs all of its views.

    A group that stays together computes its prompt once, but ranks and rows are filled better by smaller pieces. So groups
    are cut into pieces of every size, and the plan is taken whose fullest rank has the fewest rows, and then the fewest
    positions.
    """
    largest = max(map(len, groups), default=1)
    sizes = sorted({-(-largest // pieces) for pieces in range(1, largest + 1)})
    plans = [
        _plan([piece for group in groups for piece in _cut(group, size)], row_length, world_size) for size in sizes
    ]
    return min(plans, key=lambda ranks: max((len(rows), sum(map(total_cost, rows))) for rows in ranks))


def share_out(cost_U: list[int], num_ranks: int) -> list[list[int]]:
    """Units by rank, ascending: the costliest first, each to the rank that has the least so far.

    >>> share_out([5, 9, 3, 4], 2)
    [[1, 2], [0, 3]]
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for unit in sorted(range(len(cost_U)), key=lambda unit: -cost_U[unit]):
        rank = loads.index(min(loads))
        shares[rank].append(unit)
        loads[rank] += cost_U[unit]
    return [sorted(share) for share in shares]


def _plan(pieces: list[Sequence[Documents]], row_length: int, world_size: int) -> list[list[Documents]]:
    """The rows of each rank, where each piece is on one rank as a whole."""
    bundles_of = [_bundles([part for parts in piece for part in parts], row_length) for piece in pieces]
    shares = share_out([sum(map(total_cost, bundles)) for bundles in bundles_of], world_size)
    ranks = []
    for share_of_rank in shares:
        bundles = [bundle for number in share_of_rank for bundle in bundles_of[number]]
        rows = pack_rows(map(total_cost, bundles), row_length)
        ranks.append([_join([bundles[index] for index in row]) for row in rows])
    return ranks


def _bundles(parts: Documents, row_length: int) -> list[Documents]:
    """Parts of one group's rollouts by the rows that they take, each row's sharing what they begin with."""
    # Every row pays for the prefix that all of them share, so it is taken off the row and off each part.
    prefix = share(parts)[-1].shared
    rows = pack_rows((part.cost - prefix for part in parts), row_length - prefix)
    return [share([parts[index] for index in row]) for row in rows]


def _join(bundles: list[Documents]) -> Documents:
    """The documents of a row. Bundles of the same group that have met there share as one, if that takes less room: what
    all of them have in common may be shorter than what each has."""
    groups: dict[int, Documents] = {}
    for bundle in bundles:
        groups.setdefault(bundle[0].document.document_id, []).extend(bundle)
    return [part for apart in groups.values() for part in min(apart, share(apart), key=total_cost)]


def _cut(group: Sequence[Documents], size: int) -> list[Sequence[Documents]]:
    """Pieces of `size` rollouts at most, as even as can be."""
    pieces = -(-len(group) // size)
    return [group[len(group) * i // pieces : len(group) * (i + 1) // pieces] for i in range(pieces)]
