"""FlashMLA's sparse prefill and its decode with a paged cache.

Beyond FlashMLA: any number of heads, topk and page size; bf16, fp16 and fp32 queries and caches; every index
outside the cache is ignored, not only -1; slots that are not selected, also behind ``topk_length``, may hold
NaN. Missing: gradients, several kv heads, and FlashMLA's dense prefill.

Source of the signatures: FlashMLA at commit 9241ae3.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import check
from ..ops.attention import sparse_mla
from ..ops.check import FLOATS, INT32
from ..ops.index import physical_slots

BYTES = (torch.uint8, torch.int8, torch.float8_e4m3fn)  # types that FlashMLA's callers give a quantised cache
MEANINGS = {528: "v41", 288: "v41_fp4"}  # of bytes per token that have several
DENSE_INDEX_BYTES = 64 << 20  # slots that dense decode numbers at a time

__all__ = ["FlashMLASchedMeta", "flash_mla_sparse_fwd", "flash_mla_with_kvcache", "get_mla_metadata"]


def flash_mla_sparse_fwd(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sparse prefill: each query attends to the rows of ``kv`` that it selects.

    Args:
        q: ``[s_q, h_q, d_qk]``.
        kv: ``[s_kv, 1, d_qk]`` in q's dtype.
        indices: ``[s_q, 1, topk]`` int32; one that is negative or not below s_kv is ignored.
        sm_scale: multiplies the scores.
        d_v: size of the value, the first columns of a row of ``kv``.
        attn_sink: ``[h_q]`` fp32. Scales out by ``exp(lse) / (exp(lse) + exp(attn_sink))``, nothing else.
        topk_length: ``[s_q]`` int32, how many of a query's indices count, from the left.

    Returns:
        out ``[s_q, h_q, d_v]`` in q's dtype, max_logits and lse ``[s_q, h_q]`` fp32, in natural units and
        without the sink. Of a query with nothing to attend to they are 0, -inf and **+inf**.
    """
    dims: dict[str, int] = {}
    check.tensor("q", q, "s_q h_q d_qk", dims, FLOATS)
    check.tensor("kv", kv, "s_kv 1 d_qk", dims, (q.dtype,), q.device)
    check.tensor("indices", indices, "s_q 1 topk", dims, INT32, q.device)
    out, lse, max_logits = sparse_mla(
        q,
        kv[:, 0],
        indices[:, 0],
        d_v=d_v,
        softmax_scale=sm_scale,
        topk_length=topk_length,
        attn_sink=attn_sink,
        return_lse=True,
        return_max_logits=True,
    )
    return out, max_logits, _empty_lse_to_inf(lse)


@dataclass
class FlashMLASchedMeta:
    """Belongs to calls of :func:`flash_mla_with_kvcache` of one configuration; others are refused.

    FlashMLA keeps a plan of its launches here, which depends on lengths; this library needs none.
    """

    config: dict[str, int | None] | None = None


def get_mla_metadata(*args, **kwargs) -> tuple[FlashMLASchedMeta, None]:
    """A new metadata object, and None where older releases returned ``num_splits``.

    Takes any arguments, as FlashMLA does for older callers: they described the calls to plan.
    """
    return FlashMLASchedMeta(), None


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta,
    num_splits: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Decode with a paged cache: sparse with ``indices``, else over all tokens of each sequence.

    Args:
        q: ``[batch, s_q, h_q, d_qk]``.
        k_cache: ``[pages, page_size, 1, d_qk]`` in q's dtype; with ``is_fp8_kvcache`` a quantised one,
            ``[pages, page_size, 1, bytes]`` uint8 (or int8, float8_e4m3fn: the bytes count), of a format in
            :mod:`sparse_attn.formats`: 656 bytes per token for d_qk = 576; 584, 528 or 288 for 512.
        block_table: ``[batch, max_pages]`` int32, the pages of each sequence. Dense decode needs it; sparse
            decode does not read it, as its indices are slots.
        cache_seqlens: ``[batch]`` int32, tokens of each sequence, those of q included. As ``block_table``.
        head_dim_v: size of the value; 512 with a quantised cache.
        tile_scheduler_metadata: the first of :func:`get_mla_metadata`.
        num_splits: None.
        softmax_scale: default ``d_qk ** -0.5``.
        causal: dense only; query j of s_q then sees ``cache_seqlens - s_q + j + 1`` tokens.
        indices: ``[batch, s_q, topk]`` int32, slots ``page * page_size + offset``; one outside the cache is
            ignored.
        attn_sink: sparse only; as in :func:`flash_mla_sparse_fwd`.
        extra_k_cache, extra_indices_in_kvcache: sparse only; a second cache and what is selected of it, in
            the same softmax. It is quantised if and only if k_cache is; its page size is its own.
        topk_length, extra_topk_length: sparse only; ``[batch]`` int32, how many indices count for each query
            of a sequence, from the left.

    Returns:
        out ``[batch, s_q, h_q, head_dim_v]`` in q's dtype and lse ``[batch, h_q, s_q]`` fp32, natural log,
        without the sink. Of a query with nothing to attend to they are 0 and **+inf**.
    """
    dims: dict[str, int] = {}
    check.tensor("q", q, "batch s_q h_q d_qk", dims, FLOATS)
    batch, s_q, h_q, _ = q.shape
    k_cache = _cache("k_cache", k_cache, is_fp8_kvcache, dims, q)
    if extra_k_cache is not None:
        extra_k_cache = _cache("extra_k_cache", extra_k_cache, is_fp8_kvcache, dims, q)
    if num_splits is not None:
        raise ValueError(f"num_splits: expected None, got {type(num_splits).__name__}")
    selected = _indices("indices", indices, dims, q)
    extra_selected = _indices("extra_indices_in_kvcache", extra_indices_in_kvcache, dims, q)
    config = {  # what has to stay the same from call to call on one metadata object
        "batch": batch,
        "s_q": s_q,
        "h_q": h_q,
        "page_size": k_cache.shape[1],
        "topk": _size(selected),
        "extra_page_size": _size(extra_k_cache),
        "extra_topk": _size(extra_selected),
        "causal": bool(causal),
        "is_fp8_kvcache": bool(is_fp8_kvcache),
    }
    _check_metadata(tile_scheduler_metadata, config)

    if selected is None:
        sparse_only = {
            "attn_sink": attn_sink,
            "extra_k_cache": extra_k_cache,
            "extra_indices_in_kvcache": extra_indices_in_kvcache,
            "topk_length": topk_length,
            "extra_topk_length": extra_topk_length,
        }
        for name, value in sparse_only.items():
            if value is not None:
                raise ValueError(f"{name}: expected None without indices (dense decode)")
        check.tensor("block_table", block_table, "batch max_pages", dims, INT32, q.device)
        check.tensor("cache_seqlens", cache_seqlens, "batch", dims, INT32, q.device)
        out, lse = _attend_to_all(q, k_cache, block_table, cache_seqlens, causal, head_dim_v, softmax_scale)
    else:
        if causal:
            raise ValueError("causal: expected False with indices, which say themselves what a query sees")
        out, lse = sparse_mla(
            q.flatten(0, 1),
            k_cache,
            selected,
            d_v=head_dim_v,
            softmax_scale=softmax_scale,
            topk_length=_lengths("topk_length", topk_length, dims, q),
            attn_sink=attn_sink,
            extra_kv=extra_k_cache,
            extra_indices=extra_selected,
            extra_topk_length=_lengths("extra_topk_length", extra_topk_length, dims, q),
            kv_format=_format(k_cache),
            extra_kv_format=_format(extra_k_cache),
            return_lse=True,
        )
    if tile_scheduler_metadata.config is None:  # only now: a call that was refused leaves no trace
        tile_scheduler_metadata.config = config
    lse = _empty_lse_to_inf(lse)
    return out.view(batch, s_q, h_q, head_dim_v), lse.view(batch, s_q, h_q).transpose(1, 2)


def _attend_to_all(q, k_cache, block_table, cache_seqlens, causal, d_v, scale) -> tuple[Tensor, Tensor]:
    """Dense decode: every slot of a sequence is selected, of as many sequences at a time as memory allows."""
    batch, s_q, page_size = *q.shape[:2], k_cache.shape[1]
    seen = cache_seqlens[:, None].expand(batch, s_q)
    if causal:
        seen = seen + torch.arange(1 - s_q, 1, dtype=torch.int32, device=q.device)
    position = torch.arange(block_table.shape[1] * page_size, dtype=torch.int32, device=q.device)
    step = max(1, DENSE_INDEX_BYTES // max(1, 4 * s_q * len(position)))
    outs, lses = [], []
    for first in range(0, max(batch, 1), step):
        some = slice(first, first + step)
        slots = physical_slots(position.expand(len(block_table[some]), -1), block_table[some], page_size)
        if s_q != 1:
            slots = slots.repeat_interleave(s_q, 0)
        queries, length = q[some].flatten(0, 1), seen[some].reshape(-1)
        out, lse = sparse_mla(
            *(queries, k_cache, slots),
            d_v=d_v,
            softmax_scale=scale,
            topk_length=length,
            kv_format=_format(k_cache),
            return_lse=True,
        )
        outs.append(out)
        lses.append(lse)
    return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs), torch.cat(lses))


def _empty_lse_to_inf(lse: Tensor) -> Tensor:
    """In place: FlashMLA gives +inf where there is nothing to attend to, this library -inf."""
    return lse.nan_to_num_(nan=float("nan"), posinf=float("inf"), neginf=float("inf"))


def _cache(name: str, cache: Tensor, is_fp8: bool, dims: dict[str, int], q: Tensor) -> Tensor:
    if not is_fp8:
        check.tensor(name, cache, "pages page_size 1 d_qk", {"d_qk": dims["d_qk"]}, (q.dtype,), q.device)
        return cache
    check.tensor(name, cache, "pages page_size 1 bytes", {}, BYTES, q.device)
    return cache.view(torch.uint8)


def _format(cache: Tensor | None) -> str | None:
    """The name of a quantised cache's format where its bytes per token do not tell it."""
    return MEANINGS.get(cache.shape[-1]) if cache is not None and cache.dtype == torch.uint8 else None


def _size(tensor: Tensor | None) -> int | None:
    """page_size of a cache, topk of indices."""
    return None if tensor is None else tensor.shape[1]


def _indices(name: str, indices: Tensor | None, dims: dict[str, int], q: Tensor) -> Tensor | None:
    """``[batch * s_q, topk]``."""
    if indices is None:
        return None
    check.tensor(name, indices, "batch s_q topk", {**dims}, INT32, q.device)
    return indices.flatten(0, 1)


def _lengths(name: str, lengths: Tensor | None, dims: dict[str, int], q: Tensor) -> Tensor | None:
    """From one per sequence to one per query, ``[batch * s_q]``."""
    if lengths is None:
        return None
    check.tensor(name, lengths, "batch", dims, INT32, q.device)
    return lengths.repeat_interleave(dims["s_q"]) if dims["s_q"] != 1 else lengths


def _check_metadata(metadata: FlashMLASchedMeta, config: dict[str, int | None]) -> None:
    if not isinstance(metadata, FlashMLASchedMeta):
        raise TypeError(
            "tile_scheduler_metadata: expected what get_mla_metadata of this module returns first, "
            f"got {type(metadata).__name__}"
        )
    if metadata.config is not None and metadata.config != config:
        raise ValueError(
            "tile_scheduler_metadata: expected calls of one configuration, "
            f"{tuple(metadata.config.values())} as {tuple(config)}, got {tuple(config.values())}"
        )
