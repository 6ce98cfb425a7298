"""fp8 index queries.

    out[t, j], scale = quantise(Hadamard(RoPE(q[t, j])))
    out_weights[t, j] = weights[t, j] * scale

RoPE of the leading dimensions where there is a cosine, the Hadamard matrix on demand, one scale per head.
Everything in fp32, rounded once.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .arguments import cdiv, refuse_fp64, rotation
from .index_rows import turn_rows
from .quantised import quantise_e4m3
from .rotate import partner

if TYPE_CHECKING:
    from ..ops.writers import QuantiseIndexQOp

ROWS = 8  # heads per program, two per warp


def refuses(a: "QuantiseIndexQOp") -> str | None:
    """Why these kernels cannot run ``a``, or None."""
    return refuse_fp64(a.q, a.weights)


def quantise_index_q(a: "QuantiseIndexQOp") -> None:
    """Fill out, bytes of e4m3, and out_weights."""
    s_q, h, d = a.q.shape
    if s_q == 0 or h == 0:
        return
    cos, stride_cos = rotation(a.cos)
    sin, stride_sin = rotation(a.sin)
    with torch.cuda.device_of(a.q):
        _quantise_index_q_kernel[(s_q * cdiv(h, ROWS),)](
            a.q,
            *a.q.stride(),
            a.weights,
            *a.weights.stride(),
            cos,
            stride_cos,
            sin,
            stride_sin,
            a.out,
            *a.out.stride(),
            a.out_weights,
            *a.out_weights.stride(),
            a.min_scale,
            h,
            LOG_D=d.bit_length() - 1,
            ROPE_DIM=0 if cos is None else 2 * cos.shape[1],
            PAIRING=a.pairing,
            HADAMARD=a.hadamard,
            POWER_OF_TWO=a.power_of_two,
            ROWS=ROWS,
            num_warps=4,
            enable_fp_fusion=False,  # the same bits as on the CPU
        )


@triton.jit(do_not_specialize=["min_scale", "h"])
def _quantise_index_q_kernel(
    q_ptr,  # [s_q, h, d]
    stride_q_t,
    stride_q_h,
    stride_q_d,
    weights_ptr,  # [s_q, h]
    stride_weights_t,
    stride_weights_h,
    cos_ptr,  # [s_q, ROPE_DIM / 2], or None
    stride_cos_t,
    sin_ptr,
    stride_sin_t,
    out_ptr,  # [s_q, h, d] e4m3
    stride_out_t,
    stride_out_h,
    stride_out_d,
    out_weights_ptr,  # [s_q, h]
    stride_out_weights_t,
    stride_out_weights_h,
    min_scale,
    h,
    LOG_D: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    PAIRING: tl.constexpr,
    HADAMARD: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: ROWS heads of one query."""
    D: tl.constexpr = 1 << LOG_D
    blocks = tl.cdiv(h, ROWS)
    t = (tl.program_id(0) // blocks).to(tl.int64)
    head = (tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)  # [ROWS]
    real = head < h
    live = real[:, None]
    offs_d = tl.arange(0, D)[None, :]  # [1, D]
    other_d = partner(offs_d, ROPE_DIM, PAIRING) if ROPE_DIM > 0 else offs_d
    rows = q_ptr + t * stride_q_t + (head * stride_q_h)[:, None]
    x = tl.load(rows + offs_d.to(tl.int64) * stride_q_d, mask=live, other=0.0).to(tl.float32)  # [ROWS, D]
    other = tl.load(rows + other_d.to(tl.int64) * stride_q_d, mask=live, other=0.0).to(tl.float32)
    cos_rows, sin_rows = None, None
    if cos_ptr is not None:
        cos_rows, sin_rows = cos_ptr + t * stride_cos_t, sin_ptr + t * stride_sin_t
    x = turn_rows(x, other, offs_d, cos_rows, sin_rows, live, ROPE_DIM, PAIRING, HADAMARD, LOG_D)
    codes, scale = quantise_e4m3(x, min_scale, POWER_OF_TWO)
    place = out_ptr + t * stride_out_t + (head * stride_out_h)[:, None]
    tl.store(place + offs_d.to(tl.int64) * stride_out_d, codes, mask=live)
    weights = tl.load(weights_ptr + t * stride_weights_t + head * stride_weights_h, mask=real, other=0.0)
    place = out_weights_ptr + t * stride_out_weights_t + head * stride_out_weights_h
    tl.store(place, weights * scale, mask=real)
