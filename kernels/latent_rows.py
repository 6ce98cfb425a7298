"""Gather rows of a latent cache as a tile of values and one of key tails, from each layout of a cache.

    0     rows of q's dtype: d_v values, then the rest of the key
    656   bytes, DeepSeek-V3.2: 512 e4m3, 4 fp32 scales (one per 128 values), 64 bf16 of the key's tail
    584   bytes, DeepSeek-V4, by page: page_size x (448 e4m3, 64 bf16), then page_size x (7 ue8m0 scales, one
          per 64 values, and a pad); the value is all 512, and there is no tail

An fp8 value is exact in fp32; times its scale it is rounded to q's dtype, in registers. Rows that are not
valid are not read, whatever they hold, and come back as zeros.
"""

import triton
import triton.language as tl

from .quantised import from_e4m3, from_ue8m0, opaque


@triton.jit
def load_values(
    kv_ptr,
    stride_kv_page,
    stride_kv_n,
    stride_kv_d,
    index,  # [BLOCK_N] slots
    valid,  # [BLOCK_N]
    DTYPE: tl.constexpr,  # of q
    LAYOUT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,  # of packed rows; a constant, as every index is divided by it
    NATIVE_FP8: tl.constexpr,  # e4m3 is converted by the hardware
    D_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """[BLOCK_N, BLOCK_V]"""
    offs_v = tl.arange(0, BLOCK_V).to(tl.int64)[None, :]
    ok = valid[:, None]
    rows = _rows(kv_ptr, stride_kv_page, stride_kv_n, index, LAYOUT, PAGE_SIZE)  # [BLOCK_N, 1]
    if LAYOUT == 0:
        return tl.load(rows + offs_v * stride_kv_d, mask=ok & (offs_v < D_V), other=0.0)
    elif LAYOUT == 656:
        code = tl.load(rows + offs_v, mask=ok, other=0)  # [BLOCK_N, 512]
        scales = (rows + 512).to(tl.pointer_type(tl.float32)) + tl.arange(0, 4)[None, :]
        scale = tl.load(scales, mask=ok, other=0.0)  # [BLOCK_N, 4]
        return opaque(_scaled(code, scale, BLOCK_N, NATIVE_FP8).to(DTYPE))
    else:
        code = tl.load(rows + offs_v, mask=ok & (offs_v < 448), other=0)  # [BLOCK_N, 512]
        group = tl.arange(0, 8)[None, :]
        slot = (index % PAGE_SIZE)[:, None]
        scales = rows + (PAGE_SIZE * 576 - slot * 568) + group  # from slot * 576 to slot * 8 behind the rows
        exponent = tl.load(scales, mask=ok & (group < 7), other=0)  # [BLOCK_N, 8]
        value = _scaled(code, from_ue8m0(exponent), BLOCK_N, NATIVE_FP8).to(DTYPE)
        lasts = (rows + 448).to(tl.pointer_type(tl.bfloat16)) + tl.arange(0, 64)[None, :]
        last = tl.load(lasts, mask=ok, other=0.0).to(DTYPE)  # [BLOCK_N, 64]
        value = tl.where(group[:, :, None] < 7, tl.reshape(value, [BLOCK_N, 8, 64]), last[:, None, :])
        return opaque(tl.reshape(value, [BLOCK_N, 512]))


@triton.jit
def load_tails(
    kv_ptr,
    stride_kv_page,
    stride_kv_n,
    stride_kv_d,
    index,  # [BLOCK_N]
    valid,  # [BLOCK_N]
    DTYPE: tl.constexpr,
    LAYOUT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    D_V: tl.constexpr,
    D_TAIL: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
):
    """[BLOCK_N, BLOCK_TAIL]: the D_TAIL columns of the key that are not of the value."""
    offs_tail = tl.arange(0, BLOCK_TAIL).to(tl.int64)[None, :]
    rows = _rows(kv_ptr, stride_kv_page, stride_kv_n, index, LAYOUT, PAGE_SIZE)  # [BLOCK_N, 1]
    if LAYOUT == 0:
        tails = rows + (D_V + offs_tail) * stride_kv_d
    else:
        tails = (rows + 528).to(tl.pointer_type(tl.bfloat16)) + offs_tail
    return tl.load(tails, mask=valid[:, None] & (offs_tail < D_TAIL), other=0.0).to(DTYPE)


@triton.jit
def _rows(kv_ptr, stride_kv_page, stride_kv_n, index, LAYOUT: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Pointers [BLOCK_N, 1] to the first element of each row."""
    if LAYOUT == 0:
        offset = index.to(tl.int64) * stride_kv_n
    elif LAYOUT == 656:
        offset = (index // PAGE_SIZE).to(tl.int64) * stride_kv_page + (index % PAGE_SIZE) * stride_kv_n
    else:
        tl.static_assert(LAYOUT == 584)
        offset = (index // PAGE_SIZE).to(tl.int64) * stride_kv_page + (index % PAGE_SIZE) * 576
    return kv_ptr + offset[:, None]


@triton.jit
def _scaled(code, scale, BLOCK_N: tl.constexpr, NATIVE_FP8: tl.constexpr):
    """e4m3 codes [BLOCK_N, 512] times scale [BLOCK_N, n], each for 512 / n neighbours, in fp32."""
    groups: tl.constexpr = scale.shape[1]
    value = tl.reshape(from_e4m3(code, NATIVE_FP8), [BLOCK_N, groups, 512 // groups]) * scale[:, :, None]
    return tl.reshape(value, [BLOCK_N, 512])
