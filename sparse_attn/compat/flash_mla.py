"""FlashMLA's sparse prefill and its decode with a paged cache, with the arguments of its releases and forks.

Beyond FlashMLA: any number of heads, topk and page size; bf16, fp16 and fp32 queries and caches; every index
outside the cache is ignored, not only -1; slots that are not selected, also behind ``topk_length``, may hold
NaN. Missing: gradients, several kv heads, and FlashMLA's dense prefill.

Positional are the parameters of FlashMLA at commit 9241ae3, which every later release begins with. What came
later is keyword-only, because releases disagree on what follows: docs/facades.md says which has what.
"""

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from ..ops import check
from ..ops.attention import sparse_mla
from ..ops.check import FLOATS, INT32
from ..ops.index import physical_slots
from ..reference import compute_dtype

BYTES = (torch.uint8, torch.int8, torch.float8_e4m3fn)  # types that FlashMLA's callers give a quantised cache
DENSE_INDEX_BYTES = 64 << 20  # slots that dense decode numbers at a time
NAN, INF, LOG2_E = float("nan"), float("inf"), 1 / log(2)

# What a quantised cache holds, by kv_format and bytes per token: a name of sparse_attn.formats. Without
# kv_format, what FlashMLA's newest release reads.
LAYOUTS = {
    None: {656: "v32", 584: "v4", 528: "v41", 288: "v41_fp4"},
    "V32": {656: "v32"},
    "V32_NO_ROPE": {528: "nope"},
    "V4": {584: "v4"},
    "V41": {528: "v41_by_page", 288: "v41_fp4_by_page"},
}
LEGACY = {**LAYOUTS[None], **LAYOUTS["V41"]}  # without kv_format, but with use_legacy

__all__ = ["FlashMLASchedMeta", "flash_mla_sparse_fwd", "flash_mla_with_kvcache", "get_mla_metadata"]


def flash_mla_sparse_fwd(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    *,
    out: Tensor | None = None,
    use_legacy: bool | None = None,
    return_log2_lse: bool | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sparse prefill: each query attends to the rows of ``kv`` that it selects.

    Args:
        q: ``[s_q, h_q, d_qk]``.
        kv: ``[s_kv, 1, d_qk]`` in q's dtype.
        indices: ``[s_q, 1, topk]`` int32; one that is negative or not below s_kv is ignored.
        sm_scale: multiplies the scores.
        d_v: size of the value, the first columns of a row of ``kv``.
        attn_sink: ``[h_q]`` fp32. Scales out by ``exp(lse) / (exp(lse) + exp(attn_sink))``, nothing else.
        topk_length: ``[s_q]`` int32, how many of a query's indices count, from the left.
        out: ``[s_q, h_q, d_v]`` to fill (vLLM's fork).
        use_legacy: which kernels compute it (SGLang's fork). Here there is one set: no effect.
        return_log2_lse: True for max_logits and lse in base 2, False for None instead (SGLang's fork).

    Returns:
        out ``[s_q, h_q, d_v]`` in q's dtype, max_logits and lse ``[s_q, h_q]`` fp32, in natural units and
        without the sink. Of a query with nothing to attend to they are 0, -inf and **+inf**.
    """
    _check_flag("use_legacy", use_legacy)
    _check_flag("return_log2_lse", return_log2_lse)
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
        out=None if out is None else (out, *_statistics(q, 2)),
    )
    if return_log2_lse is False:
        return out, None, None
    lse = _empty_lse_to_inf(lse)
    if return_log2_lse:
        max_logits, lse = max_logits.mul_(LOG2_E), lse.mul_(LOG2_E)
    return out, max_logits, lse


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
    is_fp8_kvcache: bool | None = None,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    *,
    enable_batch_invariant: bool = False,
    kv_format: str | None = None,
    use_legacy: bool | None = None,
    descale_q: None = None,
    descale_k: None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Decode with a paged cache: sparse with ``indices``, else over all tokens of each sequence.

    Args:
        q: ``[batch, s_q, h_q, d_qk]``.
        k_cache: ``[pages, page_size, 1, d_qk]`` in q's dtype, or quantised ``[pages, page_size, 1, bytes]``
            uint8 (or int8, float8_e4m3fn: the bytes count), of a format in :mod:`sparse_attn.formats`: 656
            bytes per token for d_qk = 576; 584, 528 or 288 for 512.
        block_table: ``[batch, max_pages]`` int32, the pages of each sequence. Dense decode needs it; sparse
            decode does not read it, as its indices are slots.
        cache_seqlens: ``[batch]`` int32, tokens of each sequence, those of q included. As ``block_table``.
        head_dim_v: size of the value; 512 with a quantised cache.
        tile_scheduler_metadata: the first of :func:`get_mla_metadata`.
        num_splits: None.
        softmax_scale: default ``d_qk ** -0.5``.
        causal: dense only; query j of s_q then sees ``cache_seqlens - s_q + j + 1`` tokens.
        is_fp8_kvcache: whether the caches are quantised; None: k_cache's dtype tells it.
        indices: ``[batch, s_q, topk]`` int32, slots ``page * page_size + offset``; one outside the cache is
            ignored.
        attn_sink: sparse only; as in :func:`flash_mla_sparse_fwd`.
        extra_k_cache, extra_indices_in_kvcache: sparse only; a second cache and what is selected of it, in
            the same softmax. It is quantised if and only if k_cache is; its page size is its own.
        topk_length, extra_topk_length: sparse only; ``[batch]`` int32, how many indices count for each query
            of a sequence, from the left.
        enable_batch_invariant: whether the bits of a sequence's result may not depend on the others in the
            batch (FlashMLA's release of 30 September 2026). On a CPU they never do.
        kv_format: what a quantised cache holds (SGLang's fork): "V32", "V32_NO_ROPE" (528 bytes per token, 4
            fp32 scales), "V4" or "V41", where the scales of a page lie behind its values. By default 528 and
            288 bytes per token mean V4.1 with the scales of each token behind its values.
        use_legacy: SGLang's choice of kernels. With True 528 and 288 bytes per token are "V41" by default.
        descale_q, descale_k: None. Queries are not quantised here, and a quantised cache holds its scales.
        out: ``[batch, s_q, h_q, head_dim_v]`` to fill (vLLM's fork).

    Returns:
        out ``[batch, s_q, h_q, head_dim_v]`` in q's dtype and lse ``[batch, h_q, s_q]`` fp32, natural log,
        without the sink. Of a query with nothing to attend to they are 0 and **+inf**.
    """
    dims: dict[str, int] = {}
    check.tensor("q", q, "batch s_q h_q d_qk", dims, FLOATS)
    batch, s_q, h_q, _ = q.shape
    if is_fp8_kvcache is None:
        is_fp8_kvcache = isinstance(k_cache, Tensor) and k_cache.dtype in BYTES
    k_cache = _cache("k_cache", k_cache, is_fp8_kvcache, dims, q)
    if extra_k_cache is not None:
        extra_k_cache = _cache("extra_k_cache", extra_k_cache, is_fp8_kvcache, dims, q)
    for name, value in (("num_splits", num_splits), ("descale_q", descale_q), ("descale_k", descale_k)):
        if value is not None:
            raise ValueError(f"{name}: expected None, got {type(value).__name__}")
    _check_flag("enable_batch_invariant", enable_batch_invariant)
    _check_flag("use_legacy", use_legacy)
    layouts = _layouts(kv_format, use_legacy, k_cache, extra_k_cache)
    filled = None if out is None else _queries_of("out", out, {**dims, "head_dim_v": head_dim_v}, q)
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
        "enable_batch_invariant": enable_batch_invariant,
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
        check.integer("head_dim_v", head_dim_v)
        inputs = q, k_cache, block_table, cache_seqlens, causal, head_dim_v, softmax_scale
        filled, lse = _attend_to_all(*inputs, layouts[0], enable_batch_invariant, filled)
    else:
        if causal:
            raise ValueError("causal: expected False with indices, which say themselves what a query sees")
        rows = q.flatten(0, 1)
        filled, lse = sparse_mla(
            rows,
            k_cache,
            selected,
            d_v=head_dim_v,
            softmax_scale=softmax_scale,
            topk_length=_lengths("topk_length", topk_length, dims, q),
            attn_sink=attn_sink,
            extra_kv=extra_k_cache,
            extra_indices=extra_selected,
            extra_topk_length=_lengths("extra_topk_length", extra_topk_length, dims, q),
            kv_format=layouts[0],
            extra_kv_format=layouts[1],
            batch_invariant=enable_batch_invariant,
            return_lse=True,
            out=None if filled is None else (filled, *_statistics(rows, 1)),
        )
    if tile_scheduler_metadata.config is None:  # only now: a call that was refused leaves no trace
        tile_scheduler_metadata.config = config
    out = filled.view(batch, s_q, h_q, head_dim_v) if out is None else out
    lse = _empty_lse_to_inf(lse)
    return out, lse.unsqueeze(2) if s_q == 1 else lse.view(batch, s_q, h_q).transpose(1, 2)


def _attend_to_all(
    q, k_cache, block_table, cache_seqlens, causal, d_v, scale, layout, batch_invariant, out
) -> tuple[Tensor, Tensor]:
    """Dense decode: every slot of a sequence is selected, of as many sequences at a time as memory allows."""
    batch, s_q, page_size = *q.shape[:2], k_cache.shape[1]
    if out is None:
        out = torch.empty(batch * s_q, q.shape[2], d_v, dtype=q.dtype, device=q.device)
    (lse,) = _statistics(q.flatten(0, 1), 1)
    seen = cache_seqlens[:, None].expand(batch, s_q)
    if causal:
        seen = seen + torch.arange(1 - s_q, 1, dtype=torch.int32, device=q.device)
    position = torch.arange(block_table.shape[1] * page_size, dtype=torch.int32, device=q.device)
    step = max(1, DENSE_INDEX_BYTES // max(1, 4 * s_q * len(position)))
    for first in range(0, max(batch, 1), step):
        some = slice(first, first + step)
        slots = physical_slots(position.expand(len(block_table[some]), -1), block_table[some], page_size)
        if s_q != 1:
            slots = slots.repeat_interleave(s_q, 0)
        part = slice(first * s_q, (first + step) * s_q)
        sparse_mla(
            q[some].flatten(0, 1),
            k_cache,
            slots,
            d_v=d_v,
            softmax_scale=scale,
            topk_length=seen[some].reshape(-1),
            return_lse=True,
            out=(out[part], lse[part]),
            kv_format=layout,
            batch_invariant=batch_invariant,
        )
    return out, lse


def _layouts(
    kv_format: str | None, use_legacy: bool | None, k_cache: Tensor, extra_k_cache: Tensor | None
) -> tuple[str | None, str | None]:
    """What the bytes of both caches mean, where they are quantised."""
    if kv_format not in LAYOUTS:
        raise ValueError(f"kv_format: expected one of {', '.join(map(repr, LAYOUTS))}, got {kv_format!r}")
    if kv_format is not None and use_legacy is False:
        raise ValueError(f"kv_format: expected None with use_legacy=False, got {kv_format!r}")
    layouts = LEGACY if use_legacy and kv_format is None else LAYOUTS[kv_format]
    extra = None if extra_k_cache is None else _layout(extra_k_cache, kv_format, layouts)
    return _layout(k_cache, kv_format, layouts), extra


def _layout(cache: Tensor, kv_format: str | None, layouts: dict[int, str]) -> str | None:
    if cache.dtype == torch.uint8 and cache.shape[3] in layouts:
        return layouts[cache.shape[3]]
    if kv_format is not None:
        sizes, found = " or ".join(map(str, layouts)), f"{check.dtype_name(cache.dtype)} {list(cache.shape)}"
        raise ValueError(f"kv_format: {kv_format!r} means caches of {sizes} bytes per token, got {found}")
    return None  # sparse_mla refuses what it does not read


def _queries_of(name: str, out: Tensor, dims: dict[str, int], q: Tensor) -> Tensor:
    """``[batch * s_q, h_q, head_dim_v]``, a view."""
    check.tensor(name, out, "batch s_q h_q head_dim_v", dims, (q.dtype,), q.device)
    if min(out.shape[:2]) > 1 and out.stride(0) != out.shape[1] * out.stride(1):
        raise ValueError(f"{name}: expected all queries at one distance, got strides {out.stride()}")
    return out.flatten(0, 1)


def _statistics(q: Tensor, count: int) -> tuple[Tensor, ...]:
    """New tensors ``[s_q, h_q]`` for what sparse_mla returns beside a caller's out."""
    dtype = compute_dtype(q.dtype)
    return tuple(torch.empty(q.shape[:2], dtype=dtype, device=q.device) for _ in range(count))


def _check_flag(name: str, value: bool | None) -> None:
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def _empty_lse_to_inf(lse: Tensor) -> Tensor:
    """In place: FlashMLA gives +inf where there is nothing to attend to, this library -inf."""
    return lse.nan_to_num_(NAN, INF, INF)  # by position: keywords take twice as long


def _cache(name: str, cache: Tensor, is_fp8: bool, dims: dict[str, int], q: Tensor) -> Tensor:
    if not is_fp8:
        check.tensor(name, cache, "pages page_size 1 d_qk", {"d_qk": dims["d_qk"]}, (q.dtype,), q.device)
        return cache
    check.tensor(name, cache, "pages page_size 1 bytes", {}, BYTES, q.device)
    return cache if cache.dtype == torch.uint8 else cache.view(torch.uint8)


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
