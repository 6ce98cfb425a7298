"""Which sequence of a ragged batch a query, or a group of queries, belongs to.

Sequence i, row i of a block table of n rows, has the queries from ``cu_seqlens_q[i]`` to
``cu_seqlens_q[i + 1] - 1``. "Row n" are the queries after them, of no sequence. cu_seqlens_q lies on the
device: launchers know only how many groups there can be at most.
"""

import triton
import triton.language as tl

from .arguments import cdiv

TILE = tl.constexpr(256)  # sequences at a time


def most_groups(s_q: int, n: int, queries: int) -> int:
    """How many groups of neighbours n sequences, and the queries after them, can need."""
    return min(s_q, cdiv(s_q + n * (queries - 1), queries))


@triton.jit
def row_of(t, cu_seqlens_q_ptr, n):
    """The row of query t; n if it belongs to no sequence."""
    row = 0
    for first in range(0, n, TILE):
        offs = first + tl.arange(0, TILE)
        ends = tl.load(cu_seqlens_q_ptr + 1 + offs, mask=offs < n, other=0x7FFFFFFF)  # [TILE]
        row += tl.sum((ends <= t).to(tl.int32), 0)
    return row


@triton.jit
def group_of(group, cu_seqlens_q_ptr, n, s_q, QUERIES: tl.constexpr):
    """The row of a group of at most QUERIES neighbours, its first query, and where its row ends.

    Groups beyond the last have the first query s_q.
    """
    before, row, start, stop = 0, n, s_q, s_q
    for first in range(0, n + 1, TILE):
        offs = first + tl.arange(0, TILE)  # [TILE] rows
        starts = tl.load(cu_seqlens_q_ptr + offs, mask=(offs > 0) & (offs <= n), other=0)
        stops = tl.load(cu_seqlens_q_ptr + offs + 1, mask=offs < n, other=s_q)
        starts = tl.where(offs <= n, tl.minimum(tl.maximum(starts, 0), s_q), s_q)
        stops = tl.minimum(tl.maximum(stops, starts), s_q)
        groups = tl.cdiv(stops - starts, QUERIES)
        ends = before + tl.cumsum(groups, 0)
        mine = (group < ends) & (group >= ends - groups)
        row += tl.sum(tl.where(mine, offs - n, 0), 0)
        start += tl.sum(tl.where(mine, starts + (group - ends + groups) * QUERIES - s_q, 0), 0)
        stop += tl.sum(tl.where(mine, stops - s_q, 0), 0)
        before += tl.sum(groups, 0)
    return row, start, stop
