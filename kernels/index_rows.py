"""What index keys and index queries have in common: turned, and quantised to e4m3 under one scale a row."""

import triton
import triton.language as tl

from .quantised import e4m3_scale, largest, to_e4m3
from .rotate import hadamard, rope


@triton.jit
def quantise_rows(
    x,  # [n, d] fp32
    other,  # [n, d]: x at partner(offs_d)
    offs_d,  # [1, d]
    cos_rows,  # [n, 1] pointers, or None
    sin_rows,
    stride_cos_d,
    stride_sin_d,
    mask,  # [n, 1]
    min_scale,
    ROPE_DIM: tl.constexpr,
    PAIRING: tl.constexpr,
    HADAMARD: tl.constexpr,
    LOG_D: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    """e4m3 bytes [n, d] and scales [n] of Hadamard(RoPE(x))."""
    if ROPE_DIM > 0:
        x = rope(x, other, offs_d, cos_rows, sin_rows, stride_cos_d, stride_sin_d, mask, ROPE_DIM, PAIRING)
    if HADAMARD:
        norm: tl.constexpr = (1 << LOG_D) ** -0.5
        x = hadamard(x, LOG_D) * norm
    scale = e4m3_scale(largest(x, 1), min_scale, POWER_OF_TWO)
    return to_e4m3(tl.div_rn(x, scale[:, None])), scale
