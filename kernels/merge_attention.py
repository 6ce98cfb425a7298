"""Merge attention over disjoint sets of keys.

    lse[t, h] = log(sum_i exp(lses[i, t, h]))
    out[t, h] = sum_i exp(lses[i, t, h]) * outs[i, t, h] / (exp(lse[t, h]) + exp(attn_sink[h]))

summed in fp32 in the order of i. A part with lse = -inf counts for nothing; if all parts have it, out = 0 and
lse = -inf. Where parts come with their highest score, the kernel takes its maximum too.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .arguments import cdiv, next_power_of_2, refuse_fp64
from .online_softmax import LN_2, LOG2_E, LOWEST

if TYPE_CHECKING:
    from ..ops.attention import MergeAttentionOp

# Heads per program. Few: when the parts of one query are merged, heads are all that programs can share.
BLOCK_H = 2


def refuses(a: "MergeAttentionOp") -> str | None:
    """Why these kernels cannot run ``a``, or None."""
    return refuse_fp64(a.outs, a.lses)


def merge_attention(a: "MergeAttentionOp") -> None:
    """Fill out and lse."""
    merge_parts(a.outs.contiguous(), a.lses.contiguous(), a.out, a.lse)


def merge_parts(
    outs: torch.Tensor,
    lses: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    attn_sink: torch.Tensor | None = None,
    maxima: torch.Tensor | None = None,
    max_logits: torch.Tensor | None = None,
) -> None:
    """The same of contiguous parts, with a sink. Fill max_logits too, if given with maxima [n, s_q, h]."""
    n, s_q, h, d_v = outs.shape
    if lse.numel() == 0:
        return
    with torch.cuda.device_of(outs):
        _merge_attention_kernel[(s_q * cdiv(h, BLOCK_H),)](
            outs,
            lses,
            maxima,
            attn_sink,
            out,
            *out.stride(),
            lse,
            *lse.stride(),
            max_logits,
            *((0, 0) if max_logits is None else max_logits.stride()),
            n,
            s_q * h,
            h,
            D_V=d_v,
            BLOCK_H=BLOCK_H,
            BLOCK_V=next_power_of_2(d_v),
            num_warps=4,
            enable_fp_fusion=True,
        )


@triton.jit(do_not_specialize=["n", "part_rows", "h"])
def _merge_attention_kernel(
    outs_ptr,  # [n, s_q, h, d_v], contiguous, as the next two
    lses_ptr,  # [n, s_q, h]
    maxima_ptr,  # [n, s_q, h] or None
    attn_sink_ptr,  # [h] or None
    out_ptr,  # [s_q, h, d_v]
    stride_out_t,
    stride_out_h,
    stride_out_d,
    lse_ptr,  # [s_q, h]
    stride_lse_t,
    stride_lse_h,
    max_ptr,  # [s_q, h] or None
    stride_max_t,
    stride_max_h,
    n,
    part_rows,  # of a part: s_q * h
    h,
    D_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program: one query, BLOCK_H heads."""
    head_blocks = tl.cdiv(h, BLOCK_H)
    t = (tl.program_id(0) // head_blocks).to(tl.int64)
    offs_h = (tl.program_id(0) % head_blocks * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)  # [BLOCK_H]
    head_ok = offs_h < h
    offs_v = tl.arange(0, BLOCK_V).to(tl.int64)  # [BLOCK_V]
    lse_rows = lses_ptr + t * h + offs_h  # [BLOCK_H]: of the first part, as the next two
    out_rows = outs_ptr + t * h * D_V + offs_h[:, None] * D_V + offs_v[None, :]  # [BLOCK_H, BLOCK_V]
    max_rows = None
    if maxima_ptr is not None:
        max_rows = maxima_ptr + t * h + offs_h  # [BLOCK_H]

    acc = tl.zeros([BLOCK_H, BLOCK_V], tl.float32)
    top = tl.full([BLOCK_H], LOWEST, tl.float32)  # finite, as all that follow: never inf - inf
    total = tl.zeros([BLOCK_H], tl.float32)
    highest = tl.full([BLOCK_H], float("-inf"), tl.float32)
    step = tl.cast(part_rows, tl.int64)
    for skipped in tl.range(0, n * step, step, num_stages=4):  # in stages, so that the parts are prefetched
        part_lse = tl.load(lse_rows + skipped, mask=head_ok, other=float("-inf"))
        part = tl.load(
            out_rows + skipped * D_V, mask=head_ok[:, None] & (offs_v < D_V)[None, :], other=0.0
        )  # [BLOCK_H, BLOCK_V]
        part = tl.where((part_lse == float("-inf"))[:, None], 0.0, part.to(tl.float32))
        new_top = tl.minimum(tl.maximum(top, part_lse), -LOWEST)  # [BLOCK_H]
        weight, alpha = tl.exp2((part_lse - new_top) * LOG2_E), tl.exp2((top - new_top) * LOG2_E)
        total = total * alpha + weight
        acc = acc * alpha[:, None] + weight[:, None] * part
        top = new_top
        if max_rows is not None:
            part_max = tl.load(max_rows + skipped, mask=head_ok, other=float("-inf"))
            highest = tl.maximum(highest, part_max)  # [BLOCK_H]

    denominator = total
    if attn_sink_ptr is not None:
        sink = tl.load(attn_sink_ptr + offs_h, mask=head_ok, other=0.0)  # [BLOCK_H]
        denominator += tl.exp2((sink - top) * LOG2_E)
    out = tl.where((total == 0.0)[:, None], 0.0, acc / denominator[:, None])  # [BLOCK_H, BLOCK_V]
    tl.store(
        out_ptr + t * stride_out_t + offs_h[:, None] * stride_out_h + offs_v[None, :] * stride_out_d,
        out.to(out_ptr.dtype.element_ty),
        mask=head_ok[:, None] & (offs_v < D_V)[None, :],
    )
    tl.store(lse_ptr + t * stride_lse_t + offs_h * stride_lse_h, top + tl.log2(total) * LN_2, mask=head_ok)
    if max_ptr is not None:
        tl.store(max_ptr + t * stride_max_t + offs_h * stride_max_h, highest, mask=head_ok)
