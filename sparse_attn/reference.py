"""The definition of every operation, in plain torch, written to be read and not to be fast.

All other implementations are compared with these functions. They compute in fp32, and in fp64
when they are given fp64, on any device. Memory is not bounded here: selected rows are gathered
as ``[s_q, topk, d]``. On a CPU without the C++ library they run on parts of their arguments.

Shapes and the meaning of each argument are those of :mod:`sparse_attn.ops`, whose functions check
them; these trust their arguments. The ops call them by keyword, with the names of their records.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import KV_FORMATS, Format, dequantise, format_of, fp8_scale, to_e4m3
from .formats.index_keys import INDEX_K
from .rope import apply_rope, hadamard_transform

INF = float("inf")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays fp64; every other dtype is computed in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def index_logits(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    ks: Tensor,
    ke: Tensor,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    block_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
) -> Tensor:
    """``logits[t, s] = sum_j weights[t, j] * relu(q[t, j] . k[s])`` for ``ks[t] <= s < ke[t]``, else -inf.

    Quantised q and k are what :func:`sparse_attn.formats.dequantise` makes of values and scales.

    Source: the lightning indexer of the DeepSeek-V3.2 report, equation 1.
    """
    if block_table is not None:
        return _paged_index_logits(q, k, weights, ks, ke, q_scale, k_scale, block_table, cu_seqlens_q)
    dtype = compute_dtype(q.dtype)
    q, keys = dequantise(q, q_scale, dtype=dtype), dequantise(k, k_scale, dtype=dtype).mT  # keys [d, s_kv]
    logits = q.new_empty(len(q), len(k))
    for t in range(len(q)):  # one query at a time: never [s_q, h, s_kv]
        logits[t] = weights[t].to(dtype) @ torch.relu(q[t] @ keys)
    return logits.masked_fill(~_visible(len(k), ks, ke), -INF)


def _paged_index_logits(q, k, weights, ks, ke, q_scale, k_scale, block_table, cu_seqlens_q):
    pages, page_size, _ = k.shape
    logits = q.new_full((len(q), block_table.shape[1] * page_size), -INF, dtype=compute_dtype(q.dtype))
    rows = table_rows(len(q), block_table, cu_seqlens_q)
    for row, table in enumerate(block_table if pages else ()):
        t = rows == row
        exists = (table >= 0) & (table < pages)
        page = torch.where(exists, table, 0).long()
        keys, scales = k[page].flatten(0, 1), None if k_scale is None else k_scale[page].flatten(0, 1)
        scale = None if q_scale is None else q_scale[t]
        scores = index_logits(q[t], keys, weights[t], ks[t], ke[t], scale, scales)
        logits[t] = scores.masked_fill(~exists.repeat_interleave(page_size), -INF)
    return logits


def select_topk(logits: Tensor, topk: int, ks: Tensor, ke: Tensor) -> Tensor:
    """The ``topk`` highest logits within [ks, ke): ties to the lower index, ascending, -1 padded."""
    s_q, s_kv = logits.shape
    eligible = _visible(s_kv, ks, ke) & (logits > -INF)  # NaN compares false
    scores = torch.where(logits == 0, 0.0, logits)  # -0.0 equals +0.0, also for a sort of bit patterns
    scores = torch.where(eligible, scores, -INF)
    order = scores.sort(dim=-1, descending=True, stable=True).indices[:, :topk]
    order = torch.where(eligible.gather(1, order), order, s_kv).sort(dim=-1).values
    indices = logits.new_full((s_q, topk), -1, dtype=torch.int32)
    indices[:, : order.shape[1]] = torch.where(order < s_kv, order, -1)
    return indices


def lightning_topk(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    topk: int,
    ks: Tensor,
    ke: Tensor,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    block_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    workspace_bytes: int = 0,
) -> tuple[Tensor, Tensor]:
    """:func:`select_topk` of :func:`index_logits`, and the scores of the selected.

    All logits are held, whatever the workspace.
    """
    logits = index_logits(q, k, weights, ks, ke, q_scale, k_scale, block_table, cu_seqlens_q)
    indices = select_topk(logits, topk, ks, ke)
    return indices, scores_of(logits, indices)


def scores_of(logits: Tensor, indices: Tensor) -> Tensor:
    """The logits ``[s_q, topk]`` at indices; -inf at index -1."""
    padded = F.pad(logits, (0, 1), value=-INF) if logits.shape[1] == 0 else logits
    return padded.gather(1, indices.clamp(min=0).long()).masked_fill_(indices < 0, -INF)


def physical_slots(
    indices: Tensor,
    block_table: Tensor,
    page_size: int,
    page_stride: int | None = None,
    cu_seqlens_q: Tensor | None = None,
) -> Tensor:
    """``block_table[row, index // page_size] * page_stride + index % page_size``; -1 where there is none."""
    pages = block_table.shape[1]
    table = F.pad(block_table.long(), (0, 1, 0, 1), value=-1)  # what is not mapped finds page -1
    mapped = (indices >= 0) & (indices < pages * page_size)
    row = table_rows(len(indices), block_table, cu_seqlens_q)
    page = table[row[:, None], torch.where(mapped, indices // page_size, pages)]
    slots = page * (page_stride or page_size) + indices % page_size
    return torch.where((page >= 0) & (slots < 2**31), slots, -1).int()


def table_rows(s_q: int, block_table: Tensor, cu_seqlens_q: Tensor | None) -> Tensor:
    """The row of the block table of each query, ``[s_q]`` int64; n for a query of no sequence."""
    t = torch.arange(s_q, device=block_table.device)
    if cu_seqlens_q is None:
        return t // max(s_q // max(len(block_table), 1), 1)
    return torch.searchsorted(cu_seqlens_q[1:].long().contiguous(), t, right=True)


def sparse_mla(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    d_v: int,
    softmax_scale: float,
    topk_length: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_kv: Tensor | None = None,
    extra_indices: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    kv_format: str | None = None,
    extra_kv_format: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of every head over the selected rows of one shared latent key/value.

    Source: multi-head latent attention in its absorbed form, DeepSeek-V2 report, section 2.1.
    """
    dtype = compute_dtype(q.dtype)
    rows, valid = _gather_latent(kv, kv_format, indices[:, None], topk_length, dtype)
    if extra_kv is not None and extra_indices is not None:
        extra = extra_kv, extra_kv_format, extra_indices[:, None], extra_topk_length
        extra_rows, extra_valid = _gather_latent(*extra, dtype)
        rows, valid = torch.cat([rows, extra_rows], 2), torch.cat([valid, extra_valid], 2)
    out, lse, max_logits = _attend(q[:, None].to(dtype), rows, rows[..., :d_v], valid, softmax_scale)
    out = _apply_sink(out[:, 0], lse[:, 0], attn_sink)
    return out.to(q.dtype), lse[:, 0], max_logits[:, 0]


def sparse_gqa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    softmax_scale: float,
    topk_length: Tensor | None = None,
    attn_sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Grouped-query attention over the selected rows of k and v; query head h reads kv head h // group."""
    dtype = compute_dtype(q.dtype)
    indices = indices[:, None] if indices.dim() == 2 else indices
    keys, valid = _gather(k, indices, topk_length, dtype)
    values, _ = _gather(v, indices, topk_length, dtype)
    grouped = q.to(dtype).unflatten(1, (k.shape[1], q.shape[1] // k.shape[1]))  # [s_q, h_kv, group, d]
    out, lse, _ = _attend(grouped, keys, values, valid, softmax_scale)
    out, lse = out.flatten(1, 2), lse.flatten(1, 2)
    return _apply_sink(out, lse, attn_sink).to(q.dtype), lse


def merge_attention(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Join attention over disjoint sets of keys: ``out = sum_i exp(lse_i - lse) out_i``."""
    dtype = compute_dtype(outs.dtype)
    lses = lses.to(dtype)
    lse = torch.logsumexp(lses, 0)
    out = torch.zeros(outs.shape[1:], dtype=dtype, device=outs.device)
    for part, part_lse in zip(outs, lses, strict=True):
        weight = (part_lse - lse).exp()[..., None]  # [s_q, h, 1]
        out += torch.where(part_lse[..., None] == -INF, 0.0, weight * part)
    return out.to(outs.dtype), lse


# Writers.


def write_kv(
    kv: Tensor,
    cache: Tensor,
    slots: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    pairing: str | None,
    power_of_two: bool,
    min_scale: float,
    cache_format: str | None = None,
) -> None:
    """RMSNorm of the first 512 values, RoPE of the last 64, and the token's bytes into its slot."""
    x = kv.float()
    if norm_weight is not None:
        x = torch.cat([F.rms_norm(x[:, :512], (512,), norm_weight.float(), eps), x[:, 512:]], -1)
    if cos is not None:  # else nothing is turned, and nothing is copied
        x = torch.cat([x[:, :-64], _rotate(x[:, None, -64:], cos, sin, pairing, False)[:, 0]], -1)
    fmt = None if cache_format is None else KV_FORMATS[cache_format]
    _store(x, slots, cache, fmt, power_of_two, min_scale)


def write_index_k(
    k: Tensor,
    cache: Tensor,
    slots: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    pairing: str | None,
    hadamard: bool,
    power_of_two: bool,
    min_scale: float,
) -> None:
    """LayerNorm, RoPE, the Hadamard matrix, and the key's bytes into its slot."""
    x = k.float()
    if norm_weight is not None and norm_bias is not None:
        x = F.layer_norm(x, x.shape[-1:], norm_weight.float(), norm_bias.float(), eps)
    x = _rotate(x[:, None], cos, sin, pairing, hadamard)[:, 0]
    _store(x, slots, cache, INDEX_K if cache.dtype == torch.uint8 else None, power_of_two, min_scale)


def quantise_index_q(
    q: Tensor,
    weights: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    pairing: str | None,
    hadamard: bool,
    power_of_two: bool,
    min_scale: float,
) -> tuple[Tensor, Tensor]:
    """RoPE, the Hadamard matrix, e4m3 bytes under one scale per head, and weights times that scale."""
    x = _rotate(q.float(), cos, sin, pairing, hadamard)
    scale = fp8_scale(x.abs().amax(-1), power_of_two, min_scale)
    return to_e4m3(x / scale[..., None]).view(torch.uint8), weights * scale


def _rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None, pairing: str | None, hadamard: bool) -> Tensor:
    if cos is not None and sin is not None and pairing is not None:
        x = apply_rope(x, cos, sin, pairing)
    return hadamard_transform(x) if hadamard else x


def _store(
    x: Tensor, slots: Tensor, cache: Tensor, fmt: Format | None, power_of_two: bool, min_scale: float
) -> None:
    """Rows ``[tokens, width]`` into the slots that exist, in the cache's format, or rounded to its dtype."""
    if fmt is None:
        parts, places = (x[:, None].to(cache.dtype),), (cache,)
    else:
        packed = fmt.quantised("x", x[:, None], power_of_two=power_of_two, min_scale=min_scale)
        parts, places = fmt.views(packed), fmt.views(cache)
    pages, page_size, _ = cache.shape
    tokens = ((slots >= 0) & (slots < pages * page_size)).nonzero()[:, 0]
    slots = slots[tokens].long()
    for part, place in zip(parts, places, strict=True):
        if part.dtype == torch.float8_e4m3fn:
            part, place = part.view(torch.uint8), place.view(torch.uint8)
        place[slots // max(page_size, 1), slots % max(page_size, 1)] = part[tokens, 0]


def _visible(s_kv: int, ks: Tensor, ke: Tensor) -> Tensor:
    position = torch.arange(s_kv, device=ks.device)
    return (position >= ks[:, None]) & (position < ke[:, None])  # [s_q, s_kv]


def _gather_latent(
    kv: Tensor, name: str | None, indices: Tensor, topk_length: Tensor | None, dtype: torch.dtype
):
    """:func:`_gather` of a latent cache: rows ``[s_kv, d]``, pages ``[pages, page_size, d]``, or quantised
    pages ``[pages, page_size, bytes]`` of the format ``name``; selected rows alone are dequantised.
    """
    if kv.dim() == 2:
        return _gather(kv[:, None], indices, topk_length, dtype)
    pages, page_size, d = kv.shape
    slot, valid = _slots(pages * page_size, indices, topk_length)
    parts = None
    if kv.dtype == torch.uint8:
        fmt = format_of("kv", kv, KV_FORMATS, name, named_by="kv_format")
        d, parts = fmt.width, fmt.views(kv)
    if pages * page_size == 0:
        return torch.zeros(*slot.shape, d, dtype=dtype, device=kv.device), valid
    at = slot // page_size, slot % page_size
    rows = dequantise(*(part[at] for part in parts), dtype=dtype) if parts else kv[at].to(dtype)
    return _zero_unless(valid, rows), valid


def _gather(cache: Tensor, indices: Tensor, topk_length: Tensor | None, dtype: torch.dtype):
    """The selected rows ``[s_q, h_kv, topk, d]`` of a cache ``[s_kv, h_kv, d]``, and which of them are valid;
    the others are zeros.

    indices ``[s_q, 1, topk]`` serve all heads, ``[s_q, h_kv, topk]`` one each.
    """
    s_kv, h_kv, d = cache.shape
    slot, valid = _slots(s_kv, indices, topk_length)
    if s_kv == 0:
        return torch.zeros(len(slot), h_kv, slot.shape[2], d, dtype=dtype, device=cache.device), valid
    if slot.shape[1] == 1:
        rows = cache.index_select(0, slot.flatten()).to(dtype).unflatten(0, slot[:, 0].shape).transpose(1, 2)
    else:
        heads = (cache[:, h].index_select(0, slot[:, h].flatten()) for h in range(h_kv))
        rows = torch.stack([*heads]).to(dtype).unflatten(1, slot[:, 0].shape).transpose(0, 1)
    return _zero_unless(valid, rows), valid


def _slots(s_kv: int, indices: Tensor, topk_length: Tensor | None) -> tuple[Tensor, Tensor]:
    """Indices as int64, 0 where they are not valid, and where they are."""
    valid = (indices >= 0) & (indices < s_kv)
    if topk_length is not None:
        valid &= torch.arange(indices.shape[-1], device=indices.device) < topk_length[:, None, None]
    return torch.where(valid, indices, 0).long(), valid


def _zero_unless(valid: Tensor, rows: Tensor) -> Tensor:
    """In place."""
    return rows if valid.all() else rows.masked_fill_(~valid[..., None], 0.0)


def _attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, softmax_scale: float):
    """q [s_q, h_kv, group, d], k and v [s_q, h_kv, n, d], valid [s_q, h_kv, n] -> out, lse and the highest
    score, by query head.
    """
    scores = (q @ k.mT * softmax_scale).masked_fill(~valid[:, :, None], -INF)  # [s_q, h_kv, group, n]
    lse = torch.logsumexp(scores, -1)
    empty = ~valid.any(-1)[:, :, None, None]  # [s_q, h_kv, 1, 1]
    probabilities = (scores - lse[..., None]).exp().masked_fill(empty, 0.0)
    highest = torch.nn.functional.pad(scores, (0, 1), value=-INF).amax(-1)  # n may be 0
    return probabilities @ v, lse, highest


def _apply_sink(out: Tensor, lse: Tensor, attn_sink: Tensor | None) -> Tensor:
    """Scale by exp(lse) / (exp(lse) + exp(sink)); a row with nothing to attend to stays zero."""
    if attn_sink is None:
        return out
    kept = torch.sigmoid(lse - attn_sink.to(lse.dtype))
    return out * torch.where(lse == -INF, 0.0, kept)[..., None]
