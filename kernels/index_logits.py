"""Logits of the lightning indexer: how much each query wants each key.

    out[t, s] = sum_j weights[t, j] * relu(q[t, j] . k[s])   for ks[t] <= s < ke[t], else -inf

Keys are rows of k, or, with a block table, logical positions: position s of query t is row s % page_size
of page block_table[t // (s_q / n), s // page_size]. A page that does not exist gives -inf.

Quantised operands: the scale of an e4m3 key multiplies the sum, so that e4m3 goes into the product as it is,
into one of e4m3 where both sides have it and the GPU knows it. e2m1 has a scale for 32 values: values times
scales are made in registers, exactly, for a product in bf16.

A program takes several neighbouring queries that share a row of the block table. All their heads are one side
of the product, a tile of keys is the other, so that each key is read and decoded once for all of them.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from .configs import for_device, has_native_fp8, refuse_fp64
from .quantised import from_e2m1, from_e4m3, opaque

if TYPE_CHECKING:
    from ..ops.index import IndexLogitsOp

KEYS_PER_PROGRAM = 1024  # q is loaded once for so many keys; few enough that one decode query fills a GPU


class Config(NamedTuple):
    MAX_HEADS: int  # of all queries of a program
    BLOCK_N: int
    num_warps: int
    num_stages: int


# Keys are the rows of the product (M), so that heads are added up within few threads. A stage holds BLOCK_N
# keys, 32 KiB in bf16, beside 32 KiB of q; the [BLOCK_N, MAX_HEADS] fp32 scores stay in registers.
CONFIGS = {
    80: Config(128, 128, 8, 3),  # 163 KiB of shared memory
    86: Config(128, 128, 8, 2),  # 99 KiB, also sm_89
    90: Config(128, 128, 8, 3),  # 227 KiB
    120: Config(128, 128, 8, 2),  # 99 KiB
}
# Without e4m3 instructions the decoding takes registers: half of the keys, in two programs an SM.
CONFIGS_QUANTISED = {80: Config(128, 64, 4, 3), 89: Config(128, 128, 8, 3)}
CONFIGS_FP32 = {80: Config(64, 32, 8, 2)}  # IEEE products on the FMA units
CONFIGS_FP32_QUANTISED = {80: Config(64, 16, 8, 1)}  # for which decoded keys stay in registers: a short tile
FORMATS = {torch.float8_e4m3fn: "e4m3", torch.uint8: "e2m1"}


def refuses(a: "IndexLogitsOp") -> str | None:
    """Why these kernels cannot run ``a``, or None."""
    if a.q.dtype == torch.float16 and a.k.dtype == torch.uint8:  # a value times its scale need not fit
        return "q: expected bfloat16 or float32, as k is e2m1, got float16 (triton backend)"
    return refuse_fp64(a.q, a.k, a.weights)


def index_logits(a: "IndexLogitsOp") -> None:
    """Fill out [s_q, width] from q [s_q, h, d] and k [s_kv, d], or pages [pages, page_size, d].

    Without ``clean``, elements outside the range are left as they are.
    """
    q, k, weights, ks, ke, out = a[:6]
    q_scale, k_scale, block_table, clean = a[6:]
    s_q, h, d = q.shape
    width = out.shape[1]
    if s_q == 0 or width == 0:
        return
    q_format, k_format = FORMATS.get(q.dtype), FORMATS.get(k.dtype)
    d = 2 * d if q_format == "e2m1" else d
    # sm_80 has no name for e4m3.
    q, k = (x if form is None else x.view(torch.uint8) for x, form in ((q, q_format), (k, k_format)))
    q_scale_strides = (0, 0) if q_scale is None else q_scale.stride()[:2]
    if block_table is None:
        pages, page_size, stride_k_page, table_strides, queries_per_row = 0, 1, 0, (0, 0), s_q
    else:
        pages, page_size, stride_k_page = k.shape[0], k.shape[1], k.stride(0)
        table_strides, queries_per_row = block_table.stride(), s_q // block_table.shape[0]
    k_scale_strides = (0, 0)
    if k_scale is not None:
        k_scale_strides = (0, k_scale.stride(0)) if block_table is None else k_scale.stride()[:2]
    if q.dtype == torch.float32:
        table = CONFIGS_FP32 if k_format is None else CONFIGS_FP32_QUANTISED
    else:
        table = CONFIGS if k_format is None else CONFIGS_QUANTISED
    config = for_device(table, q.device)
    block_h = max(16, triton.next_power_of_2(h))
    queries = max(1, config.MAX_HEADS // block_h) if queries_per_row > 1 else 1  # no third variant to compile
    groups = s_q // queries_per_row * triton.cdiv(queries_per_row, queries)
    with torch.cuda.device_of(q):
        _index_logits_kernel[(groups * triton.cdiv(width, KEYS_PER_PROGRAM),)](
            q,
            *q.stride(),
            q_scale,
            *q_scale_strides,
            k,
            stride_k_page,
            *k.stride()[-2:],
            k_scale,
            *k_scale_strides,
            weights,
            *weights.stride(),
            ks,
            ks.stride(0),
            ke,
            ke.stride(0),
            block_table,
            *table_strides,
            out,
            *out.stride(),
            groups,
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
            CLEAN=clean,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )


@triton.jit(
    do_not_specialize=["stride_table_row", "stride_out_t", "groups", "width", "pages", "queries_per_row", "h"]
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
    stride_ks,
    ke_ptr,  # [s_q]
    stride_ke,
    table_ptr,  # [s_q / queries_per_row, max_pages], or None
    stride_table_row,
    stride_table_page,
    out_ptr,  # [s_q, width]
    stride_out_t,
    stride_out_n,
    groups,
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
    group = tl.program_id(0) % groups
    table_row = (group // groups_per_row).to(tl.int64)
    member = group % groups_per_row * QUERIES + tl.arange(0, QUERIES)  # [QUERIES]: query within the table row
    live = member < queries_per_row
    offs_t = table_row * queries_per_row + member  # [QUERIES]
    first = tl.program_id(0) // groups * KEYS_PER_PROGRAM
    last = tl.minimum(first + KEYS_PER_PROGRAM, width)
    starts = tl.maximum(tl.load(ks_ptr + offs_t * stride_ks, mask=live, other=0), first)  # [QUERIES]
    stops = tl.minimum(tl.load(ke_ptr + offs_t * stride_ke, mask=live, other=0), last)  # [QUERIES]
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
