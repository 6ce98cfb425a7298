"""Sparse grouped-query attention: the query heads of a group attend to the selected rows of their kv head.

    score[h, n] = softmax_scale * q[t, h] . k[indices[t, g, n], g]      g = h // (h_q / h_kv)
    lse[t, h]   = log(sum_n exp(score[h, n]))
    out[t, h]   = sum_n exp(score[h, n]) * v[indices[t, g, n], g] / (exp(lse[t, h]) + exp(attn_sink[h]))

n runs over the valid entries of ``indices[t, g, :topk_length[t]]`` (0 <= index < s_kv); indices of shape
[s_q, topk] serve every kv head. When queries are few, several programs share the tiles of each, and their
partial results are merged in order.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from .configs import for_device, refuse_fp64, split_count
from .merge_attention import merge_parts
from .online_softmax import LOG2_E, add_tile, empty_softmax, result

if TYPE_CHECKING:
    from ..ops.attention import SparseGQAOp


class Config(NamedTuple):
    BLOCK_N: int
    num_warps: int
    num_stages: int
    SKIP_EMPTY: bool = False


# architecture -> heads a program (BLOCK_H) -> the rest. A stage holds BLOCK_N rows of k and of v: 64 KiB for
# 64 rows and d = d_v = 256. Tiles of 64 heads take two warpgroups, as one spills at d = 256; SKIP_EMPTY then
# puts the scores under an `if`, without which sm_90 computes all of them in both.
CONFIGS = {
    80: {16: Config(64, 4, 2), 32: Config(64, 4, 2)},  # 163 KiB
    86: {16: Config(32, 4, 2), 32: Config(32, 4, 2)},  # 99 KiB, also sm_89
    90: {16: Config(64, 4, 2), 32: Config(64, 4, 2), 64: Config(64, 8, 2, SKIP_EMPTY=True)},  # 227 KiB
    100: {16: Config(64, 4, 2), 32: Config(64, 4, 2), 64: Config(64, 8, 5)},  # 227 KiB
    120: {16: Config(32, 4, 2), 32: Config(32, 4, 2)},  # 99 KiB again
}
BLOCKS = 2  # that should share an SM: one gathers while the other computes
CONFIGS_FP32 = {80: {16: Config(16, 4, 2)}}  # rows of twice the size, IEEE products on the FMA units


def refuses(a: "SparseGQAOp") -> str | None:
    """Why these kernels cannot run ``a``, or None."""
    return refuse_fp64(a.q, a.k, a.v, a.attn_sink)


def sparse_gqa(a: "SparseGQAOp") -> None:
    """Fill out [s_q, h_q, d_v] and lse [s_q, h_q] from q [s_q, h_q, d], k [s_kv, h_kv, d] and v."""
    q, k, v, indices, softmax_scale, out, lse, topk_length, attn_sink = a
    s_q, h_q, d = q.shape
    s_kv, h_kv, d_v = v.shape
    if lse.numel() == 0:
        return
    if indices.dim() == 2:
        indices = indices[:, None].expand(-1, h_kv, -1)
    group = h_q // h_kv
    table = for_device(CONFIGS_FP32 if q.dtype == torch.float32 else CONFIGS, q.device)
    block_h = min((size for size in table if size >= group), default=max(table))
    config = table[block_h]
    programs = s_q * h_kv * triton.cdiv(group, block_h)
    tiles = triton.cdiv(indices.shape[2], config.BLOCK_N)
    splits = split_count(programs, tiles, config.BLOCK_N, q.device, BLOCKS)
    parts, part_lses = out[None], lse[None]
    if splits > 1:
        parts = torch.empty(splits, *out.shape, dtype=torch.float32, device=out.device)
        part_lses = torch.empty(splits, *lse.shape, dtype=torch.float32, device=out.device)
    sink = attn_sink if splits == 1 else None  # else it enters where the parts are merged
    with torch.cuda.device_of(q):
        _sparse_gqa_kernel[(programs, splits)](
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
            sink,
            0 if sink is None else sink.stride(0),
            parts,
            *parts.stride(),
            part_lses,
            *part_lses.stride(),
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
            SKIP_EMPTY=config.SKIP_EMPTY,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
        if splits > 1:
            merge_parts(parts, part_lses, out, lse, attn_sink)


@triton.jit(
    do_not_specialize=[
        *("stride_indices_t", "stride_indices_g", "stride_lse_i", "s_kv", "topk", "h_kv", "group"),
    ],
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
    stride_topk_length,
    attn_sink_ptr,  # [h_q] or None
    stride_attn_sink,
    out_ptr,  # [splits, s_q, h_q, d_v]
    stride_out_i,
    stride_out_t,
    stride_out_h,
    stride_out_d,
    lse_ptr,  # [splits, s_q, h_q]
    stride_lse_i,
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
    acc, row_max, row_sum, seen = empty_softmax(BLOCK_H, BLOCK_N, BLOCK_V)

    length = topk
    if topk_length_ptr is not None:
        length = tl.minimum(tl.maximum(tl.load(topk_length_ptr + t * stride_topk_length), 0), topk)
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
        acc, row_max, row_sum, seen = add_tile(
            acc, row_max, row_sum, seen, q, None, k, None, v, valid, scale_log2, SKIP_EMPTY, False
        )

    sink = None
    if attn_sink_ptr is not None:
        sink = tl.load(attn_sink_ptr + offs_h * stride_attn_sink, mask=head_ok, other=0.0)  # [BLOCK_H]
    out, lse, _ = result(acc, row_max, row_sum, seen, sink)  # [BLOCK_H, BLOCK_V], [BLOCK_H]
    out_ptr += split.to(tl.int64) * stride_out_i + t * stride_out_t
    lse_ptr += split.to(tl.int64) * stride_lse_i + t * stride_lse_t
    tl.store(
        out_ptr + offs_h[:, None] * stride_out_h + offs_v[None, :] * stride_out_d,
        out.to(out_ptr.dtype.element_ty),
        mask=head_ok[:, None] & (offs_v < D_V)[None, :],
    )
    tl.store(lse_ptr + offs_h * stride_lse_h, lse, mask=head_ok)
