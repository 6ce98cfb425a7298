"""Sparse grouped-query attention: the query heads of a group attend to the selected rows of their kv head.

    score[h, n] = softmax_scale * q[t, h] . k[indices[t, g, n], g]      g = h // (h_q / h_kv)
    lse[t, h]   = log(sum_n exp(score[h, n]))
    out[t, h]   = sum_n exp(score[h, n]) * v[indices[t, g, n], g] / (exp(lse[t, h]) + exp(attn_sink[h]))

n runs over the valid entries of ``indices[t, g, :topk_length[t]]`` (0 <= index < s_kv); indices of shape
[s_q, topk] serve every kv head. When queries are few, several programs share the tiles of each, and their
partial results are merged in order.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .arguments import cdiv, contiguous, in_launches, next_power_of_2, refuse_fp64
from .configs import SPARSE_GQA, SPARSE_GQA_FP32, Tiling, attention_tiling
from .merge_attention import merge_parts
from .online_softmax import LOG2_E, add_tile, empty_softmax, result, row_length

if TYPE_CHECKING:
    from ..ops.attention import SparseGQAOp


def refuses(a: "SparseGQAOp") -> str | None:
    """Why these kernels cannot run ``a``, or None."""
    return refuse_fp64(a.q, a.k, a.v, a.attn_sink)


def sparse_gqa(a: "SparseGQAOp") -> None:
    """Fill out and lse."""
    if a.lse.numel() == 0:
        return
    (s_q, h_q, _), h_kv = a.q.shape, a.v.shape[1]
    table = SPARSE_GQA_FP32 if a.q.dtype == torch.float32 else SPARSE_GQA
    topks = [a.indices.shape[-1]]
    tiling = attention_tiling(table, s_q, h_kv, h_q // h_kv, topks, a.q.device, a.batch_invariant)
    for part, splits in in_launches(a, tiling.launches):
        _launch(part, splits, tiling)


def _launch(a: "SparseGQAOp", splits: int, tiling: Tiling) -> None:
    block_h, config, _ = tiling
    s_q, h_q, d = a.q.shape
    s_kv, h_kv, d_v = a.v.shape
    group = h_q // h_kv
    indices = a.indices
    if indices.dim() == 2:
        indices = indices[:, None].expand(-1, h_kv, -1)
    topk = indices.shape[2]
    out, lse, sink = a.out, a.lse, contiguous(a.attn_sink)
    if splits > 1:
        out = out.new_empty(splits, *out.shape, dtype=torch.float32)
        lse = lse.new_empty(splits, *lse.shape)
    with torch.cuda.device_of(a.q):
        _sparse_gqa_kernel[(s_q * h_kv * cdiv(group, block_h), splits)](
            a.q,
            *a.q.stride(),
            a.k,
            *a.k.stride(),
            a.v,
            *a.v.stride(),
            indices,
            *indices.stride(),
            contiguous(a.topk_length),
            sink if splits == 1 else None,  # else it enters where the parts are merged
            out,
            *out.stride()[-3:],
            lse,
            *lse.stride()[-2:],
            s_q,
            s_kv,
            topk,
            h_kv,
            group,
            a.softmax_scale * LOG2_E.value,
            D=d,
            D_V=d_v,
            BLOCK_H=block_h,
            BLOCK_N=config.BLOCK_N,
            BLOCK_D=max(16, next_power_of_2(d)),
            BLOCK_V=max(16, next_power_of_2(d_v)),
            SKIP_EMPTY=config.SKIP_EMPTY,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
        if splits > 1:
            merge_parts(out, lse, a.out, a.lse, sink)


@triton.jit(
    do_not_specialize=["stride_indices_t", "stride_indices_g", "s_q", "s_kv", "topk", "h_kv", "group"],
    do_not_specialize_on_alignment=["indices_ptr", "topk_length_ptr", "lse_ptr"],
)
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
    attn_sink_ptr,  # [h_q] or None
    out_ptr,  # [s_q, h_q, d_v]; of several splits contiguous [splits, s_q, h_q, d_v], as lse
    stride_out_t,
    stride_out_h,
    stride_out_d,
    lse_ptr,  # [s_q, h_q]
    stride_lse_t,
    stride_lse_h,
    s_q,
    s_kv,
    topk,
    h_kv,
    group,  # query heads per kv head
    scale_log2,  # softmax_scale * log2(e)
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SKIP_EMPTY: tl.constexpr,
):
    """One program: one query, one kv head, BLOCK_H query heads of its group, a share of the tiles."""
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
    softmax = empty_softmax(BLOCK_H, BLOCK_N, BLOCK_V)

    length = row_length(topk, topk_length_ptr, t)
    split = tl.program_id(1)
    share = tl.cdiv(tl.cdiv(length, BLOCK_N), tl.num_programs(1)) * BLOCK_N
    stop = tl.minimum((split + 1) * share, length)
    offs_n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    tile_indices = (
        indices_ptr + t * stride_indices_t + g * stride_indices_g + offs_n.to(tl.int64) * stride_indices_n
    )
    for n in range(split * share, stop, BLOCK_N):
        index = tl.load(
            tile_indices + tl.cast(n, tl.int64) * stride_indices_n, mask=offs_n < stop - n, other=-1
        ).to(tl.uint32)  # [BLOCK_N]
        valid = index < s_kv.to(tl.uint32)  # negative ones are huge
        index = index.to(tl.int64)
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
        softmax = add_tile(softmax, q, None, k, None, v, valid, scale_log2, SKIP_EMPTY, False)

    sink = None
    if attn_sink_ptr is not None:
        sink = tl.load(attn_sink_ptr + offs_h, mask=head_ok, other=0.0)  # [BLOCK_H]
    out, lse, _ = result(softmax, sink)  # [BLOCK_H, BLOCK_V], [BLOCK_H]
    row = t + split.to(tl.int64) * s_q  # of out and lse
    tl.store(
        out_ptr + row * stride_out_t + offs_h[:, None] * stride_out_h + offs_v[None, :] * stride_out_d,
        out.to(out_ptr.dtype.element_ty),
        mask=head_ok[:, None] & (offs_v < D_V)[None, :],
    )
    tl.store(lse_ptr + row * stride_lse_t + offs_h * stride_lse_h, lse, mask=head_ok)
