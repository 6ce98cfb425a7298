"""Gather rows of a latent cache, as a tile of values and a tile of RoPE columns, from each layout of a cache.

    0     rows of q's dtype: d_v values, then the RoPE part of the key
    656   bytes, DeepSeek-V3.2: 512 e4m3, 4 fp32 scales (one per 128 values), 64 bf16 of the RoPE part
    584   bytes, DeepSeek-V4, by page: page_size x (448 e4m3, 64 bf16), then page_size x (7 ue8m0 scales, one
          per 64 values, and a pad byte); the value is all 512, and no RoPE part lies apart

An fp8 value is exact in fp32; times its scale it is rounded to q's dtype, in registers. Rows that are not
valid are not read, whatever they hold, and come back as zeros.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .quantised import from_e4m3, from_ue8m0, opaque


class Segment(NamedTuple):
    """What one query attends to in one cache."""

    kv_ptr: Any  # rows [s_kv, d_qk], or packed pages [pages, page_size, bytes]
    stride_kv_0: Any  # of the first and of the second dimension
    stride_kv_1: Any
    s_kv: Any
    indices_ptr: Any  # of the query
    stride_indices_n: Any
    length: Any  # indices that count


@triton.jit
def load_values(
    segment,
    index,  # [BLOCK_N] slots
    valid,  # [BLOCK_N]
    DTYPE: tl.constexpr,  # of q
    LAYOUT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,  # of packed rows; a constant, as every index is divided by it
    NATIVE_FP8: tl.constexpr,  # the hardware converts e4m3
    D_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """[BLOCK_N, BLOCK_V]"""
    offs_v = tl.arange(0, BLOCK_V).to(tl.int64)[None, :]
    ok = valid[:, None]
    rows = _rows(segment, index, LAYOUT, PAGE_SIZE)  # [BLOCK_N, 1]
    if LAYOUT == 0:
        return tl.load(rows + offs_v * segment.stride_kv_1, mask=ok & (offs_v < D_V), other=0.0)
    elif LAYOUT == 656:
        code = tl.load(rows + offs_v, mask=ok, other=0)  # [BLOCK_N, 512]
        scales = (rows + 512).to(tl.pointer_type(tl.float32)) + tl.arange(0, 4)[None, :]
        scale = tl.load(scales, mask=ok, other=0.0)  # [BLOCK_N, 4]
        return opaque(_scaled(code, scale, NATIVE_FP8).to(DTYPE))
    else:
        BLOCK_N: tl.constexpr = index.shape[0]
        code = tl.load(rows + offs_v, mask=ok & (offs_v < 448), other=0)  # [BLOCK_N, 512]
        group = tl.arange(0, 8)[None, :]
        slot = (index % PAGE_SIZE)[:, None]
        scales = rows + (PAGE_SIZE * 576 - slot * 568) + group  # from slot * 576 to slot * 8 after the rows
        exponent = tl.load(scales, mask=ok & (group < 7), other=0)  # [BLOCK_N, 8]
        value = _scaled(code, from_ue8m0(exponent), NATIVE_FP8).to(DTYPE)
        ropes = (rows + 448).to(tl.pointer_type(tl.bfloat16)) + tl.arange(0, 64)[None, :]
        rope = tl.load(ropes, mask=ok, other=0.0).to(DTYPE)  # [BLOCK_N, 64]
        value = tl.where(group[:, :, None] < 7, tl.reshape(value, [BLOCK_N, 8, 64]), rope[:, None, :])
        return opaque(tl.reshape(value, [BLOCK_N, 512]))


@triton.jit
def load_ropes(
    segment,
    index,  # [BLOCK_N]
    valid,  # [BLOCK_N]
    DTYPE: tl.constexpr,
    LAYOUT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    D_V: tl.constexpr,
    D_ROPE: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
):
    """[BLOCK_N, BLOCK_ROPE]: the D_ROPE columns of the key that are not part of the value."""
    offs_rope = tl.arange(0, BLOCK_ROPE).to(tl.int64)[None, :]
    rows = _rows(segment, index, LAYOUT, PAGE_SIZE)  # [BLOCK_N, 1]
    if LAYOUT == 0:
        ropes = rows + (D_V + offs_rope) * segment.stride_kv_1
    else:
        ropes = (rows + 528).to(tl.pointer_type(tl.bfloat16)) + offs_rope
    return tl.load(ropes, mask=valid[:, None] & (offs_rope < D_ROPE), other=0.0).to(DTYPE)


@triton.jit
def _rows(segment, index, LAYOUT: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Pointers [BLOCK_N, 1] to the first element of each row."""
    if LAYOUT == 0:
        offset = index.to(tl.int64) * segment.stride_kv_0
    elif LAYOUT == 656:
        page = (index // PAGE_SIZE).to(tl.int64) * segment.stride_kv_0
        offset = page + (index % PAGE_SIZE) * segment.stride_kv_1
    else:
        tl.static_assert(LAYOUT == 584)
        offset = (index // PAGE_SIZE).to(tl.int64) * segment.stride_kv_0 + (index % PAGE_SIZE) * 576
    return segment.kv_ptr + offset[:, None]


@triton.jit
def _scaled(code, scale, NATIVE_FP8: tl.constexpr):
    """e4m3 codes [n, 512] times scales [n, groups], each for 512 / groups neighbours, in fp32."""
    n: tl.constexpr = code.shape[0]
    groups: tl.constexpr = scale.shape[1]
    value = tl.reshape(from_e4m3(code, NATIVE_FP8), [n, groups, 512 // groups]) * scale[:, :, None]
    return tl.reshape(value, [n, 512])
