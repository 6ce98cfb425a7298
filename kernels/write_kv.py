"""New latents of MLA into a quantised cache.

    cache[slots[t]] = pack(RoPE(RMSNorm(kv[t])))

RMSNorm over the first 512 values (an optional weight tells whether), RoPE on the last 64, then the bytes of
DeepSeek-V3.2 (656: the 64 lie behind the 512) or of DeepSeek-V4 (584: they are the last of the 512), which
latent_rows.py reads. Everything in fp32, rounded once. Slots that do not exist are skipped.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from sparse_attn.formats import v4_kv_views, v32_kv_views

from .configs import refuse_fp64
from .quantised import e4m3_scale, largest, to_e4m3
from .rotate import partner, rope

if TYPE_CHECKING:
    from ..ops.writers import WriteKVOp


def refuses(a: "WriteKVOp") -> str | None:
    """Why these kernels cannot run ``a``, or None."""
    return refuse_fp64(a.kv, a.norm_weight)


def write_kv(a: "WriteKVOp") -> None:
    """Write kv [tokens, 576 or 512] to cache [pages, page_size, 656 or 584]."""
    kv, slots, eps, power_of_two, min_scale, cache, norm_weight, cos, sin, pairing = a
    tokens, width = kv.shape
    if tokens == 0 or cache.numel() == 0:
        return
    values, scales, halves = (v32_kv_views if width == 576 else v4_kv_views)(cache)
    values = values.view(torch.uint8)  # sm_80 has no name for e4m3
    with torch.cuda.device_of(kv):
        _write_kv_kernel[(tokens,)](
            kv,
            *kv.stride(),
            slots,
            slots.stride(0),
            norm_weight,
            0 if norm_weight is None else norm_weight.stride(0),
            cos,
            sin,
            *((0, 0) if cos is None else cos.stride()),
            *((0, 0) if sin is None else sin.stride()),
            values,
            *values.stride()[:2],
            scales,
            *scales.stride()[:2],
            halves,
            *halves.stride()[:2],
            eps,
            min_scale,
            cache.shape[0] * cache.shape[1],
            cache.shape[1],
            ROPE_START=width - 64,
            GROUP=128 if width == 576 else 64,
            PAIRING=pairing,
            POWER_OF_TWO=power_of_two,
            UE8M0=width == 512,
            num_warps=2,  # 8 values a thread: 16 bytes
            enable_fp_fusion=False,  # the same bits as on the CPU
        )


@triton.jit(do_not_specialize=["eps", "min_scale", "n_slots", "page_size"])
def _write_kv_kernel(
    kv_ptr,  # [tokens, ROPE_START + 64]
    stride_kv_t,
    stride_kv_d,
    slots_ptr,  # [tokens]
    stride_slots,
    weight_ptr,  # [512], or None
    stride_weight,
    cos_ptr,  # [tokens, 32], or None
    sin_ptr,
    stride_cos_t,
    stride_cos_d,
    stride_sin_t,
    stride_sin_d,
    values_ptr,  # [pages, page_size, ROPE_START] e4m3
    stride_values_page,
    stride_values_n,
    scales_ptr,  # [pages, page_size, ROPE_START / GROUP] fp32, or ue8m0 bytes
    stride_scales_page,
    stride_scales_n,
    halves_ptr,  # [pages, page_size, 64] bf16
    stride_halves_page,
    stride_halves_n,
    eps,
    min_scale,
    n_slots,
    page_size,
    ROPE_START: tl.constexpr,
    GROUP: tl.constexpr,
    PAIRING: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    UE8M0: tl.constexpr,
):
    """One program: one token."""
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + t * stride_slots).to(tl.int64)
    if (slot < 0) | (slot >= n_slots):
        return
    page, offset = slot // page_size, slot % page_size
    row = kv_ptr + t * stride_kv_t
    offs = tl.arange(0, 512)  # [512]
    x = tl.load(row + offs.to(tl.int64) * stride_kv_d).to(tl.float32)
    offs_r = tl.arange(0, 64)[None, :]  # [1, 64]: RoPE dimensions
    other_r = partner(offs_r, 64, PAIRING)
    r = tl.load(row + (ROPE_START + offs_r).to(tl.int64) * stride_kv_d)
    other = tl.load(row + (ROPE_START + other_r).to(tl.int64) * stride_kv_d)
    r, other = r.to(tl.float32), other.to(tl.float32)
    if weight_ptr is not None:
        inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, 0) / 512 + eps))
        x = x * inverse * tl.load(weight_ptr + offs * stride_weight).to(tl.float32)
        if ROPE_START < 512:  # they are normalised too
            r = r * inverse * tl.load(weight_ptr + (ROPE_START + offs_r) * stride_weight).to(tl.float32)
            other = (
                other * inverse * tl.load(weight_ptr + (ROPE_START + other_r) * stride_weight).to(tl.float32)
            )
    if cos_ptr is not None:
        cos, sin = cos_ptr + t * stride_cos_t, sin_ptr + t * stride_sin_t
        r = rope(r, other, offs_r, cos, sin, stride_cos_d, stride_sin_d, offs_r < 64, 64, PAIRING)

    groups: tl.constexpr = 512 // GROUP
    offs_g = tl.arange(0, groups)  # [groups], of which ROPE_START / GROUP have a scale
    blocks = tl.reshape(x, [groups, GROUP])
    scale = e4m3_scale(largest(blocks, 1), min_scale, POWER_OF_TWO)  # [groups]
    codes = tl.reshape(to_e4m3(tl.div_rn(blocks, scale[:, None])), [512])
    place = values_ptr + page * stride_values_page + offset * stride_values_n
    tl.store(place + offs, codes, mask=offs < ROPE_START)
    place = scales_ptr + page * stride_scales_page + offset * stride_scales_n
    stored = (scale.to(tl.uint32, bitcast=True) >> 23).to(tl.uint8) if UE8M0 else scale
    tl.store(place + offs_g, stored, mask=offs_g < ROPE_START // GROUP)
    place = halves_ptr + page * stride_halves_page + offset * stride_halves_n
    tl.store(place + offs_r, r.to(tl.bfloat16))
