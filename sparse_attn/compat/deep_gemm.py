"""DeepGEMM's logits of the lightning indexer, over contiguous keys and over a paged cache.

Beyond DeepGEMM: any number of heads, any page size and, in fp8, any head dimension; ``context_lens`` of one
dimension or two; logits outside a query's keys are -inf also where DeepGEMM leaves them undefined (without
``clean_logits``). These functions return every logit, as their callers want; to select the top-k,
:func:`sparse_attn.lightning_topk` never holds more than a chunk of them.

Source of the signatures: DeepGEMM at commit 54e2261; docs/facades.md lists the releases.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..formats.elements import split_pages
from ..ops import check
from ..ops.check import INT32
from ..ops.index import index_logits

INF = float("inf")
WORKSPACE_BYTES = 64 << 20  # of fp32 logits at a time, where the result is another tensor
FP8, PACKED_FP4 = (torch.float8_e4m3fn,), (torch.int8, torch.uint8)
LOGITS_DTYPES = (torch.float32, torch.bfloat16)

__all__ = [
    "fp8_fp4_mqa_logits",
    "fp8_fp4_paged_mqa_logits",
    "fp8_mqa_logits",
    "fp8_paged_mqa_logits",
    "get_num_sms",
    "get_paged_mqa_logits_metadata",
]


def fp8_mqa_logits(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    weights: Tensor,
    cu_seq_len_k_start: Tensor,
    cu_seq_len_k_end: Tensor,
    clean_logits: bool = True,
    max_seqlen_k: int = 0,
) -> Tensor:
    """:func:`fp8_fp4_mqa_logits` of e4m3 queries ``[s_q, heads, d]``, in fp32."""
    options = clean_logits, max_seqlen_k
    return fp8_fp4_mqa_logits((q, None), kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, *options)


def fp8_fp4_mqa_logits(
    q: tuple[Tensor, Tensor | None],
    kv: tuple[Tensor, Tensor],
    weights: Tensor,
    cu_seq_len_k_start: Tensor,
    cu_seq_len_k_end: Tensor,
    clean_logits: bool = True,
    max_seqlen_k: int = 0,
    logits_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``sum_j weights[t, j] * relu(q[t, j] . k[s])`` for the keys s from a query's start to its end.

    Args:
        q: values and scales. In fp8 e4m3 ``[s_q, heads, d]`` and None: their scales belong into ``weights``.
            In fp4 two e2m1 in each byte (int8 or uint8) ``[s_q, heads, d / 2]`` with d of 64 or 128, the
            first in the low bits, and int32 ``[s_q, heads]``: a ue8m0 for each 32 values, the first in the
            low byte. Of d = 64 these are two; the bytes above them are not read.
        kv: values and scales of the keys: e4m3 ``[s_kv, d]`` and fp32 ``[s_kv]``, or in fp4 ``[s_kv, d / 2]``
            and int32 ``[s_kv]``.
        weights: ``[s_q, heads]`` fp32, or bf16 for bf16 logits.
        cu_seq_len_k_start, cu_seq_len_k_end: ``[s_q]`` int32; a query does not see the key at its end.
        clean_logits: whether logits of other keys are -inf or undefined.
        max_seqlen_k: 0, or the longest range of a query: row t then begins with the logit of the query's
            first key instead of that of key 0. Such rows are not cleaned: ``clean_logits`` must be False.
        logits_dtype: fp32 or bf16, which is rounded from fp32.

    Returns:
        ``[s_q, s_kv]``, or ``[s_q, max_seqlen_k]``, in logits_dtype.
    """
    dims: dict[str, int] = {}
    queries, q_scale = _queries(q, "s_q heads", dims)
    k, k_scale = _keys(kv, queries, dims)
    weights = _weights(weights, "s_q heads", logits_dtype, dims, queries)
    ks, ke = cu_seq_len_k_start, cu_seq_len_k_end
    check.tensor("cu_seq_len_k_start", ks, "s_q", dims, INT32, k.device)
    check.tensor("cu_seq_len_k_end", ke, "s_q", dims, INT32, k.device)
    check.integer("max_seqlen_k", max_seqlen_k, 0)
    if max_seqlen_k and clean_logits:
        raise ValueError("clean_logits: expected False with max_seqlen_k, whose rows are not cleaned")
    s_q, s_kv = queries.shape[0], k.shape[0]
    if logits_dtype == torch.float32 and not max_seqlen_k:
        return index_logits(queries, k, weights, ks, ke, q_scale=q_scale, k_scale=k_scale)
    logits = torch.empty(s_q, max_seqlen_k or s_kv, dtype=logits_dtype, device=k.device)
    for t in _chunks(s_q, s_kv):
        scale = None if q_scale is None else q_scale[t]
        chunk = index_logits(queries[t], k, weights[t], ks[t], ke[t], q_scale=scale, k_scale=k_scale)
        logits[t] = _from_their_start(chunk, ks[t], max_seqlen_k) if max_seqlen_k else chunk
    return logits


def get_paged_mqa_logits_metadata(
    context_lens: Tensor, block_kv: int, num_sms: int, indices: Tensor | None = None
) -> Tensor:
    """int32 ``[num_sms + 1, 2]`` zeros, for the paged functions' ``schedule_meta``.

    DeepGEMM keeps a plan of its launch here, which depends on lengths; this library needs none.

    Args:
        context_lens: ``[batch]`` or ``[batch, next_n]`` int32.
        block_kv: tokens per page.
        num_sms: see :func:`get_num_sms`.
        indices: None, or ``[batch]`` int32; see :func:`fp8_fp4_paged_mqa_logits`.
    """
    dims: dict[str, int] = {}
    _check_lengths(context_lens, dims)
    check.integer("block_kv", block_kv)
    check.integer("num_sms", num_sms)
    _check_sequences(indices, dims, context_lens.device)
    return torch.zeros(num_sms + 1, 2, dtype=torch.int32, device=context_lens.device)


def get_num_sms() -> int:
    """Multiprocessors of the current CUDA device; without one, torch's threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    return torch.get_num_threads()


def fp8_paged_mqa_logits(
    q: Tensor,
    kv_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    schedule_meta: Tensor,
    max_context_len: int,
    clean_logits: bool = False,
    indices: Tensor | None = None,
) -> Tensor:
    """:func:`fp8_fp4_paged_mqa_logits` of e4m3 queries ``[batch, next_n, heads, d]``, in fp32."""
    where = context_lens, block_table, schedule_meta, max_context_len
    return fp8_fp4_paged_mqa_logits((q, None), kv_cache, weights, *where, clean_logits, indices=indices)


def fp8_fp4_paged_mqa_logits(
    q: tuple[Tensor, Tensor | None],
    kv_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    schedule_meta: Tensor,
    max_context_len: int,
    clean_logits: bool = False,
    logits_dtype: torch.dtype = torch.float32,
    indices: Tensor | None = None,
) -> Tensor:
    """The logits of :func:`fp8_fp4_mqa_logits` for the newest tokens of sequences in a paged cache.

    Args:
        q: values and scales as there, ``[batch, next_n, heads, d]``; in fp4 ``[batch, next_n, heads, d / 2]``
            and ``[batch, next_n, heads]``.
        kv_cache: uint8 ``[pages, page_size, 1, d + 4]``, in fp4 ``[pages, page_size, 1, d / 2 + 4]``: 68 or
            36 bytes per key. Behind the values of *all* keys of a page lie the scales of all
            (:func:`sparse_attn.formats.index_k_views`).
        weights: ``[batch * next_n, heads]`` fp32, or bf16 for bf16 logits.
        context_lens: int32, how many tokens a query sees: ``[batch, next_n]``; or ``[batch]``, the length of
            each sequence, of which query j sees ``context_lens - next_n + j + 1`` tokens.
        block_table: ``[batch, max_pages]`` int32; a page outside the cache holds nothing.
        schedule_meta: of :func:`get_paged_mqa_logits_metadata`, int32 ``[num_sms + 1, 2]``.
        max_context_len: the width of the result; tokens from there on are not seen.
        clean_logits: whether logits of tokens that a query does not see are -inf or undefined.
        logits_dtype: fp32 or bf16, which is rounded from fp32.
        indices: None, or with next_n of 1 ``[batch]`` int32: which queries belong to one sequence, a hint for
            scheduling. What they see is said by context_lens and block_table.

    Returns:
        ``[batch * next_n, max_context_len]`` in logits_dtype.
    """
    dims: dict[str, int] = {}
    queries, q_scale = _queries(q, "batch next_n heads", dims)
    batch, next_n = queries.shape[:2]
    k, k_scale = _pages(kv_cache, queries, dims)
    dims["tokens"] = batch * next_n
    weights = _weights(weights, "tokens heads", logits_dtype, dims, queries)
    ends = _visible(context_lens, dims, queries)
    check.tensor("block_table", block_table, "batch max_pages", dims, INT32, k.device)
    check.tensor("schedule_meta", schedule_meta, "num_sms+1 2", {}, INT32, k.device)
    check.integer("max_context_len", max_context_len, 0)
    _check_sequences(indices, dims, k.device)

    pages = -(-max_context_len // max(1, k.shape[1]))
    table = block_table[:, :pages] if pages < block_table.shape[1] else block_table
    width = table.shape[1] * k.shape[1]
    queries, q_scale = queries.flatten(0, 1), None if q_scale is None else q_scale.flatten(0, 1)
    options = {"q_scale": q_scale, "k_scale": k_scale, "block_table": table}
    if logits_dtype == torch.float32 and width == max_context_len:
        return index_logits(queries, k, weights, None, ends, **options)

    # The result may end within a page, and the pages before it: this is as wide as both.
    ends = ends.clamp(max=max_context_len)
    logits = torch.empty(len(queries), max(width, max_context_len), dtype=logits_dtype, device=k.device)
    if logits_dtype == torch.float32:
        index_logits(queries, k, weights, None, ends, **options, out=logits[:, :width])
    else:
        for t in _chunks(len(queries), width, next_n):
            inputs = queries[t], k, weights[t], None, ends[t]
            scale = None if q_scale is None else q_scale[t]
            rows = table[t.start // next_n : t.stop // next_n]
            logits[t, :width] = index_logits(*inputs, q_scale=scale, k_scale=k_scale, block_table=rows)
    if width < max_context_len:
        logits[:, width:] = -INF
    return logits[:, :max_context_len]


def _from_their_start(logits: Tensor, starts: Tensor, width: int) -> Tensor:
    """``[s_q, width]``: each row of ``[s_q, s_kv]`` from the query's first key on; -inf past the last key."""
    position = starts.long()[:, None] + torch.arange(width, device=logits.device)
    exists = (position >= 0) & (position < logits.shape[1])
    if logits.shape[1] == 0:
        return logits.new_full(position.shape, -INF)
    return logits.gather(1, torch.where(exists, position, 0)).masked_fill_(~exists, -INF)


def _chunks(s_q: int, width: int, unit: int = 1) -> Iterator[slice]:
    """Slices of s_q queries, in whole units, whose logits fit the workspace; one unit at least."""
    step = max(1, WORKSPACE_BYTES // max(1, 4 * width * unit)) * max(1, unit)
    return (slice(t, min(t + step, s_q)) for t in range(0, s_q, step))


def _queries(q: tuple, spec: str, dims: dict[str, int]) -> tuple[Tensor, Tensor | None]:
    """Values (uint8 in fp4) and scales as the library takes them."""
    values, scales = _pair("q", q)
    if scales is None:
        check.tensor("q", values, f"{spec} d", dims, FP8)
        return values, None
    check.tensor("q[0]", values, f"{spec} d/2", dims, PACKED_FP4)
    check.tensor("q[1]", scales, spec, dims, INT32, values.device)
    return values.view(torch.uint8), scales


def _keys(kv: tuple, q: Tensor, dims: dict[str, int]) -> tuple[Tensor, Tensor]:
    values, scales = _pair("kv", kv)
    if q.dtype == torch.uint8:
        check.tensor("kv[0]", values, "s_kv d/2", dims, PACKED_FP4, q.device)
        check.tensor("kv[1]", scales, "s_kv", dims, INT32, q.device)
        return values.view(torch.uint8), scales
    check.tensor("kv[0]", values, "s_kv d", dims, FP8, q.device)
    check.tensor("kv[1]", scales, "s_kv", dims, (torch.float32,), q.device)
    return values, scales


def _pages(kv_cache: Tensor, q: Tensor, dims: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Values ``[pages, page_size, ...]`` and scales ``[pages, page_size]`` of a cache, views."""
    size = q.shape[-1]  # bytes of values per key
    check.tensor("kv_cache", kv_cache, f"pages page_size 1 {size + 4}", {}, (torch.uint8,), q.device)
    steps = kv_cache.stride()
    apart = steps[3] != 1 or (kv_cache.shape[1] > 1 and steps[1] != size + 4)
    if apart or (kv_cache.shape[0] > 1 and steps[0] % 4) or kv_cache.storage_offset() % 4 or size % 4:
        raise ValueError(
            "kv_cache: expected pages of adjoining bytes at multiples of 4 bytes, got strides "
            f"{tuple(steps)} from offset {kv_cache.storage_offset()}"
        )
    values, scales = split_pages(kv_cache.squeeze(2), size, 4)
    if q.dtype == torch.uint8:
        return values, scales.view(torch.int32).squeeze(2)
    return values.view(torch.float8_e4m3fn), scales.view(torch.float32).squeeze(2)


def _pair(name: str, pair: tuple) -> tuple:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"{name}: expected the pair (values, scales), got {type(pair).__name__}")
    return pair


def _weights(
    weights: Tensor, spec: str, logits_dtype: torch.dtype, dims: dict[str, int], q: Tensor
) -> Tensor:
    if logits_dtype not in LOGITS_DTYPES:
        raise TypeError(f"logits_dtype: expected float32 or bfloat16, got {logits_dtype}")
    dtypes = LOGITS_DTYPES[: 1 if logits_dtype == torch.float32 else 2]
    check.tensor("weights", weights, spec, dims, dtypes, q.device)
    return weights.float()


def _visible(context_lens: Tensor, dims: dict[str, int], q: Tensor) -> Tensor:
    """How many tokens each of ``[batch * next_n]`` queries sees."""
    _check_lengths(context_lens, dims, q.device)
    if context_lens.dim() == 1:
        earlier = torch.arange(1 - dims["next_n"], 1, dtype=torch.int32, device=q.device)
        return (context_lens[:, None] + earlier).flatten()
    return context_lens.flatten()


def _check_lengths(context_lens: Tensor, dims: dict[str, int], device: torch.device | None = None) -> None:
    spec = "batch" if isinstance(context_lens, Tensor) and context_lens.dim() == 1 else "batch next_n"
    check.tensor("context_lens", context_lens, spec, dims, INT32, device)


def _check_sequences(indices: Tensor | None, dims: dict[str, int], device: torch.device) -> None:
    if indices is None:
        return
    check.tensor("indices", indices, "batch", dims, INT32, device)
    if dims.get("next_n", 1) != 1:
        raise ValueError(f"indices: expected None with next_n={dims['next_n']}")
