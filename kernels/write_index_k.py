"""New index keys into a cache of 132 bytes a key.

    cache[slots[t]] = pack(Hadamard(RoPE(LayerNorm(k[t]))))

LayerNorm where there is a weight, RoPE of the leading dimensions where there is a cosine, the Hadamard matrix
on demand. Everything in fp32, rounded once. Slots that do not exist are skipped.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from sparse_attn.formats import index_k_views

from .configs import refuse_fp64
from .index_rows import quantise_rows
from .rotate import partner

if TYPE_CHECKING:
    from ..ops.writers import WriteIndexKOp

ROWS = 4  # keys a program, one a warp


def refuses(a: "WriteIndexKOp") -> str | None:
    """Why these kernels cannot run ``a``, or None."""
    return refuse_fp64(a.k, a.norm_weight, a.norm_bias)


def write_index_k(a: "WriteIndexKOp") -> None:
    """Write k [tokens, 128] to cache [pages, page_size, 132]."""
    k, slots, eps, hadamard, power_of_two, min_scale, cache = a[:7]
    norm_weight, norm_bias, cos, sin, pairing = a[7:]
    tokens, d = k.shape
    if tokens == 0 or cache.numel() == 0:
        return
    values, scales = index_k_views(cache)
    values = values.view(torch.uint8)  # sm_80 has no name for e4m3
    with torch.cuda.device_of(k):
        _write_index_k_kernel[(triton.cdiv(tokens, ROWS),)](
            k,
            *k.stride(),
            slots,
            slots.stride(0),
            norm_weight,
            norm_bias,
            *(0 if x is None else x.stride(0) for x in (norm_weight, norm_bias)),
            cos,
            sin,
            *((0, 0) if cos is None else cos.stride()),
            *((0, 0) if sin is None else sin.stride()),
            values,
            *values.stride()[:2],
            scales,
            *scales.stride(),
            eps,
            min_scale,
            tokens,
            cache.shape[0] * cache.shape[1],
            cache.shape[1],
            LOG_D=d.bit_length() - 1,
            ROPE_DIM=0 if cos is None else 2 * cos.shape[1],
            PAIRING=pairing,
            HADAMARD=hadamard,
            POWER_OF_TWO=power_of_two,
            ROWS=ROWS,
            num_warps=ROWS,
            enable_fp_fusion=False,  # the same bits as on the CPU
        )


@triton.jit(do_not_specialize=["eps", "min_scale", "tokens", "n_slots", "page_size"])
def _write_index_k_kernel(
    k_ptr,  # [tokens, d]
    stride_k_t,
    stride_k_d,
    slots_ptr,  # [tokens]
    stride_slots,
    weight_ptr,  # [d], or None
    bias_ptr,
    stride_weight,
    stride_bias,
    cos_ptr,  # [tokens, ROPE_DIM / 2], or None
    sin_ptr,
    stride_cos_t,
    stride_cos_d,
    stride_sin_t,
    stride_sin_d,
    values_ptr,  # [pages, page_size, d] e4m3
    stride_values_page,
    stride_values_n,
    scales_ptr,  # [pages, page_size] fp32
    stride_scales_page,
    stride_scales_n,
    eps,
    min_scale,
    tokens,
    n_slots,
    page_size,
    LOG_D: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    PAIRING: tl.constexpr,
    HADAMARD: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: ROWS keys."""
    D: tl.constexpr = 1 << LOG_D
    t = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)  # [ROWS]
    slot = tl.load(slots_ptr + t * stride_slots, mask=t < tokens, other=-1).to(tl.int64)
    exists = (slot >= 0) & (slot < n_slots)
    page, offset = slot // page_size, slot % page_size
    offs_d = tl.arange(0, D)[None, :]  # [1, D]
    other_d = partner(offs_d, ROPE_DIM, PAIRING) if ROPE_DIM > 0 else offs_d
    rows = k_ptr + (t * stride_k_t)[:, None]
    live = exists[:, None]
    x = tl.load(rows + offs_d.to(tl.int64) * stride_k_d, mask=live, other=0.0).to(tl.float32)  # [ROWS, D]
    other = tl.load(rows + other_d.to(tl.int64) * stride_k_d, mask=live, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        mean = tl.sum(x, 1) / D
        centred = x - mean[:, None]
        inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(centred * centred, 1) / D + eps))[:, None]
        weight = tl.load(weight_ptr + offs_d * stride_weight).to(tl.float32)
        bias = tl.load(bias_ptr + offs_d * stride_bias).to(tl.float32)
        x = centred * inverse * weight + bias
        weight = tl.load(weight_ptr + other_d * stride_weight).to(tl.float32)
        bias = tl.load(bias_ptr + other_d * stride_bias).to(tl.float32)
        other = (other - mean[:, None]) * inverse * weight + bias
    cos_rows, sin_rows = None, None
    if cos_ptr is not None:
        cos_rows, sin_rows = cos_ptr + (t * stride_cos_t)[:, None], sin_ptr + (t * stride_sin_t)[:, None]
    codes, scale = quantise_rows(
        *(x, other, offs_d, cos_rows, sin_rows, stride_cos_d, stride_sin_d, live, min_scale),
        *(ROPE_DIM, PAIRING, HADAMARD, LOG_D, POWER_OF_TWO),
    )
    place = values_ptr + (page * stride_values_page + offset * stride_values_n)[:, None]
    tl.store(place + offs_d, codes, mask=live)
    tl.store(scales_ptr + page * stride_scales_page + offset * stride_scales_n, scale, mask=exists)
