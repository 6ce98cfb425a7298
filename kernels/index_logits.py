"""Logits of the lightning indexer: how much each query wants each key.

    out[t, s] = sum_j weights[t, j] * relu(q[t, j] . k[s])   for ks[t] <= s < ke[t], else -inf

Keys are rows of k, or, with a block table, logical positions: position s of query t is row s % page_size
of page block_table[t // (s_q / n), s // page_size]. A page that does not exist gives -inf.

Quantised operands: the scale of an e4m3 key multiplies the sum, not the key. Where q and k are both e4m3 and
the GPU multiplies e4m3, the product takes their bytes as they are; otherwise they are decoded before it. e2m1
has one scale per 32 values: values times scales are computed in registers, exactly, for a product in bf16.

A program takes several neighbouring queries that share a row of the block table. All their heads are one side
of the product and a tile of keys is the other, so each key is read and decoded once for all of them.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .arguments import refuse_fp64
from .configs import (
    INDEX_LOGITS,
    INDEX_LOGITS_FP32,
    INDEX_LOGITS_FP32_QUANTISED,
    INDEX_LOGITS_QUANTISED,
    for_device,
    has_native_fp8,
)
from .quantised import from_e2m1, from_e4m3, opaque

if TYPE_CHECKING:
    from ..ops.index import IndexLogitsOp

KEYS_PER_PROGRAM = 1024  # q is loaded once for so many keys; few enough that one decode query fills a GPU
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
    q_format, k_format = FORMATS.get(a.q.dtype), FORMATS.get(a.k.dtype)
    d = 2 * d if q_format == "e2m1" else d
    # sm_80 has no name for e4m3.
    q, k = (x if form is None else x.view(torch.uint8) for x, form in ((a.q, q_format), (a.k, k_format)))
    pages, page_size, queries_per_row, table_strides = 0, 1, s_q, (0, 0)
    if a.block_table is not None:
        pages, page_size = k.shape[:2]
        queries_per_row, table_strides = s_q // a.block_table.shape[0], a.block_table.stride()
    if q.dtype == torch.float32:
        table = INDEX_LOGITS_FP32 if k_format is None else INDEX_LOGITS_FP32_QUANTISED
    else:
        table = INDEX_LOGITS if k_format is None else INDEX_LOGITS_QUANTISED
    config = for_device(table, q.device)
    block_h = max(16, triton.next_power_of_2(h))
    queries = max(1, config.MAX_HEADS // block_h) if queries_per_row > 1 else 1  # no third variant to compile
    groups = s_q // queries_per_row * triton.cdiv(queries_per_row, queries)
    with torch.cuda.device_of(q):
        _index_logits_kernel[(groups * triton.cdiv(width, KEYS_PER_PROGRAM),)](
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
            a.out,
            *a.out.stride(),
            width,
            pages,
            page_size,
            queries_per_row,
            h,
            D=d,
            QUERIES=queries,
            BLOCK_H=block_h,
            BLOCK_N=config.BLOCK_N,
            BLOCK_D=max(16 if k_format is None else 32, triton.next_power_of_2(d)),  # of bf16, of e4m3
            KEYS_PER_PROGRAM=KEYS_PER_PROGRAM,
            PADDED=block_h != h,
            Q_FORMAT=q_format,
            K_FORMAT=k_format,
            NATIVE_FP8=has_native_fp8(q.device),
            CLEAN=a.clean,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )


def _page_strides(x, block_table) -> tuple:
    """Those of [pages, page_size, ...]; without a block table x is [s_kv, ...] and counts as one page."""
    if x is None:
        return (0, 0)
    return x.stride() if block_table is not None else (0, *x.stride())


@triton.jit(do_not_specialize=["stride_table_row", "stride_out_t", "width", "pages", "queries_per_row", "h"])
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
    table_ptr,  # [s_q / queries_per_row, max_pages], or None
    stride_table_row,
    stride_table_page,
    out_ptr,  # [s_q, width]
    stride_out_t,
    stride_out_n,
    width,
    pages,
    page_size,
    queries_per_row,
    h,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEYS_PER_PROGRAM: tl.constexpr,
    PADDED: tl.constexpr,  # heads: BLOCK_H > h
    Q_FORMAT: tl.constexpr,  # None, "e4m3" or "e2m1"
    K_FORMAT: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    CLEAN: tl.constexpr,
):
    """One program: QUERIES queries, KEYS_PER_PROGRAM keys. Queries vary fastest: neighbours share keys."""
    groups_per_row = tl.cdiv(queries_per_row, QUERIES)
    groups = tl.num_programs(0) // tl.cdiv(width, KEYS_PER_PROGRAM)
    group = tl.program_id(0) % groups
    table_row = (group // groups_per_row).to(tl.int64)
    member = group % groups_per_row * QUERIES + tl.arange(0, QUERIES)  # [QUERIES]: query within the table row
    live = member < queries_per_row
    offs_t = table_row * queries_per_row + member  # [QUERIES]
    first = tl.program_id(0) // groups * KEYS_PER_PROGRAM
    last = tl.minimum(first + KEYS_PER_PROGRAM, width)
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
    query = group % groups_per_row * QUERIES + offs_r // BLOCK_H
    real = (query < queries_per_row) & (head < h)
    query = table_row * queries_per_row + query
    q_rows = q_ptr + (query[:, None] * stride_q_t + head[:, None] * stride_q_h)
    q_scales = None
    if Q_FORMAT == "e2m1":
        q_scales = q_scale_ptr + (query[:, None] * stride_q_scale_t + head[:, None] * stride_q_scale_h)
    # e4m3 stays e4m3 for a product of both.
    FP8_PRODUCT: tl.constexpr = NATIVE_FP8 and Q_FORMAT == "e4m3" and K_FORMAT == "e4m3"
    BF16: tl.constexpr = tl.bfloat16
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty if Q_FORMAT is None else BF16
    q = _load_rows(
        q_rows, stride_q_d, q_scales, real[:, None], D, BLOCK_D, DTYPE, Q_FORMAT, NATIVE_FP8, FP8_PRODUCT
    )  # [QUERIES * BLOCK_H, BLOCK_D]
    weights = tl.load(
        weights_ptr + query * stride_weights_t + head * stride_weights_h, mask=real, other=0.0
    )  # [QUERIES * BLOCK_H]

    # Of queries that see nothing here, the range is empty.
    begin = tl.min(tl.where(starts < stops, starts, last), 0) // BLOCK_N * BLOCK_N
    for n in range(begin, tl.max(stops, 0), BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        exists = offs_n < last
        if table_ptr is None:
            page = tl.zeros([BLOCK_N], tl.int64)
            offset = offs_n.to(tl.int64)
        else:
            page = tl.load(
                table_ptr
                + table_row * stride_table_row
                + (offs_n // page_size).to(tl.int64) * stride_table_page,
                mask=exists,
                other=-1,
            ).to(tl.int64)  # [BLOCK_N]
            exists = (page >= 0) & (page < pages)
            offset = (offs_n % page_size).to(tl.int64)
        k_rows = k_ptr + (page * stride_k_page + offset * stride_k_n)[:, None]
        k_scales = None
        if K_FORMAT is not None:
            k_scales = k_scale_ptr + (page * stride_k_scale_page + offset * stride_k_scale_n)[:, None]
        k = _load_rows(
            k_rows,
            stride_k_d,
            k_scales,
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
            score = tl.dot(k, tl.trans(q))  # [BLOCK_N, QUERIES * BLOCK_H]
        score = tl.maximum(score, 0.0, propagate_nan=tl.PropagateNan.ALL) * weights[None, :]
        if PADDED:  # a padded head scores 0 * inf = NaN against an infinite key: drop it after the product
            score = tl.where(real[None, :], score, 0.0)
        logits = tl.trans(tl.sum(tl.reshape(score, [BLOCK_N, QUERIES, BLOCK_H]), 2))  # [QUERIES, BLOCK_N]
        if K_FORMAT == "e4m3":
            logits *= tl.trans(tl.load(k_scales, mask=exists[:, None], other=0.0))
        logits = tl.where(exists[None, :], logits, float("-inf"))
        tl.store(
            out_rows + offs_n[None, :].to(tl.int64) * stride_out_n,
            logits,
            mask=(offs_n[None, :] >= starts[:, None]) & (offs_n[None, :] < stops[:, None]),
        )


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
        x = opaque(from_e2m1(code, scale).to(DTYPE))
    else:
        offs_d = tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
        x = tl.load(rows + offs_d * stride_d, mask=mask & (offs_d < D), other=0)
        if FP8_PRODUCT:
            x = x.to(tl.float8e4nv, bitcast=True)
        elif FORMAT == "e4m3":
            x = opaque(from_e4m3(x, NATIVE_FP8).to(DTYPE))
    return x
