"""Logits of the lightning indexer: how much each query wants each key.

    out[t, s] = sum_j weights[t, j] * relu(q[t, j] . k[s])   for ks[t] <= s < ke[t], else -inf

Keys are rows of k, or, with a block table, logical positions: position s of query t is row s % page_size
of page block_table[row, s // page_size], where row is t // (s_q / n), or the query's sequence. A page that
does not exist gives -inf, as every position does to a query of no sequence.

Quantised operands: the scale of an e4m3 key multiplies the sum, not the key. Where q and k are both e4m3 and
the GPU multiplies e4m3, the product takes their bytes as they are; otherwise they are decoded before it. e2m1
has one scale per 32 values: values times scales are computed in registers, exactly, for a product in bf16.

A program takes several neighbouring queries that share a row of the block table. All their heads are one side
of the product and a tile of keys is the other, so each key is read and decoded once for all of them. Where
pages consist of whole tiles, a tile has one page and one address; otherwise each key is looked up.
"""

import functools
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from . import configs
from .arguments import cdiv, contiguous, next_power_of_2, refuse_fp64
from .configs import (
    INDEX_LOGITS,
    INDEX_LOGITS_FP8,
    INDEX_LOGITS_FP32,
    INDEX_LOGITS_FP32_QUANTISED,
    INDEX_LOGITS_QUANTISED,
    for_device,
    has_native_fp8,
)
from .quantised import from_e2m1, from_e4m3, from_ue8m0, opaque, scaled
from .sequences import group_of, most_groups

if TYPE_CHECKING:
    from ..ops.index import IndexLogitsOp

# q is loaded once for the keys of a program, so these are many where enough programs remain.
KEYS_PER_PROGRAM = (4096, 2048, 1024, 512, 256)  # powers of two: whole tiles
PROGRAMS_PER_MULTIPROCESSOR = 16  # several waves: the last one ends soon
MAX_QUERIES = 4  # of a program; sums of more, with few heads each, spill
FORMATS = {torch.float8_e4m3fn: "e4m3", torch.uint8: "e2m1"}


def refuses(a: "IndexLogitsOp") -> str | None:
    """Why these kernels cannot run ``a``, or None."""
    if a.q.dtype == torch.float16 and a.k.dtype == torch.uint8:  # a value times its scale need not fit
        return "q: expected bfloat16 or float32, as k is e2m1, got float16 (triton backend)"
    return refuse_fp64(a.q, a.k, a.weights)


def index_logits(a: "IndexLogitsOp") -> None:
    """Fill out. Without ``clean``, elements outside the range are left as they are."""
    s_q, h, d = a.q.shape
    width = a.out.shape[1]
    if s_q == 0 or width == 0:
        return
    if a.block_table is not None and len(a.block_table) == 0:  # no sequence
        a.out.fill_(float("-inf"))
        return
    q_format, k_format = FORMATS.get(a.q.dtype), FORMATS.get(a.k.dtype)
    d = 2 * d if q_format == "e2m1" else d
    native_fp8 = has_native_fp8(a.q.device)
    fp8_product = native_fp8 and q_format == k_format == "e4m3"
    # sm_80 has no name for e4m3.
    q, k = (x if form is None else x.view(torch.uint8) for x, form in ((a.q, q_format), (a.k, k_format)))
    pages, page_size, rows, table_strides = 0, 1, 1, (0, 0)
    if a.block_table is not None:
        pages, page_size = k.shape[:2]
        rows, table_strides = a.block_table.shape[0], a.block_table.stride()
    if q.dtype == torch.float32:
        table = INDEX_LOGITS_FP32 if k_format is None else INDEX_LOGITS_FP32_QUANTISED
    else:
        quantised = INDEX_LOGITS_FP8 if fp8_product else INDEX_LOGITS_QUANTISED
        table = INDEX_LOGITS if k_format is None else quantised
    config = for_device(table, q.device)
    block_h = max(16, next_power_of_2(h))
    queries = min(max(1, config.MAX_HEADS // block_h), MAX_QUERIES)
    queries = queries if s_q >= 2 * rows and not a.batch_invariant else 1  # no third variant to compile
    ragged = a.cu_seqlens_q is not None
    groups = most_groups(s_q, rows, queries) if ragged else rows * cdiv(s_q // rows, queries)
    keys_per_program = _keys_per_program(groups, width, q.device)
    with torch.cuda.device_of(q):
        _index_logits_kernel[(groups * cdiv(width, keys_per_program),)](
            q,
            *q.stride(),
            a.q_scale,
            *((0, 0) if a.q_scale is None else a.q_scale.stride()[:2]),
            k,
            *_page_strides(k, a.block_table),
            a.k_scale,
            *_page_strides(a.k_scale, a.block_table)[:2],
            a.weights,
            *a.weights.stride(),
            a.ks.contiguous(),
            a.ke.contiguous(),
            a.block_table,
            *table_strides,
            contiguous(a.cu_seqlens_q),
            a.out,
            *a.out.stride(),
            width,
            pages,
            page_size,
            s_q,
            rows,
            h,
            keys_per_program,
            D=d,
            K_ROW=k.shape[-1] if k.stride()[-2:] == (k.shape[-1], 1) else None,
            WHOLE_TILES=a.block_table is not None and page_size % config.BLOCK_N == 0,
            QUERIES=queries,
            BLOCK_H=block_h,
            BLOCK_N=config.BLOCK_N,
            BLOCK_D=max(16 if k_format is None else 32, next_power_of_2(d)),  # of bf16, of e4m3
            PADDED=block_h != h,
            Q_FORMAT=q_format,
            K_FORMAT=k_format,
            NATIVE_FP8=native_fp8,
            FP8_PRODUCT=fp8_product,
            CLEAN=a.clean,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )


@functools.lru_cache(maxsize=4096)
def _keys_per_program(groups: int, width: int, device: torch.device) -> int:
    """By shapes and the device alone; no logit depends on it."""
    programs = PROGRAMS_PER_MULTIPROCESSOR * configs.multiprocessors(device)
    enough = (keys for keys in KEYS_PER_PROGRAM if groups * cdiv(width, keys) >= programs)
    return next(enough, KEYS_PER_PROGRAM[-1])


def _page_strides(x, block_table) -> tuple:
    """Those of [pages, page_size, ...]; without a block table x is [s_kv, ...] and counts as one page."""
    if x is None:
        return (0, 0)
    return x.stride() if block_table is not None else (0, *x.stride())


@triton.jit(
    do_not_specialize=[
        *("stride_table_row", "stride_out_t", "width", "pages"),
        *("s_q", "rows", "h", "keys_per_program"),
    ]
)
def _index_logits_kernel(
    q_ptr,  # [s_q, h, d], of e2m1 [s_q, h, d / 2]
    stride_q_t,
    stride_q_h,
    stride_q_d,
    q_scale_ptr,  # [s_q, h, d / 32] of e2m1, or None
    stride_q_scale_t,
    stride_q_scale_h,
    k_ptr,  # [s_kv, d], or [pages, page_size, d], of e2m1 d / 2
    stride_k_page,
    stride_k_n,
    stride_k_d,
    k_scale_ptr,  # [s_kv] or [pages, page_size] of e4m3, [..., d / 32] of e2m1, or None
    stride_k_scale_page,
    stride_k_scale_n,
    weights_ptr,  # [s_q, h]
    stride_weights_t,
    stride_weights_h,
    ks_ptr,  # [s_q]
    ke_ptr,  # [s_q]
    table_ptr,  # [rows, max_pages], or None
    stride_table_row,
    stride_table_page,
    cu_seqlens_q_ptr,  # [rows + 1], or None
    out_ptr,  # [s_q, width]
    stride_out_t,
    stride_out_n,
    width,
    pages,
    page_size,
    s_q,
    rows,
    h,
    keys_per_program,
    D: tl.constexpr,
    K_ROW: tl.constexpr,  # stride_k_n where keys follow each other without gaps, else None
    WHOLE_TILES: tl.constexpr,  # pages consist of whole tiles of keys
    QUERIES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PADDED: tl.constexpr,  # heads: BLOCK_H > h
    Q_FORMAT: tl.constexpr,  # None, "e4m3" or "e2m1"
    K_FORMAT: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    FP8_PRODUCT: tl.constexpr,  # q and k are e4m3 and stay so
    CLEAN: tl.constexpr,
):
    """One program: QUERIES queries, keys_per_program keys. Queries vary fastest: neighbours share keys."""
    groups = tl.num_programs(0) // tl.cdiv(width, keys_per_program)
    group = tl.program_id(0) % groups
    if cu_seqlens_q_ptr is None:
        queries_per_row = s_q // rows
        groups_per_row = groups // rows
        table_row = group // groups_per_row
        first_t = table_row * queries_per_row + group % groups_per_row * QUERIES
        stop_t = (table_row + 1) * queries_per_row
    else:
        table_row, first_t, stop_t = group_of(group, cu_seqlens_q_ptr, rows, s_q, QUERIES)
        pages = tl.where(table_row < rows, pages, 0)
        table_row = tl.minimum(table_row, rows - 1)
    table_row = table_row.to(tl.int64)
    offs_t = first_t.to(tl.int64) + tl.arange(0, QUERIES)  # [QUERIES]
    live = offs_t < stop_t
    first = tl.program_id(0) // groups * keys_per_program
    last = tl.minimum(first + keys_per_program, width)
    starts = tl.maximum(tl.load(ks_ptr + offs_t, mask=live, other=0), first)  # [QUERIES]
    stops = tl.minimum(tl.load(ke_ptr + offs_t, mask=live, other=0), last)  # [QUERIES]
    out_rows = out_ptr + offs_t[:, None] * stride_out_t  # [QUERIES, 1]

    if CLEAN:
        for n in range(first, last, BLOCK_N):
            offs_n = (n + tl.arange(0, BLOCK_N))[None, :]  # [1, BLOCK_N]
            hidden = (offs_n < starts[:, None]) | (offs_n >= stops[:, None])
            tl.store(
                out_rows + offs_n.to(tl.int64) * stride_out_n,
                tl.full([QUERIES, BLOCK_N], float("-inf"), tl.float32),
                mask=hidden & live[:, None] & (offs_n < last),
            )

    offs_r = tl.arange(
        0, QUERIES * BLOCK_H
    )  # [QUERIES * BLOCK_H]: heads of the first query, of the second ...
    head = (offs_r % BLOCK_H).to(tl.int64)
    query = first_t.to(tl.int64) + offs_r // BLOCK_H
    real = (query < stop_t) & (head < h)
    q_rows = q_ptr + (query[:, None] * stride_q_t + head[:, None] * stride_q_h)
    q_scales = None
    if Q_FORMAT == "e2m1":
        q_scales = q_scale_ptr + (query[:, None] * stride_q_scale_t + head[:, None] * stride_q_scale_h)
    BF16: tl.constexpr = tl.bfloat16
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty if Q_FORMAT is None else BF16
    q = _load_rows(
        q_rows, stride_q_d, q_scales, real[:, None], D, BLOCK_D, DTYPE, Q_FORMAT, NATIVE_FP8, FP8_PRODUCT
    )  # [QUERIES * BLOCK_H, BLOCK_D]
    weights = tl.load(
        weights_ptr + query * stride_weights_t + head * stride_weights_h, mask=real, other=0.0
    )  # [QUERIES * BLOCK_H]

    q_columns = tl.trans(q)  # in the loop, this would copy q to shared memory again for every tile

    # Of queries that see nothing here, the range is empty.
    begin = tl.min(tl.where(starts < stops, starts, last), 0) // BLOCK_N * BLOCK_N
    end = tl.max(stops, 0)
    step = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    row = stride_k_n if K_ROW is None else K_ROW
    # All keys of a tile lie in one page. Its number and the scales are loaded a tile ahead: the compiler
    # prefetches nothing but the keys.
    ONE_PAGE: tl.constexpr = table_ptr is None or WHOLE_TILES
    SCALES_AHEAD: tl.constexpr = K_FORMAT == "e4m3" and ONE_PAGE
    page, offset = tl.full([], 0, tl.int32), begin  # of the tile
    if table_ptr is not None:
        table_ptr += table_row * stride_table_row
    if WHOLE_TILES:
        offset = begin % page_size
        table_ptr += (begin // page_size).to(tl.int64) * stride_table_page
        page = tl.load(table_ptr, mask=begin < end, other=-1)
    if SCALES_AHEAD:
        exists = _existing(page, pages, begin + step < last, WHOLE_TILES)
        scale_rows = _tile(k_scale_ptr, page, stride_k_scale_page, offset, stride_k_scale_n, BLOCK_N)
        scales = tl.load(scale_rows, mask=exists, other=0.0)
    for n in range(begin, end, BLOCK_N):
        offs_n = n + step  # [BLOCK_N]
        k_scales = None
        if ONE_PAGE:
            exists = _existing(page, pages, offs_n < last, WHOLE_TILES)
            k_rows = _tile(k_ptr, page, stride_k_page, offset, row, BLOCK_N)
            if K_FORMAT == "e2m1":
                k_scales = _tile(k_scale_ptr, page, stride_k_scale_page, offset, stride_k_scale_n, BLOCK_N)
        else:
            entry = (offs_n // page_size).to(tl.int64) * stride_table_page
            key_page = tl.load(table_ptr + entry, mask=offs_n < last, other=-1).to(tl.int64)  # [BLOCK_N]
            exists = (key_page >= 0) & (key_page < pages)
            key_offset = (offs_n % page_size).to(tl.int64)
            k_rows = k_ptr + key_page * stride_k_page + key_offset * stride_k_n
            if K_FORMAT is not None:
                k_scales = k_scale_ptr + key_page * stride_k_scale_page + key_offset * stride_k_scale_n
        k = _load_rows(
            k_rows[:, None],
            stride_k_d,
            k_scales[:, None] if K_FORMAT == "e2m1" else None,
            exists[:, None],
            D,
            BLOCK_D,
            DTYPE,
            K_FORMAT,
            NATIVE_FP8,
            FP8_PRODUCT,
        )  # [BLOCK_N, BLOCK_D]
        if q.dtype == tl.float32:  # as the second factor, all of q would be held in registers
            score = tl.trans(tl.dot(q, tl.trans(k), input_precision="ieee"))
        else:
            score = tl.dot(k, q_columns)  # [BLOCK_N, QUERIES * BLOCK_H]
        score = tl.maximum(score, 0.0, propagate_nan=tl.PropagateNan.ALL) * weights[None, :]
        if PADDED:  # a padded head scores 0 * inf = NaN against an infinite key: drop it after the product
            score = tl.where(real[None, :], score, 0.0)
        logits = tl.sum(tl.reshape(score, [BLOCK_N, QUERIES, BLOCK_H]), 2)  # [BLOCK_N, QUERIES]
        if SCALES_AHEAD:
            logits *= scales[:, None]
        elif K_FORMAT == "e4m3":
            logits *= tl.load(k_scales, mask=exists, other=0.0)[:, None]
        logits = tl.where(exists[:, None], logits, float("-inf"))
        tl.store(
            tl.trans(out_rows) + offs_n[:, None].to(tl.int64) * stride_out_n,
            logits,
            mask=(offs_n[:, None] >= starts[None, :]) & (offs_n[:, None] < stops[None, :]),
        )
        if ONE_PAGE:
            offset += BLOCK_N
            if WHOLE_TILES:
                turn = offset == page_size
                offset = tl.where(turn, 0, offset)
                table_ptr += tl.where(turn, stride_table_page, 0)
                page = tl.load(table_ptr, mask=n + BLOCK_N < end, other=-1)
            if SCALES_AHEAD:
                exists = _existing(page, pages, offs_n + BLOCK_N < last, WHOLE_TILES)
                scale_rows = _tile(k_scale_ptr, page, stride_k_scale_page, offset, stride_k_scale_n, BLOCK_N)
                scales = tl.load(scale_rows, mask=exists, other=0.0)


@triton.jit
def _tile(ptr, page, stride_page, offset, stride_n, BLOCK_N: tl.constexpr):
    """Pointers to neighbouring rows of a page: one address, and distances from it that all tiles share."""
    base = ptr + (page.to(tl.int64) * stride_page + offset.to(tl.int64) * stride_n)
    return base + tl.arange(0, BLOCK_N).to(tl.int64) * stride_n


@triton.jit
def _existing(page, pages, within, WHOLE_TILES: tl.constexpr):
    """Which keys of a tile exist. Pages that hold whole tiles hold all of a tile or nothing."""
    if WHOLE_TILES:
        page = tl.broadcast_to(page, within.shape)
        within = (page >= 0) & (page < pages)
    return within


@triton.jit
def _load_rows(
    rows,  # [n, 1] pointers to the first value
    stride_d,
    scales,  # [n, 1] pointers to the first scale of e2m1, or None
    mask,  # [n, 1]
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
    FORMAT: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    FP8_PRODUCT: tl.constexpr,
):
    """[n, BLOCK_D] in DTYPE, or in e4m3 for FP8_PRODUCT; zeros outside the mask."""
    if FORMAT == "e2m1":
        offs = tl.arange(0, BLOCK_D // 2).to(tl.int64)[None, :]
        groups = tl.arange(0, BLOCK_D // 32)[None, :]
        code = tl.load(rows + offs * stride_d, mask=mask, other=0)  # [n, BLOCK_D / 2]
        scale = tl.load(scales + groups, mask=mask, other=0)  # [n, BLOCK_D / 32]
        x = opaque(scaled(from_e2m1(code), from_ue8m0(scale)).to(DTYPE))
    else:
        offs_d = tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
        x = tl.load(rows + offs_d * stride_d, mask=mask & (offs_d < D), other=0)
        if FP8_PRODUCT:
            # wgmma then takes keys from registers: from shared memory it would need a fence for every tile.
            x = x.to(tl.float8e4nv, bitcast=True)
        elif FORMAT == "e4m3":
            x = opaque(from_e4m3(x, NATIVE_FP8).to(DTYPE))
    return x
