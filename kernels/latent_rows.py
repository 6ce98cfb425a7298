"""Gather rows of a latent cache, as a tile of values and a tile of RoPE columns.

FORMAT is None for rows in q's dtype: d_v values, then the RoPE part of the key. Else it is a name of
``sparse_attn.formats.KV_FORMATS``, which describes the bytes; "v4" has its RoPE part among the 512 values.

A stored value is exact in fp32; times its scale it is rounded to q's dtype, in registers. Rows that are not
valid are not read, whatever they hold, and come back as zeros.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .quantised import from_e2m1, from_e4m3, from_ue8m0, opaque, scaled


class Segment(NamedTuple):
    """What one query attends to in one cache."""

    kv_ptr: Any  # rows [s_kv, d_qk], or pages [pages, page_size, d_qk or bytes]
    stride_kv_page: Any  # 0 of rows
    stride_kv_row: Any
    stride_kv_d: Any
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
    FORMAT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,  # a constant, as every index is divided by it; 1 of rows
    NATIVE_FP8: tl.constexpr,  # the hardware converts e4m3
    D_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """[BLOCK_N, BLOCK_V]"""
    offs_v = tl.arange(0, BLOCK_V).to(tl.int64)[None, :]
    ok = valid[:, None]
    if FORMAT is None:
        rows = _plain_rows(segment, index, PAGE_SIZE)  # [BLOCK_N, 1]
        return tl.load(rows + offs_v * segment.stride_kv_d, mask=ok & (offs_v < D_V), other=0.0)
    else:
        values, scales = _packed_rows(segment, index, FORMAT, PAGE_SIZE)  # [BLOCK_N, 1]
        if FORMAT == "v41_fp4" or FORMAT == "v41_fp4_by_page":
            code = tl.load(values + tl.arange(0, 256)[None, :], mask=ok, other=0)  # [BLOCK_N, 256]
            scale = _load_scales(scales, ok, FORMAT, NATIVE_FP8)  # [BLOCK_N, 32]
            return opaque(scaled(from_e2m1(code), scale).to(DTYPE))
        elif FORMAT == "v4":
            BLOCK_N: tl.constexpr = index.shape[0]
            code = tl.load(values + offs_v, mask=ok & (offs_v < 448), other=0)  # [BLOCK_N, 512]
            scale = _load_scales(scales, ok, FORMAT, NATIVE_FP8)  # [BLOCK_N, 8]
            value = scaled(from_e4m3(code, NATIVE_FP8), scale).to(DTYPE)
            ropes = (values + 448).to(tl.pointer_type(tl.bfloat16)) + tl.arange(0, 64)[None, :]
            rope = tl.load(ropes, mask=ok, other=0.0).to(DTYPE)  # [BLOCK_N, 64]
            group = tl.arange(0, 8)[None, :, None]
            value = tl.where(group < 7, tl.reshape(value, [BLOCK_N, 8, 64]), rope[:, None, :])
            return opaque(tl.reshape(value, [BLOCK_N, 512]))
        else:
            code = tl.load(values + offs_v, mask=ok, other=0)  # [BLOCK_N, 512]
            scale = _load_scales(scales, ok, FORMAT, NATIVE_FP8)  # [BLOCK_N, 4 or 16]
            return opaque(scaled(from_e4m3(code, NATIVE_FP8), scale).to(DTYPE))


@triton.jit
def load_ropes(
    segment,
    index,  # [BLOCK_N]
    valid,  # [BLOCK_N]
    DTYPE: tl.constexpr,
    FORMAT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    D_V: tl.constexpr,
    D_ROPE: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
):
    """[BLOCK_N, BLOCK_ROPE]: the D_ROPE columns of the key that are not part of the value."""
    offs_rope = tl.arange(0, BLOCK_ROPE).to(tl.int64)[None, :]
    if FORMAT is None:
        rows = _plain_rows(segment, index, PAGE_SIZE)  # [BLOCK_N, 1]
        ropes = rows + (D_V + offs_rope) * segment.stride_kv_d
    else:
        tl.static_assert(FORMAT == "v32")
        values, _ = _packed_rows(segment, index, FORMAT, PAGE_SIZE)  # [BLOCK_N, 1]
        ropes = (values + 528).to(tl.pointer_type(tl.bfloat16)) + offs_rope
    return tl.load(ropes, mask=valid[:, None] & (offs_rope < D_ROPE), other=0.0).to(DTYPE)


@triton.jit
def _plain_rows(segment, index, PAGE_SIZE: tl.constexpr):
    """Pointers [BLOCK_N, 1] to the first element of each row."""
    if PAGE_SIZE == 1:
        offset = index.to(tl.int64) * segment.stride_kv_row
    else:
        page = (index // PAGE_SIZE).to(tl.int64) * segment.stride_kv_page
        offset = page + (index % PAGE_SIZE).to(tl.int64) * segment.stride_kv_row
    return segment.kv_ptr + offset[:, None]


@triton.jit
def _packed_rows(segment, index, FORMAT: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Pointers [BLOCK_N, 1] to the first byte of the values and of the scales of each row."""
    if FORMAT == "v32" or FORMAT == "nope" or FORMAT == "v41":
        return _by_token(segment, index, 512, PAGE_SIZE)
    elif FORMAT == "v41_fp4":
        return _by_token(segment, index, 256, PAGE_SIZE)
    elif FORMAT == "v4":
        return _by_page(segment, index, 576, 8, PAGE_SIZE)
    elif FORMAT == "v41_by_page":
        return _by_page(segment, index, 512, 16, PAGE_SIZE)
    else:
        tl.static_assert(FORMAT == "v41_fp4_by_page")
        return _by_page(segment, index, 256, 32, PAGE_SIZE)


@triton.jit
def _by_token(segment, index, VALUE_BYTES: tl.constexpr, PAGE_SIZE: tl.constexpr):
    page = (index // PAGE_SIZE).to(tl.int64) * segment.stride_kv_page
    values = segment.kv_ptr + (page + (index % PAGE_SIZE) * segment.stride_kv_row)[:, None]
    return values, values + VALUE_BYTES


@triton.jit
def _by_page(segment, index, VALUE_BYTES: tl.constexpr, SCALE_BYTES: tl.constexpr, PAGE_SIZE: tl.constexpr):
    page, slot = (index // PAGE_SIZE).to(tl.int64) * segment.stride_kv_page, index % PAGE_SIZE
    values = segment.kv_ptr + (page + slot * VALUE_BYTES)[:, None]
    # From slot * VALUE_BYTES to slot * SCALE_BYTES behind the values of the page.
    return values, values + (PAGE_SIZE * VALUE_BYTES - slot * (VALUE_BYTES - SCALE_BYTES))[:, None]


@triton.jit
def _load_scales(scales, ok, FORMAT: tl.constexpr, NATIVE_FP8: tl.constexpr):
    """[BLOCK_N, groups] fp32, each for 512 / groups neighbouring values."""
    if FORMAT == "v32" or FORMAT == "nope":
        scales = scales.to(tl.pointer_type(tl.float32))
        return tl.load(scales + tl.arange(0, 4)[None, :], mask=ok, other=0.0)
    elif FORMAT == "v4":
        group = tl.arange(0, 8)[None, :]
        return from_ue8m0(tl.load(scales + group, mask=ok & (group < 7), other=0))
    elif FORMAT == "v41" or FORMAT == "v41_by_page":
        return from_ue8m0(tl.load(scales + tl.arange(0, 16)[None, :], mask=ok, other=0))
    else:
        return from_e4m3(tl.load(scales + tl.arange(0, 32)[None, :], mask=ok, other=0), NATIVE_FP8)
