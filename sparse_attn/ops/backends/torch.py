"""CPU implementations in torch, whose memory is bounded: most are the definition, run on parts of a record.

An op that is not here needs no more memory for its definition than its arguments and outputs take.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from ..records import in_chunks, of_queries, run_reference

if TYPE_CHECKING:
    from ..attention import SparseGQAOp, SparseMLAOp
    from ..index import IndexLogitsOp, SelectTopkOp

INF = float("inf")
KEY_BLOCK = 2048  # keys scored at a time
QUERY_BLOCK = 256  # queries that they are scored for
SELECT_BYTES = 32 << 20  # temporaries of the selection
GATHER_BYTES = 16 << 20  # selected rows held at a time in attention


def index_logits(a: "IndexLogitsOp") -> None:
    """A block of keys at a time, from the first that one of some queries sees to the last."""
    a.out.fill_(-INF)
    if a.out.numel() == 0 or len(a.k) == 0:
        return
    width = a.out.shape[1]
    a = a._replace(ks=a.ks.clamp(0, width), ke=a.ke.clamp(0, width))
    for group in _by_table(a):
        for part in in_chunks(group, 1 if a.batch_invariant else QUERY_BLOCK):
            first, last = int(part.ks.min()), int(part.ke.max())
            for start in range(first, last, KEY_BLOCK):
                _score(part, slice(start, min(start + KEY_BLOCK, last)))


def _by_table(a: "IndexLogitsOp") -> Iterator["IndexLogitsOp"]:
    """Neighbours whose rows of the block table are equal, as those of one sequence, read keys together."""
    if a.block_table is None:
        yield a
        return
    if a.cu_seqlens_q is None:
        tables, counts = a.block_table.unique_consecutive(dim=0, return_counts=True)
        stops = counts.cumsum(0) * (len(a.q) // len(a.block_table))
    else:
        tables, stops = a.block_table, a.cu_seqlens_q[1:].clamp(0, len(a.q))
    a, start = a._replace(cu_seqlens_q=None), 0
    for table, stop in zip(tables, stops.tolist(), strict=True):
        if start < stop:
            yield of_queries(a, slice(start, stop))._replace(block_table=table[None])
        start = stop


def _score(a: "IndexLogitsOp", keys: slice) -> None:
    """Score the keys of these positions for queries that share a row of the block table."""
    at, exists, out = keys, None, a.out[:, keys]
    if a.block_table is not None:
        pages, page_size, _ = a.k.shape
        position = torch.arange(keys.start, keys.stop)
        page = a.block_table[0, position // page_size].long()
        exists = (page >= 0) & (page < pages)
        at = torch.where(exists, page, 0), position % page_size
    read = {"k": a.k[at], "k_scale": None if a.k_scale is None else a.k_scale[at], "block_table": None}
    ranges = {"ks": a.ks - keys.start, "ke": a.ke - keys.start}
    run_reference("index_logits", a._replace(**read, **ranges, out=out))
    if exists is not None:
        out.masked_fill_(~exists, -INF)


def select_topk(a: "SelectTopkOp") -> None:
    """What is above the k-th value, then ties from the left: a sort, as in the definition, takes longer."""
    a.out.fill_(-1)
    width = a.logits.shape[1]
    if width == 0:
        return
    n, position = min(a.topk, width), torch.arange(width)
    for part in in_chunks(a, SELECT_BYTES // (32 * width)):
        eligible = (position >= part.ks[:, None]) & (position < part.ke[:, None])
        eligible &= part.logits > -INF  # NaN compares false
        scores = torch.where(eligible, part.logits, -INF)
        kth = scores.topk(n, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        chosen = scores > kth
        ties = (scores == kth) & eligible  # a row with fewer than n has kth = -inf and no ties
        room = n - chosen.sum(-1, keepdim=True)
        if (ties.sum(-1, keepdim=True) > room).any():
            ties &= ties.cumsum(-1) <= room
        chosen |= ties
        row, column = chosen.nonzero(as_tuple=True)  # ascending within each row
        count = chosen.sum(-1)
        slot = torch.arange(row.numel()) - (count.cumsum(0) - count)[row]
        part.out[row, slot] = column.to(part.out.dtype)


def sparse_mla(a: "SparseMLAOp") -> None:
    selected = sum(x.shape[-1] for x in (a.indices, a.extra_indices) if x is not None)
    _attend("sparse_mla", a, selected * a.q.shape[2])


def sparse_gqa(a: "SparseGQAOp") -> None:
    _attend("sparse_gqa", a, a.indices.shape[-1] * a.k.shape[1] * (a.k.shape[2] + a.v.shape[2]))


def _attend(name: str, a: "SparseMLAOp | SparseGQAOp", values: int) -> None:
    """As many queries at a time as may select rows of ``values`` values each."""
    for part in in_chunks(a, GATHER_BYTES // max(1, values * a.lse.itemsize)):
        used = (part.indices >= 0).flatten(0, -2).any(0).nonzero()
        columns = int(used[-1]) + 1 if len(used) else 0  # the others pad: early queries have many of them
        run_reference(name, part._replace(indices=part.indices[..., :columns]))
