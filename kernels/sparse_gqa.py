"""Sparse grouped-query attention: the query heads of a group attend to the selected rows of their kv head.

    score[h, n] = softmax_scale * q[t, h] . k[indices[t, g, n], g]      g = h // (h_q / h_kv)
    lse[t, h]   = log(sum_n exp(score[h, n]))
    out[t, h]   = sum_n exp(score[h, n]) * v[indices[t, g, n], g] / (exp(lse[t, h]) + exp(attn_sink[h]))

n runs over the valid entries of ``indices[t, g, :topk_length[t]]`` (0 <= index < s_kv); indices of shape
[s_q, topk] serve every kv head. Softmax is online and in base 2.
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
    MAX_BLOCK_H: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


# A stage holds BLOCK_N rows of k and of v: 64 KiB for 64 rows and d = d_v = 256.
CONFIGS = {
    80: Config(32, 64, 4, 2),  # 163 KiB
    86: Config(32, 32, 4, 2),  # 99 KiB, also sm_89
    90: Config(64, 64, 4, 2),  # 227 KiB
    120: Config(32, 32, 4, 2),  # 99 KiB again
}
CONFIGS_FP32 = {80: Config(16, 16, 4, 2)}  # rows of twice the size, IEEE products on the FMA units


def sparse_gqa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    softmax_scale: float,
    topk_length: torch.Tensor | None,
    attn_sink: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Fill out [s_q, h_q, d_v] and lse [s_q, h_q] from q [s_q, h_q, d], k [s_kv, h_kv, d] and v."""
    s_q, h_q, d = q.shape
    s_kv, h_kv, d_v = v.shape
    if lse.numel() == 0:
        return
    if indices.dim() == 2:
        indices = indices[:, None].expand(-1, h_kv, -1)
    group = h_q // h_kv
    config = for_device(CONFIGS_FP32 if q.dtype == torch.float32 else CONFIGS, q.device)
    block_h = min(max(16, triton.next_power_of_2(group)), config.MAX_BLOCK_H)
    with torch.cuda.device_of(q):
        _sparse_gqa_kernel[(s_q * h_kv * triton.cdiv(group, block_h),)](
            q,
            *q.stride(),
            k,
            *k.stride(),
            v,
            *v.stride(),
            indices,
            *indices.stride(),
            topk_length,
            0 if topk_length is None else topk_length.stride(0),
            attn_sink,
            0 if attn_sink is None else attn_sink.stride(0),
            out,
            *out.stride(),
            lse,
            *lse.stride(),
            s_kv,
            indices.shape[2],
            h_kv,
            group,
            softmax_scale * LOG2_E.value,
            D=d,
            D_V=d_v,
            BLOCK_H=block_h,
            BLOCK_N=config.BLOCK_N,
            BLOCK_D=max(16, triton.next_power_of_2(d)),
            BLOCK_V=max(16, triton.next_power_of_2(d_v)),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )


@triton.jit(do_not_specialize=["stride_indices_t", "stride_indices_g", "s_kv", "topk", "h_kv", "group"])
def _sparse_gqa_kernel(
    q_ptr,  # [s_q, h_q, d]
    stride_q_t,
    stride_q_h,
    stride_q_d,
    k_ptr,  # [s_kv, h_kv, d]
    stride_k_n,
    stride_k_g,
    stride_k_d,
    v_ptr,  # [s_kv, h_kv, d_v]
    stride_v_n,
    stride_v_g,
    stride_v_d,
    indices_ptr,  # [s_q, h_kv, topk]
    stride_indices_t,
    stride_indices_g,
    stride_indices_n,
    topk_length_ptr,  # [s_q] or None
    stride_topk_length,
    attn_sink_ptr,  # [h_q] or None
    stride_attn_sink,
    out_ptr,  # [s_q, h_q, d_v]
    stride_out_t,
    stride_out_h,
    stride_out_d,
    lse_ptr,  # [s_q, h_q]
    stride_lse_t,
    stride_lse_h,
    s_kv,
    topk,
    h_kv,
    group,  # query heads a kv head
    scale_log2,  # softmax_scale * log2(e)
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program: one query, one kv head, BLOCK_H query heads of its group."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(group, BLOCK_H)
    t = (pid // (blocks * h_kv)).to(tl.int64)
    g = (pid // blocks % h_kv).to(tl.int64)
    member = pid % blocks * BLOCK_H + tl.arange(0, BLOCK_H)  # [BLOCK_H]: head within the group
    head_ok = member < group
    offs_h = g * group + member  # [BLOCK_H]
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)  # [BLOCK_D]
    offs_v = tl.arange(0, BLOCK_V).to(tl.int64)  # [BLOCK_V]

    q = tl.load(
        q_ptr + t * stride_q_t + offs_h[:, None] * stride_q_h + offs_d[None, :] * stride_q_d,
        mask=head_ok[:, None] & (offs_d < D)[None, :],
        other=0.0,
    )  # [BLOCK_H, BLOCK_D]
    acc = tl.zeros([BLOCK_H, BLOCK_V], tl.float32)
    # Finite, so that a tile without a valid key never computes inf - inf.
    row_max = tl.full([BLOCK_H], LOWEST, tl.float32)
    row_sum = tl.zeros([BLOCK_H], tl.float32)
    seen = tl.zeros([BLOCK_N], tl.int1)  # has this lane met a valid index

    length = topk
    if topk_length_ptr is not None:
        length = tl.minimum(tl.load(topk_length_ptr + t * stride_topk_length), topk)
    indices_row = indices_ptr + t * stride_indices_t + g * stride_indices_g
    for start in range(0, length, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        index = tl.load(
            indices_row + offs_n.to(tl.int64) * stride_indices_n, mask=offs_n < length, other=-1
        ).to(tl.int64)  # [BLOCK_N]
        valid = (index >= 0) & (index < s_kv)
        seen |= valid
        # Rows that are not selected are not read: whatever they hold, 0 * NaN never happens.
        k = tl.load(
            k_ptr + g * stride_k_g + index[:, None] * stride_k_n + offs_d[None, :] * stride_k_d,
            mask=valid[:, None] & (offs_d < D)[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_D]
        v = tl.load(
            v_ptr + g * stride_v_g + index[:, None] * stride_v_n + offs_v[None, :] * stride_v_d,
            mask=valid[:, None] & (offs_v < D_V)[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_V]
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2  # [BLOCK_H, BLOCK_N]
        score = tl.where(valid[None, :], score, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(score, 1))  # [BLOCK_H]
        alpha = tl.exp2(row_max - new_max)  # [BLOCK_H]
        p = tl.exp2(score - new_max[:, None])  # [BLOCK_H, BLOCK_N]
        row_sum = row_sum * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        row_max = new_max

    denominator = row_sum
    if attn_sink_ptr is not None:
        sink = tl.load(attn_sink_ptr + offs_h * stride_attn_sink, mask=head_ok, other=0.0)  # [BLOCK_H]
        denominator += tl.exp2(sink * LOG2_E - row_max)
    empty = tl.max(seen.to(tl.int32), 0) == 0
    out = tl.where(empty, 0.0, acc / denominator[:, None])  # [BLOCK_H, BLOCK_V]
    tl.store(
        out_ptr + t * stride_out_t + offs_h[:, None] * stride_out_h + offs_v[None, :] * stride_out_d,
        out.to(out_ptr.dtype.element_ty),
        mask=head_ok[:, None] & (offs_v < D_V)[None, :],
    )
    lse = (row_max + tl.log2(row_sum)) * LN_2  # [BLOCK_H]; log2(0) = -inf is the empty row
    tl.store(lse_ptr + t * stride_lse_t + offs_h * stride_lse_h, lse, mask=head_ok)
