"""The last steps of index keys and queries: RoPE, the Hadamard matrix, and e4m3 with one scale per row."""

import triton
import triton.language as tl

from .quantised import quantise_e4m3
from .rotate import apply_rope, hadamard


@triton.jit
def quantise_rows(
    x,  # [n, d] fp32
    other,  # [n, d]: x at partner(offs_d)
    offs_d,  # [1, d]
    cos_rows,  # [n, 1] pointers, or None
    sin_rows,
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
        x = apply_rope(x, other, offs_d, cos_rows, sin_rows, mask, ROPE_DIM, PAIRING)
    if HADAMARD:
        norm: tl.constexpr = (1 << LOG_D) ** -0.5
        x = hadamard(x, LOG_D) * norm
    return quantise_e4m3(x, min_scale, POWER_OF_TWO)
