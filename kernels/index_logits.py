"""Logits of the lightning indexer: how much each query wants each key.

    out[t, s] = sum_j weights[t, j] * relu(q[t, j] . k[s])   for ks[t] <= s < ke[t], else -inf

Keys are rows of k, or, with a block table, logical positions: position s of query t is row s % page_size
of page block_table[t // (s_q / n), s // page_size]. A page that does not exist gives -inf.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .configs import for_device

KEYS_PER_PROGRAM = 1024  # q is loaded once for so many keys; few enough that one decode query fills a GPU


class Config(NamedTuple):
    BLOCK_N: int
    num_warps: int
    num_stages: int


# All heads of a query are one tile: [BLOCK_H, BLOCK_D] x [BLOCK_D, BLOCK_N]. A stage holds BLOCK_N rows of
# 256 bytes (d = 128); the [BLOCK_H, BLOCK_N] fp32 scores of up to 128 heads stay in registers.
CONFIGS = {
    80: Config(64, 4, 3),
    90: Config(128, 8, 3),  # wgmma wants more work between its waits
}
CONFIGS_FP32 = {80: Config(32, 8, 2)}  # IEEE products on the FMA units


def index_logits(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    block_table: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Fill every element of out [s_q, width] from q [s_q, h, d] and k [s_kv, d] or [pages, page_size, d]."""
    s_q, h, d = q.shape
    width = out.shape[1]
    if s_q == 0 or width == 0:
        return
    if block_table is None:
        pages, page_size, stride_k_page, table_strides, queries_per_row = 0, 1, 0, (0, 0), 1
    else:
        pages, page_size, stride_k_page = k.shape[0], k.shape[1], k.stride(0)
        table_strides, queries_per_row = block_table.stride(), s_q // block_table.shape[0]
    config = for_device(CONFIGS_FP32 if q.dtype == torch.float32 else CONFIGS, q.device)
    with torch.cuda.device_of(q):
        _index_logits_kernel[(s_q * triton.cdiv(width, KEYS_PER_PROGRAM),)](
            q,
            *q.stride(),
            k,
            stride_k_page,
            *k.stride()[-2:],
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
            s_q,
            width,
            pages,
            page_size,
            queries_per_row,
            h,
            D=d,
            BLOCK_H=max(16, triton.next_power_of_2(h)),
            BLOCK_N=config.BLOCK_N,
            BLOCK_D=max(16, triton.next_power_of_2(d)),
            KEYS_PER_PROGRAM=KEYS_PER_PROGRAM,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )


@triton.jit(
    do_not_specialize=["stride_table_row", "stride_out_t", "s_q", "width", "pages", "queries_per_row", "h"]
)
def _index_logits_kernel(
    q_ptr,  # [s_q, h, d]
    stride_q_t,
    stride_q_h,
    stride_q_d,
    k_ptr,  # [s_kv, d], or [pages, page_size, d]
    stride_k_page,
    stride_k_n,
    stride_k_d,
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
    s_q,
    width,
    pages,
    page_size,
    queries_per_row,
    h,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEYS_PER_PROGRAM: tl.constexpr,
):
    """One program: one query, KEYS_PER_PROGRAM keys. Queries vary fastest: neighbours read the same keys."""
    t = (tl.program_id(0) % s_q).to(tl.int64)
    first = tl.program_id(0) // s_q * KEYS_PER_PROGRAM
    last = tl.minimum(first + KEYS_PER_PROGRAM, width)
    start = tl.maximum(tl.load(ks_ptr + t * stride_ks), first)
    stop = tl.minimum(tl.load(ke_ptr + t * stride_ke), last)
    out_row = out_ptr + t * stride_out_t

    for n in range(first, last, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        hidden = (offs_n < start) | (offs_n >= stop)
        tl.store(
            out_row + offs_n.to(tl.int64) * stride_out_n,
            tl.full([BLOCK_N], float("-inf"), tl.float32),
            mask=hidden & (offs_n < last),
        )

    offs_h = tl.arange(0, BLOCK_H).to(tl.int64)  # [BLOCK_H]
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)  # [BLOCK_D]
    q = tl.load(
        q_ptr + t * stride_q_t + offs_h[:, None] * stride_q_h + offs_d[None, :] * stride_q_d,
        mask=(offs_h < h)[:, None] & (offs_d < D)[None, :],
        other=0.0,
    )  # [BLOCK_H, BLOCK_D]
    weights = tl.load(
        weights_ptr + t * stride_weights_t + offs_h * stride_weights_h, mask=offs_h < h, other=0.0
    )  # [BLOCK_H]

    for n in range(start // BLOCK_N * BLOCK_N, stop, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        visible = (offs_n >= start) & (offs_n < stop)
        exists = visible
        if table_ptr is None:
            rows = offs_n.to(tl.int64) * stride_k_n  # [BLOCK_N]
        else:
            page = tl.load(
                table_ptr
                + t // queries_per_row * stride_table_row
                + (offs_n // page_size).to(tl.int64) * stride_table_page,
                mask=visible,
                other=-1,
            )  # [BLOCK_N]
            exists = (page >= 0) & (page < pages)
            rows = page.to(tl.int64) * stride_k_page + (offs_n % page_size).to(tl.int64) * stride_k_n
        k = tl.load(
            k_ptr + rows[:, None] + offs_d[None, :] * stride_k_d,
            mask=exists[:, None] & (offs_d < D)[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_D]
        score = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_H, BLOCK_N]
        score = tl.maximum(score, 0.0, propagate_nan=tl.PropagateNan.ALL) * weights[:, None]
        # A padded head scores 0 * inf = NaN against an infinite key: drop it after the product.
        score = tl.where((offs_h < h)[:, None], score, 0.0)
        logits = tl.where(exists, tl.sum(score, 0), float("-inf"))  # [BLOCK_N]
        tl.store(out_row + offs_n.to(tl.int64) * stride_out_n, logits, mask=visible)
