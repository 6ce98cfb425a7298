"""New latents of MLA into a quantised cache.

    cache[slots[t]] = pack(RoPE(RMSNorm(kv[t])))

RMSNorm over the first 512 values where there is a weight, RoPE on the last 64 where there is a cosine, then
the bytes of DeepSeek-V3.2 (656: the RoPE part lies after the 512) or of DeepSeek-V4 (584: it is the last 64
of the 512), in the layouts that latent_rows.py describes and reads. Everything in fp32, rounded once. Slots
that do not exist are skipped.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .arguments import contiguous, refuse_fp64, rotation
from .quantised import quantise_e4m3
from .rotate import apply_rope, partner

if TYPE_CHECKING:
    from ..ops.writers import WriteKVOp


def refuses(a: "WriteKVOp") -> str | None:
    """Why these kernels cannot run ``a``, or None."""
    return refuse_fp64(a.kv, a.norm_weight)


def write_kv(a: "WriteKVOp") -> None:
    """Write kv to cache."""
    tokens = a.kv.shape[0]
    pages, page_size, layout = a.cache.shape
    if tokens == 0 or a.cache.numel() == 0:
        return
    cos, stride_cos = rotation(a.cos)
    sin, stride_sin = rotation(a.sin)
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
            *a.cache.stride()[:2],
            a.eps,
            a.min_scale,
            pages * page_size,
            page_size,
            LAYOUT=layout,
            PAIRING=a.pairing,
            POWER_OF_TWO=a.power_of_two,
            num_warps=2,  # 8 values per thread: 16 bytes
            enable_fp_fusion=False,  # the same bits as on the CPU
        )


@triton.jit(do_not_specialize=["eps", "min_scale", "n_slots", "page_size"])
def _write_kv_kernel(
    kv_ptr,  # [tokens, 576], or for 584 bytes [tokens, 512]
    stride_kv_t,
    stride_kv_d,
    slots_ptr,  # [tokens]
    weight_ptr,  # [512], or None
    cos_ptr,  # [tokens, 32], or None
    stride_cos_t,
    sin_ptr,
    stride_sin_t,
    cache_ptr,  # [pages, page_size, LAYOUT] bytes
    stride_cache_page,
    stride_cache_n,
    eps,
    min_scale,
    n_slots,
    page_size,
    LAYOUT: tl.constexpr,  # see latent_rows.py
    PAIRING: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    """One program: one token."""
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + t).to(tl.int64)
    if (slot < 0) | (slot >= n_slots):
        return
    ROPE_START: tl.constexpr = 512 if LAYOUT == 656 else 448
    GROUP: tl.constexpr = 128 if LAYOUT == 656 else 64  # values per scale
    GROUPS: tl.constexpr = 512 // GROUP
    row = kv_ptr + t * stride_kv_t
    offs = tl.arange(0, 512)  # [512]
    x = tl.load(row + offs.to(tl.int64) * stride_kv_d).to(tl.float32)
    offs_r = tl.arange(0, 64)[None, :]  # [1, 64]: RoPE dimensions
    other_r = partner(offs_r, 64, PAIRING)
    rope = tl.load(row + (ROPE_START + offs_r).to(tl.int64) * stride_kv_d).to(tl.float32)  # [1, 64]
    other = tl.load(row + (ROPE_START + other_r).to(tl.int64) * stride_kv_d).to(tl.float32)
    if weight_ptr is not None:
        inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, 0) / 512 + eps))
        x = x * inverse * tl.load(weight_ptr + offs).to(tl.float32)
        if ROPE_START < 512:  # the norm includes the RoPE part
            rope = rope * inverse * tl.load(weight_ptr + ROPE_START + offs_r).to(tl.float32)
            other = other * inverse * tl.load(weight_ptr + ROPE_START + other_r).to(tl.float32)
    if cos_ptr is not None:
        cos, sin = cos_ptr + t * stride_cos_t, sin_ptr + t * stride_sin_t
        rope = apply_rope(rope, other, offs_r, cos, sin, offs_r < 64, 64, PAIRING)

    codes, scale = quantise_e4m3(tl.reshape(x, [GROUPS, GROUP]), min_scale, POWER_OF_TWO)
    page = cache_ptr + slot // page_size * stride_cache_page
    offset = slot % page_size
    if LAYOUT == 656:
        packed = page + offset * stride_cache_n
        scales, ropes = (packed + 512).to(tl.pointer_type(tl.float32)), packed + 528
    else:
        tl.static_assert(LAYOUT == 584)
        packed = page + offset * 576
        scales, ropes = page + page_size * 576 + offset * 8, packed + 448
        scale = (scale.to(tl.uint32, bitcast=True) >> 23).to(tl.uint8)  # ue8m0
    tl.store(packed + offs, tl.reshape(codes, [512]), mask=offs < ROPE_START)
    offs_g = tl.arange(0, GROUPS)  # [GROUPS], of which ROPE_START / GROUP have a scale
    tl.store(scales + offs_g, scale, mask=offs_g < ROPE_START // GROUP)
    tl.store(ropes.to(tl.pointer_type(tl.bfloat16)) + offs_r, rope.to(tl.bfloat16))
