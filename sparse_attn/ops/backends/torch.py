"""CPU implementations in torch, chunked so that memory stays bounded. They take every argument.

bf16 and fp16 inputs are computed in fp32: torch's bf16 matrix product rounds its result, which
would put an error of a whole bf16 step on every logit. Each function fills the outputs of its record.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...formats import dequantise, views

if TYPE_CHECKING:
    from ..attention import MergeAttentionOp, SparseGQAOp, SparseMLAOp
    from ..index import IndexLogitsOp, PhysicalSlotsOp, SelectTopkOp

INF = float("inf")
KEY_BLOCK = 1024  # keys scored at a time: the block and its scores stay in cache
SCORE_BYTES = 4 << 20  # per-head scores held at a time while index logits are summed
SELECT_BYTES = 32 << 20  # temporaries of the selection
GATHER_BYTES = 16 << 20  # selected rows held at a time in attention


def index_logits(a: "IndexLogitsOp") -> None:
    if a.out.numel() == 0:
        return
    dtype = a.out.dtype
    if a.block_table is None:

        def read(start: int, stop: int):
            return _decode(a.k, a.k_scale, slice(start, stop), dtype), None

        _index_logits(a, slice(None), read)
        return
    queries_per_row = a.q.shape[0] // max(a.block_table.shape[0], 1)
    # Neighbouring queries of one sequence share their pages: score them together.
    tables, counts = a.block_table.unique_consecutive(dim=0, return_counts=True)
    start = 0
    for table, count in zip(tables, counts.tolist(), strict=True):
        t = slice(start, start + count * queries_per_row)
        start = t.stop
        _index_logits(a, t, _page_reader(a.k, a.k_scale, table, dtype))


def _decode(x: Tensor, scales: Tensor | None, at, dtype: torch.dtype) -> Tensor:
    return dequantise(x[at], None if scales is None else scales[at], dtype=dtype)


# (start, stop) -> the keys of these positions, and which of them exist: all, if None.
KeyReader = Callable[[int, int], tuple[Tensor, Tensor | None]]


def _page_reader(k: Tensor, k_scale: Tensor | None, table: Tensor, dtype: torch.dtype) -> KeyReader:
    """Reads the logical positions that ``table`` maps to pages."""
    pages, page_size, _ = k.shape

    def read(start: int, stop: int):
        position = torch.arange(start, stop)
        page = table[position // page_size].long()
        exists = (page >= 0) & (page < pages)
        slot = torch.where(exists, page, 0), position % page_size
        return _decode(k, k_scale, slot, dtype), exists

    return read


def _index_logits(a: "IndexLogitsOp", queries: slice, read_keys: KeyReader) -> None:
    """Score those queries, which read the same keys."""
    q, out, weights = a.q[queries], a.out[queries], a.weights[queries]
    q_scale = None if a.q_scale is None else a.q_scale[queries]
    (s_q, heads, _), width, dtype = q.shape, out.shape[1], out.dtype
    out.fill_(-INF)
    ks, ke = (x[queries].clamp(0, width) for x in (a.ks, a.ke))
    block = max(1, min(s_q, SCORE_BYTES // (heads * KEY_BLOCK * dtype.itemsize)))
    for t0 in range(0, s_q, block):
        t = slice(t0, min(t0 + block, s_q))
        starts, stops = ks[t, None], ke[t, None]
        rows = _decode(q, q_scale, t, dtype).flatten(0, 1)  # [block * heads, d]
        head_weights = weights[t].to(dtype)[:, None]  # [block, 1, heads]
        for s0 in range(int(starts.min()), int(stops.max()), KEY_BLOCK):
            s1 = min(s0 + KEY_BLOCK, int(stops.max()))
            keys, exists = read_keys(s0, s1)
            scores = (rows @ keys.mT).relu_().view(-1, heads, s1 - s0)
            logits = torch.bmm(head_weights, scores)[:, 0]  # [block, keys]
            position = torch.arange(s0, s1)
            hidden = (position < starts) | (position >= stops)
            if exists is not None:
                hidden |= ~exists
            out[t, s0:s1] = logits.masked_fill_(hidden, -INF)


def select_topk(a: "SelectTopkOp") -> None:
    s_q, s_kv = a.logits.shape
    a.out.fill_(-1)
    if s_q == 0 or s_kv == 0:
        return
    block = max(1, SELECT_BYTES // (32 * s_kv))
    for t0 in range(0, s_q, block):
        t = slice(t0, min(t0 + block, s_q))
        start, stop = int(a.ks[t].clamp(0, s_kv).min()), int(a.ke[t].clamp(0, s_kv).max())
        if start < stop:
            logits, ranges = a.logits[t, start:stop], (a.ks[t, None], a.ke[t, None])
            _select_topk(logits, a.topk, *ranges, start, a.out[t])


def _select_topk(logits: Tensor, topk: int, ks: Tensor, ke: Tensor, start: int, out: Tensor) -> None:
    """Column 0 is position ``start``. Select what is above the k-th value, then ties from the left."""
    position = torch.arange(start, start + logits.shape[1])
    eligible = (position >= ks) & (position < ke) & (logits > -INF)  # NaN compares false
    scores = torch.where(eligible, logits, -INF)
    n = min(topk, scores.shape[1])
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
    out[row, slot] = (column + start).to(out.dtype)


def physical_slots(a: "PhysicalSlotsOp") -> None:
    pages, page_size = a.block_table.shape[1], a.page_size
    queries = len(a.indices) // max(len(a.block_table), 1)
    for row, table in enumerate(a.block_table):
        t = slice(row * queries, (row + 1) * queries)
        indices, out = a.indices[t], a.out[t]
        page_index = torch.div(indices, page_size, rounding_mode="floor")
        mapped = (page_index >= 0) & (page_index < pages)
        page = table[page_index[mapped]].long()
        slots = page * page_size + indices[mapped] % page_size
        out.fill_(-1)
        out[mapped] = torch.where((page >= 0) & (slots < 2**31), slots, -1).int()


def sparse_mla(a: "SparseMLAOp") -> None:
    segments = [(_one_head(a.kv), a.indices, a.topk_length)]
    if a.extra_kv is not None and a.extra_indices is not None:
        segments.append((_one_head(a.extra_kv), a.extra_indices, a.extra_topk_length))
    dtype = a.lse.dtype
    selected = sum(i.shape[-1] for _, i, _ in segments)
    for t in _query_chunks(a.q.shape[0], selected * a.q.shape[2] * dtype.itemsize):
        gathered = [
            _gather(cache, i[t], None if length is None else length[t], dtype)
            for cache, i, length in segments
        ]
        rows, valid = (
            gathered[0] if len(gathered) == 1 else (torch.cat(p, 2) for p in zip(*gathered, strict=True))
        )
        q, values = a.q[t, None].to(dtype), rows[..., : a.d_v]
        a.max_logits[t] = _attend(q, rows, values, valid, a, t)


def sparse_gqa(a: "SparseGQAOp") -> None:
    h_kv, dtype = a.k.shape[1], a.lse.dtype
    row_bytes = a.indices.shape[-1] * h_kv * (a.k.shape[2] + a.v.shape[2]) * dtype.itemsize
    for t in _query_chunks(a.q.shape[0], row_bytes):
        length = None if a.topk_length is None else a.topk_length[t]
        keys, valid = _gather(a.k, a.indices[t], length, dtype)
        values, _ = _gather(a.v, a.indices[t], length, dtype)
        grouped = a.q[t].to(dtype).unflatten(1, (h_kv, -1))  # [chunk, h_kv, group, d]
        _attend(grouped, keys, values, valid, a, t)


def merge_attention(a: "MergeAttentionOp") -> None:
    total = torch.logsumexp(a.lses, 0)
    merged = torch.zeros(a.out.shape, dtype=a.lse.dtype)
    for part, part_lse in zip(a.outs, a.lses, strict=True):
        empty = (part_lse == -INF)[..., None]
        merged += torch.where(empty, 0.0, (part_lse - total).exp()[..., None] * part)
    a.out.copy_(merged)
    a.lse.copy_(total)


def _query_chunks(s_q: int, bytes_per_query: int) -> Iterator[slice]:
    step = max(1, GATHER_BYTES // max(bytes_per_query, 1))
    return (slice(t, min(t + step, s_q)) for t in range(0, s_q, step))


def _one_head(kv: Tensor) -> Tensor:
    return kv if kv.dtype == torch.uint8 else kv[:, None]


def _gather(cache: Tensor, indices: Tensor, topk_length: Tensor | None, dtype: torch.dtype):
    """Selected rows ``[s_q, h_kv, n, d]`` of a cache, and which are valid.

    The cache is ``[s_kv, h_kv, d]``, or quantised and of one head, ``[pages, page_size, bytes]``: of that,
    the selected tokens alone are dequantised.

    indices ``[s_q, topk]`` serve all heads (valid is then ``[s_q, 1, n]``), ``[s_q, h_kv, topk]`` one
    each. n is topk without the columns at the end where no index is valid: the padding of early
    queries. Rows that are not valid come back as zeros, whatever the cache holds.
    """
    quantised = cache.dtype == torch.uint8
    s_kv = cache.shape[0] * cache.shape[1] if quantised else cache.shape[0]
    shared = indices.dim() == 2
    if shared:
        indices = indices[:, None]
    valid = (indices >= 0) & (indices < s_kv)
    if topk_length is not None:
        valid &= torch.arange(indices.shape[-1]) < topk_length[:, None, None]
    used = valid.flatten(0, 1).any(0).nonzero()
    s_q, topk = len(indices), int(used[-1]) + 1 if len(used) else 0
    valid, indices = valid[..., :topk], indices[..., :topk]
    safe = torch.where(valid, indices, 0)
    if quantised:
        slot = safe.flatten()
        slot = slot // cache.shape[1], slot % cache.shape[1]
        rows = dequantise(*(part[slot] for part in views(cache)), dtype=dtype).unflatten(0, safe.shape)
    elif shared:
        rows = cache.index_select(0, safe.flatten()).unflatten(0, (s_q, topk)).transpose(1, 2)
    else:
        heads = [cache[:, h].index_select(0, safe[:, h].flatten()) for h in range(cache.shape[1])]
        rows = torch.stack(heads).unflatten(1, (s_q, topk)).transpose(0, 1)
    rows = rows.to(dtype)
    if not valid.all():
        rows.masked_fill_(~valid[..., None], 0.0)
    return rows, valid


def _attend(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, a: "SparseMLAOp | SparseGQAOp", t: slice
) -> Tensor:
    """q [n, h_kv, group, d], k and v [n, h_kv, topk, d] of queries t; fills their out and lse.

    Returns the highest scores, ``[n, h_q]``.
    """
    out, lse = a.out[t], a.lse[t]
    scores = (q @ k.mT).mul_(a.softmax_scale)  # [n, h_kv, group, topk]
    if not valid.all():
        scores.masked_fill_(~valid[:, :, None], -INF)
    if scores.shape[-1] == 0:
        out.zero_()
        return lse.fill_(-INF)
    top = scores.amax(-1, keepdim=True)
    empty = ~valid.any(-1)[:, :, None, None]
    scores.sub_(top.masked_fill(empty, 0.0)).exp_()
    total = scores.sum(-1, keepdim=True)
    row_lse = (top + total.log()).flatten(1, 2)  # [n, h_q, 1]
    result = torch.where(empty, 0.0, (scores @ v) / total).flatten(1, 2)
    if a.attn_sink is not None:
        kept = torch.sigmoid(row_lse - a.attn_sink[:, None])
        result = torch.where(row_lse == -INF, 0.0, result * kept)
    out.copy_(result)
    lse.copy_(row_lse[..., 0])
    return top.flatten(1, 2)[..., 0]
