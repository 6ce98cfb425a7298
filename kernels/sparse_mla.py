"""Sparse MLA: every head of a query attends to the selected rows of one latent cache.

    score[h, n] = softmax_scale * q[t, h] . kv[indices[t, n]]
    lse[t, h]   = log(sum_n exp(score[h, n]))
    out[t, h]   = sum_n exp(score[h, n]) * kv[indices[t, n], :d_v] / (exp(lse[t, h]) + exp(attn_sink[h]))

n runs over the valid entries of ``indices[t, :topk_length[t]]`` (0 <= index < s_kv), then over those of
an optional second segment. The latent row is the key, and its first d_v columns are the value: each tile
is gathered once and serves as both. Softmax is online and in base 2.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .configs import for_device

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the lowest finite fp32


class Config(NamedTuple):
    BLOCK_N: int
    num_warps: int
    num_stages: int
    SKIP_EMPTY: bool = False


# architecture -> heads a program (BLOCK_H) -> the rest, for d_v = 512 and a tail of 64. A stage holds BLOCK_N
# rows of 1152 bytes; the [BLOCK_H, 512] fp32 accumulator bounds BLOCK_H. None of these spills in its loop.
# SKIP_EMPTY puts the scores under an `if`, which also changes the layout that the compiler gives them. Tiles
# of 64 heads need it: else sm_90 computes every score in both warpgroups (72 wgmma, not 36) and spills, and
# sm_100 takes 281 KiB of shared memory.
CONFIGS = {
    80: {16: Config(64, 8, 2), 32: Config(64, 8, 2)},  # 163 KiB of shared memory; 64 heads would spill
    86: {16: Config(32, 4, 2)},  # 99 KiB, also sm_89
    90: {16: Config(64, 8, 3), 32: Config(64, 8, 3), 64: Config(64, 8, 2, SKIP_EMPTY=True)},  # 227 KiB
    100: {16: Config(64, 4, 2), 32: Config(64, 8, 2), 64: Config(64, 8, 2, SKIP_EMPTY=True)},  # 227 KiB
    120: {16: Config(32, 4, 2)},  # 99 KiB
}
CONFIGS_FP32 = {80: {16: Config(16, 8, 1)}}  # rows of twice the size, IEEE products on the FMA units


def sparse_mla(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    d_v: int,
    softmax_scale: float,
    topk_length: torch.Tensor | None,
    attn_sink: torch.Tensor | None,
    extra_kv: torch.Tensor | None,
    extra_indices: torch.Tensor | None,
    extra_topk_length: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Fill out [s_q, h_q, d_v] and lse [s_q, h_q] from q [s_q, h_q, d_qk] and the rows of kv [s_kv, d_qk]."""
    s_q, h_q, d_qk = q.shape
    if lse.numel() == 0:
        return
    table = for_device(CONFIGS_FP32 if q.dtype == torch.float32 else CONFIGS, q.device)
    block_h = min((size for size in table if size >= h_q), default=max(table))
    config = table[block_h]
    with torch.cuda.device_of(q):
        _sparse_mla_kernel[(s_q * triton.cdiv(h_q, block_h),)](
            q,
            *q.stride(),
            *_segment(kv, indices, topk_length),
            *_segment(extra_kv, extra_indices, extra_topk_length),
            attn_sink,
            0 if attn_sink is None else attn_sink.stride(0),
            out,
            *out.stride(),
            lse,
            *lse.stride(),
            h_q,
            softmax_scale * LOG2_E.value,
            D_V=d_v,
            D_TAIL=d_qk - d_v,
            BLOCK_H=block_h,
            BLOCK_N=config.BLOCK_N,
            BLOCK_V=max(16, triton.next_power_of_2(d_v)),
            BLOCK_TAIL=max(16, triton.next_power_of_2(d_qk - d_v)),
            SKIP_EMPTY=config.SKIP_EMPTY,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )


def _segment(kv, indices, topk_length) -> tuple:
    if kv is None:
        return (None, 0, 0, 0, None, 0, 0, 0, None, 0)
    return (
        kv,
        *kv.stride(),
        kv.shape[0],
        indices,
        *indices.stride(),
        indices.shape[1],
        topk_length,
        0 if topk_length is None else topk_length.stride(0),
    )


@triton.jit(
    do_not_specialize=[
        *("s_kv", "stride_indices_t", "topk", "extra_s_kv", "stride_extra_indices_t", "extra_topk", "h_q"),
    ]
)
def _sparse_mla_kernel(
    q_ptr,  # [s_q, h_q, d_qk]
    stride_q_t,
    stride_q_h,
    stride_q_d,
    kv_ptr,  # [s_kv, d_qk]
    stride_kv_n,
    stride_kv_d,
    s_kv,
    indices_ptr,  # [s_q, topk]
    stride_indices_t,
    stride_indices_n,
    topk,
    topk_length_ptr,  # [s_q] or None
    stride_topk_length,
    extra_kv_ptr,  # [extra_s_kv, d_qk] or None
    stride_extra_kv_n,
    stride_extra_kv_d,
    extra_s_kv,
    extra_indices_ptr,  # [s_q, extra_topk]
    stride_extra_indices_t,
    stride_extra_indices_n,
    extra_topk,
    extra_topk_length_ptr,  # [s_q] or None
    stride_extra_topk_length,
    attn_sink_ptr,  # [h_q] or None
    stride_attn_sink,
    out_ptr,  # [s_q, h_q, d_v]
    stride_out_t,
    stride_out_h,
    stride_out_d,
    lse_ptr,  # [s_q, h_q]
    stride_lse_t,
    stride_lse_h,
    h_q,
    scale_log2,  # softmax_scale * log2(e)
    D_V: tl.constexpr,
    D_TAIL: tl.constexpr,  # key columns past the value: d_qk - d_v
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    SKIP_EMPTY: tl.constexpr,
):
    """One program: one query, BLOCK_H heads. Neighbours share the query, and so its rows in L2."""
    head_blocks = tl.cdiv(h_q, BLOCK_H)
    t = (tl.program_id(0) // head_blocks).to(tl.int64)
    heads = ((tl.program_id(0) % head_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)  # [BLOCK_H]
    head_ok = heads < h_q
    offs_v = tl.arange(0, BLOCK_V).to(tl.int64)  # [BLOCK_V]
    offs_tail = D_V + tl.arange(0, BLOCK_TAIL).to(tl.int64)  # [BLOCK_TAIL]

    q_rows = q_ptr + t * stride_q_t + heads[:, None] * stride_q_h  # [BLOCK_H, 1]
    q = tl.load(
        q_rows + offs_v[None, :] * stride_q_d, mask=head_ok[:, None] & (offs_v < D_V)[None, :], other=0.0
    )  # [BLOCK_H, BLOCK_V]
    q_tail = tl.load(
        q_rows + offs_tail[None, :] * stride_q_d,
        mask=head_ok[:, None] & (offs_tail < D_V + D_TAIL)[None, :],
        other=0.0,
    )  # [BLOCK_H, BLOCK_TAIL]

    acc = tl.zeros([BLOCK_H, BLOCK_V], tl.float32)
    # Finite, so that a tile without a valid key never computes inf - inf.
    row_max = tl.full([BLOCK_H], LOWEST, tl.float32)
    row_sum = tl.zeros([BLOCK_H], tl.float32)
    seen = tl.zeros([BLOCK_N], tl.int1)

    length = topk
    if topk_length_ptr is not None:
        length = tl.minimum(tl.load(topk_length_ptr + t * stride_topk_length), topk)
    acc, row_max, row_sum, seen = _attend(
        acc, row_max, row_sum, seen, q, q_tail,
        kv_ptr, stride_kv_n, stride_kv_d, s_kv,
        indices_ptr + t * stride_indices_t, stride_indices_n, length, scale_log2,
        D_V, D_TAIL, BLOCK_H, BLOCK_N, BLOCK_V, BLOCK_TAIL, SKIP_EMPTY,
    )  # fmt: skip
    if extra_kv_ptr is not None:
        extra_length = extra_topk
        if extra_topk_length_ptr is not None:
            extra_length = tl.minimum(
                tl.load(extra_topk_length_ptr + t * stride_extra_topk_length), extra_topk
            )
        acc, row_max, row_sum, seen = _attend(
            acc, row_max, row_sum, seen, q, q_tail,
            extra_kv_ptr, stride_extra_kv_n, stride_extra_kv_d, extra_s_kv,
            extra_indices_ptr + t * stride_extra_indices_t, stride_extra_indices_n, extra_length, scale_log2,
            D_V, D_TAIL, BLOCK_H, BLOCK_N, BLOCK_V, BLOCK_TAIL, SKIP_EMPTY,
        )  # fmt: skip

    denominator = row_sum
    if attn_sink_ptr is not None:
        sink = tl.load(attn_sink_ptr + heads * stride_attn_sink, mask=head_ok, other=0.0)  # [BLOCK_H]
        denominator += tl.exp2(sink * LOG2_E - row_max)
    empty = tl.max(seen.to(tl.int32), 0) == 0
    out = tl.where(empty, 0.0, acc / denominator[:, None])  # [BLOCK_H, BLOCK_V]
    tl.store(
        out_ptr + t * stride_out_t + heads[:, None] * stride_out_h + offs_v[None, :] * stride_out_d,
        out.to(out_ptr.dtype.element_ty),
        mask=head_ok[:, None] & (offs_v < D_V)[None, :],
    )
    lse = (row_max + tl.log2(row_sum)) * LN_2  # [BLOCK_H]; log2(0) = -inf is the empty row
    tl.store(lse_ptr + t * stride_lse_t + heads * stride_lse_h, lse, mask=head_ok)


@triton.jit
def _attend(
    acc,  # [BLOCK_H, BLOCK_V]
    row_max,  # [BLOCK_H]
    row_sum,  # [BLOCK_H]
    seen,  # [BLOCK_N]: has this lane met a valid index
    q,  # [BLOCK_H, BLOCK_V]
    q_tail,  # [BLOCK_H, BLOCK_TAIL]
    kv_ptr,
    stride_kv_n,
    stride_kv_d,
    s_kv,
    indices_ptr,
    stride_indices_n,
    length,
    scale_log2,
    D_V: tl.constexpr,
    D_TAIL: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    SKIP_EMPTY: tl.constexpr,
):
    """Online softmax over one segment's indices."""
    offs_v = tl.arange(0, BLOCK_V).to(tl.int64)
    offs_tail = D_V + tl.arange(0, BLOCK_TAIL).to(tl.int64)
    for start in range(0, length, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        index = tl.load(
            indices_ptr + offs_n.to(tl.int64) * stride_indices_n, mask=offs_n < length, other=-1
        )  # [BLOCK_N]
        valid = (index >= 0) & (index < s_kv)
        seen |= valid
        # Rows that are not selected are not read: whatever they hold, 0 * NaN never happens.
        rows = kv_ptr + index.to(tl.int64)[:, None] * stride_kv_n  # [BLOCK_N, 1]
        value = tl.load(
            rows + offs_v[None, :] * stride_kv_d, mask=valid[:, None] & (offs_v < D_V)[None, :], other=0.0
        )  # [BLOCK_N, BLOCK_V]
        if D_TAIL > 0:
            tail = tl.load(
                rows + offs_tail[None, :] * stride_kv_d,
                mask=valid[:, None] & (offs_tail < D_V + D_TAIL)[None, :],
                other=0.0,
            )  # [BLOCK_N, BLOCK_TAIL]
        if SKIP_EMPTY:
            live = tl.max(valid.to(tl.int32), 0) > 0
        else:
            live: tl.constexpr = True
        if live:
            score = tl.dot(q, tl.trans(value), input_precision="ieee") * scale_log2  # [BLOCK_H, BLOCK_N]
            if D_TAIL > 0:
                # Scaled apart: chained into one product, sm_90 loses what SKIP_EMPTY wins.
                score += tl.dot(q_tail, tl.trans(tail), input_precision="ieee") * scale_log2
            score = tl.where(valid[None, :], score, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(score, 1))  # [BLOCK_H]
            p = tl.exp2(score - new_max[:, None])  # [BLOCK_H, BLOCK_N]
            tile_sum = tl.sum(p, 1)  # [BLOCK_H]
            p = p.to(value.dtype)
        else:
            # All zero, as no index is valid; a literal zero would take 8 KiB more shared memory.
            p = tl.broadcast_to(valid[None, :], [BLOCK_H, BLOCK_N]).to(value.dtype)
            new_max = row_max
            tile_sum = tl.zeros([BLOCK_H], tl.float32)
        alpha = tl.exp2(row_max - new_max)  # [BLOCK_H]
        row_sum = row_sum * alpha + tile_sum
        acc = tl.dot(p, value, acc * alpha[:, None], input_precision="ieee")
        row_max = new_max
    return acc, row_max, row_sum, seen
