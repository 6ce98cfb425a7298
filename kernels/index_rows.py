"""What is done to index keys and queries in fp32 before they are stored: RoPE and the Hadamard matrix."""

import triton
import triton.language as tl

from .rotate import apply_rope, hadamard


@triton.jit
def turn_rows(
    x,  # [n, d] fp32
    other,  # [n, d]: x at partner(offs_d)
    offs_d,  # [1, d]
    cos_rows,  # [n, 1] pointers, or None
    sin_rows,
    mask,  # [n, 1] or [n, d]
    ROPE_DIM: tl.constexpr,
    PAIRING: tl.constexpr,
    HADAMARD: tl.constexpr,
    LOG_D: tl.constexpr,
):
    """Hadamard(RoPE(x)), [n, d]"""
    if ROPE_DIM > 0:
        x = apply_rope(x, other, offs_d, cos_rows, sin_rows, mask, ROPE_DIM, PAIRING)
    if HADAMARD:
        norm: tl.constexpr = (1 << LOG_D) ** -0.5
        x = hadamard(x, LOG_D) * norm
    return x
