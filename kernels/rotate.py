"""What is done to rows before they are quantised: RoPE and the Hadamard matrix, in fp32.

The operations and their order are those of sparse_attn/rope.py, so the bits are equal too where a launch has
enable_fp_fusion off.
"""

import triton
import triton.language as tl


@triton.jit
def partner(offs, ROPE_DIM: tl.constexpr, PAIRING: tl.constexpr):
    """The dimension that RoPE pairs with each of ``offs`` (below ROPE_DIM); beyond, the dimension itself."""
    other = offs ^ 1 if PAIRING == "interleaved" else (offs + ROPE_DIM // 2) % ROPE_DIM
    return tl.where(offs < ROPE_DIM, other, offs)


@triton.jit
def apply_rope(
    x,  # [n, d]
    other,  # [n, d]: x at partner(offs)
    offs,  # [1, d]: dimensions; RoPE turns the first ROPE_DIM
    cos_ptr,  # [n, 1] pointers to rows of ROPE_DIM / 2
    sin_ptr,
    mask,  # [n, 1]
    ROPE_DIM: tl.constexpr,
    PAIRING: tl.constexpr,
):
    """[n, d]"""
    if PAIRING == "interleaved":
        pair, first = offs // 2, offs % 2 == 0
    else:
        pair, first = offs % (ROPE_DIM // 2), offs < ROPE_DIM // 2
    turned = offs < ROPE_DIM
    cos = tl.load(cos_ptr + pair, mask=mask & turned, other=1.0)
    sin = tl.load(sin_ptr + pair, mask=mask & turned, other=0.0)
    rotated = tl.where(first, x * cos - other * sin, other * sin + x * cos)
    return tl.where(turned, rotated, x)


@triton.jit
def hadamard(x, LOG_D: tl.constexpr):
    """x [n, d] times the Sylvester-Hadamard matrix of d = 2 ** LOG_D, whose entries are 1 and -1."""
    n: tl.constexpr = x.shape[0]
    d: tl.constexpr = x.shape[1]
    for i in tl.static_range(LOG_D):
        pairs = tl.permute(tl.reshape(x, [n, d >> (i + 1), 2, 1 << i]), 0, 1, 3, 2)
        first, second = tl.split(pairs)
        x = tl.reshape(tl.permute(tl.join(first + second, first - second), 0, 1, 3, 2), [n, d])
    return x
