"""New latents of MLA into a cache.

    cache[slots[t]] = pack(RoPE(RMSNorm(kv[t])))

RMSNorm over the first 512 values where there is a weight, RoPE on the last 64 where there is a cosine; then
the bytes of the cache's format, whose layout formats/layout.py reads off its views, or the values rounded to
the cache's dtype. Everything in fp32, rounded once. Slots that do not exist are skipped.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ..formats import KV_FORMATS
from ..formats.layout import Layout, layout_of
from .arguments import contiguous, refuse_fp64, rotation
from .quantised import quantise_e2m1, quantise_e4m3
from .rotate import apply_rope, partner

if TYPE_CHECKING:
    from ..ops.writers import WriteKVOp


def refuses(a: "WriteKVOp") -> str | None:
    """Why these kernels cannot run ``a``, or None."""
    return refuse_fp64(a.kv, a.norm_weight)


def write_kv(a: "WriteKVOp") -> None:
    """Write kv to cache."""
    tokens, width = a.kv.shape
    pages, page_size, _ = a.cache.shape
    if tokens == 0 or a.cache.numel() == 0:
        return
    cos, stride_cos = rotation(a.cos)
    sin, stride_sin = rotation(a.sin)
    page_step, step, element_step = a.cache.stride()
    if a.cache_format is None:
        layout = Layout("plain", "none", quantised=512, group=512, values_step=step)
    else:
        layout = layout_of(KV_FORMATS[a.cache_format], a.cache)
    with torch.cuda.device_of(a.kv):
        _write_kv_kernel[(tokens,)](
            a.kv,
            *a.kv.stride(),
            a.slots.contiguous(),
            contiguous(a.norm_weight),
            cos,
            stride_cos,
            sin,
            stride_sin,
            a.cache,
            page_step,
            layout.values_step,
            element_step,
            layout.scales_start,
            layout.scales_step,
            layout.rope_start,
            layout.rope_step,
            a.eps,
            a.min_scale,
            pages * page_size,
            page_size,
            VALUES=layout.values,
            SCALES=layout.scales,
            QUANTISED=layout.quantised,
            GROUP=layout.group,
            WIDTH=width,
            PAIRING=a.pairing,
            POWER_OF_TWO=a.power_of_two,
            num_warps=2,  # 8 values per thread: 16 bytes
            enable_fp_fusion=False,  # the same bits as on the CPU
        )


@triton.jit(do_not_specialize=["eps", "min_scale", "n_slots", "page_size"])
def _write_kv_kernel(
    kv_ptr,  # [tokens, WIDTH]
    stride_kv_t,
    stride_kv_d,
    slots_ptr,  # [tokens]
    weight_ptr,  # [512], or None
    cos_ptr,  # [tokens, 32], or None
    stride_cos_t,
    sin_ptr,
    stride_sin_t,
    cache_ptr,  # pages of bytes, or of plain values
    stride_cache_page,
    values_step,  # these: see Layout
    stride_cache_d,  # of plain values
    scales_start,
    scales_step,
    rope_start,
    rope_step,
    eps,
    min_scale,
    n_slots,
    page_size,
    VALUES: tl.constexpr,  # "plain", or Layout's
    SCALES: tl.constexpr,
    QUANTISED: tl.constexpr,  # values that share scales; RoPE dimensions behind them stay bf16
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,  # 512, or 576: the RoPE dimensions lie behind the 512
    PAIRING: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    """One program: one token."""
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + t).to(tl.int64)
    if (slot < 0) | (slot >= n_slots):
        return
    D: tl.constexpr = 512
    row = kv_ptr + t * stride_kv_t
    offs = tl.arange(0, D)[None, :]  # [1, D]
    x = tl.load(row + offs.to(tl.int64) * stride_kv_d).to(tl.float32)
    # RoPE dimensions: those behind x [1, 64]; or all of x, counted from x's RoPE dimensions on
    ROPE_TILE: tl.constexpr = 64 if WIDTH > D else D
    ROPE_START: tl.constexpr = WIDTH - 64
    offs_r = tl.arange(0, ROPE_TILE)[None, :]
    if WIDTH == D:
        offs_r = (offs_r + 64) % D
    other_r = partner(offs_r, 64, PAIRING)
    column, other_column = ROPE_START + offs_r, ROPE_START + other_r
    if WIDTH == D:
        column, other_column = column % D, other_column % D
    rope = x if WIDTH == D else tl.load(row + column.to(tl.int64) * stride_kv_d).to(tl.float32)
    other = tl.load(row + other_column.to(tl.int64) * stride_kv_d).to(tl.float32)
    if weight_ptr is not None:
        inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x) / D + eps))
        x = x * inverse * tl.load(weight_ptr + offs).to(tl.float32)
        if WIDTH == D:  # the norm includes the RoPE dimensions
            rope = x
            other = other * inverse * tl.load(weight_ptr + other_column).to(tl.float32)
    if cos_ptr is not None:
        cos, sin = cos_ptr + t * stride_cos_t, sin_ptr + t * stride_sin_t
        rope = apply_rope(rope, other, offs_r, cos, sin, offs_r < 64, 64, PAIRING)
    if WIDTH == D:
        x = rope

    page = cache_ptr + slot // page_size * stride_cache_page
    offset = slot % page_size
    values = page + offset * values_step
    if VALUES == "plain":
        dtype: tl.constexpr = cache_ptr.dtype.element_ty
        tl.store(values + offs.to(tl.int64) * stride_cache_d, x.to(dtype))
        if WIDTH > D:
            tl.store(values + column.to(tl.int64) * stride_cache_d, rope.to(dtype))
    else:
        x = tl.reshape(x, [D // GROUP, GROUP])
        if VALUES == "e4m3":
            codes, scale = quantise_e4m3(x, min_scale, POWER_OF_TWO)
            tl.store(values + offs, tl.reshape(codes, [1, D]), mask=offs < QUANTISED)
        else:
            codes, scale = quantise_e2m1(x, min_scale)
            tl.store(values + tl.arange(0, D // 2), tl.reshape(codes, [D // 2]))
        scales = page + scales_start + offset * scales_step
        if SCALES == "fp32":
            scales = scales.to(tl.pointer_type(tl.float32))
        elif SCALES == "ue8m0":
            scale = (scale.to(tl.uint32, bitcast=True) >> 23).to(tl.uint8)
        offs_g = tl.arange(0, D // GROUP)  # of which QUANTISED / GROUP have a scale
        tl.store(scales + offs_g, scale, mask=offs_g < QUANTISED // GROUP)
        if WIDTH > QUANTISED:
            ropes = (page + rope_start + offset * rope_step).to(tl.pointer_type(tl.bfloat16))
            tl.store(ropes + offs_r, rope.to(tl.bfloat16), mask=offs_r < 64)
