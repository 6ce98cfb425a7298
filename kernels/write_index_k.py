"""New index keys into a paged cache.

    cache[slots[t]] = pack(Hadamard(RoPE(LayerNorm(k[t]))))

    0     rows of the cache's dtype
    132   bytes by page: page_size x 128 e4m3, then page_size x fp32 scale

LayerNorm where there is a weight, RoPE of the leading dimensions where there is a cosine, the Hadamard matrix
on demand. Everything in fp32, rounded once. Slots that do not exist are skipped.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .arguments import cdiv, contiguous, next_power_of_2, refuse_fp64, rotation
from .index_rows import turn_rows
from .quantised import quantise_e4m3
from .rotate import partner

if TYPE_CHECKING:
    from ..ops.writers import WriteIndexKOp

ROWS = 4  # keys per program, one per warp


def refuses(a: "WriteIndexKOp") -> str | None:
    """Why these kernels cannot run ``a``, or None."""
    return refuse_fp64(a.k, a.norm_weight, a.norm_bias)


def write_index_k(a: "WriteIndexKOp") -> None:
    """Write k to cache."""
    tokens, d = a.k.shape
    pages, page_size, _ = a.cache.shape
    if tokens == 0 or a.cache.numel() == 0:
        return
    cos, stride_cos = rotation(a.cos)
    sin, stride_sin = rotation(a.sin)
    with torch.cuda.device_of(a.k):
        _write_index_k_kernel[(cdiv(tokens, ROWS),)](
            a.k,
            *a.k.stride(),
            a.slots.contiguous(),
            contiguous(a.norm_weight),
            contiguous(a.norm_bias),
            cos,
            stride_cos,
            sin,
            stride_sin,
            a.cache,
            *a.cache.stride(),
            a.eps,
            a.min_scale,
            tokens,
            pages * page_size,
            page_size,
            LAYOUT=132 if a.cache.dtype == torch.uint8 else 0,
            D=d,
            LOG_D=next_power_of_2(d).bit_length() - 1,
            ROPE_DIM=0 if cos is None else 2 * cos.shape[1],
            PAIRING=a.pairing,
            HADAMARD=a.hadamard,
            POWER_OF_TWO=a.power_of_two,
            ROWS=ROWS,
            num_warps=ROWS,
            enable_fp_fusion=False,  # the same bits as on the CPU
        )


@triton.jit(do_not_specialize=["eps", "min_scale", "tokens", "n_slots", "page_size"])
def _write_index_k_kernel(
    k_ptr,  # [tokens, D]
    stride_k_t,
    stride_k_d,
    slots_ptr,  # [tokens]
    weight_ptr,  # [D], or None
    bias_ptr,
    cos_ptr,  # [tokens, ROPE_DIM / 2], or None
    stride_cos_t,
    sin_ptr,
    stride_sin_t,
    cache_ptr,  # [pages, page_size, 132] bytes, or [pages, page_size, D]
    stride_cache_page,
    stride_cache_n,
    stride_cache_d,
    eps,
    min_scale,
    tokens,
    n_slots,
    page_size,
    LAYOUT: tl.constexpr,  # see above
    D: tl.constexpr,
    LOG_D: tl.constexpr,  # of D, rounded up to a power of two
    ROPE_DIM: tl.constexpr,
    PAIRING: tl.constexpr,
    HADAMARD: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: ROWS keys."""
    BLOCK_D: tl.constexpr = 1 << LOG_D
    t = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)  # [ROWS]
    slot = tl.load(slots_ptr + t, mask=t < tokens, other=-1).to(tl.int64)
    exists = (slot >= 0) & (slot < n_slots)
    offs_d = tl.arange(0, BLOCK_D)[None, :]  # [1, BLOCK_D]
    real = offs_d < D
    live = exists[:, None] & real
    other_d = partner(offs_d, ROPE_DIM, PAIRING) if ROPE_DIM > 0 else offs_d
    rows = k_ptr + (t * stride_k_t)[:, None]
    x = tl.load(rows + offs_d.to(tl.int64) * stride_k_d, mask=live, other=0.0).to(tl.float32)
    other = tl.load(rows + other_d.to(tl.int64) * stride_k_d, mask=live, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        mean = tl.sum(x, 1) / D
        centred = tl.where(real, x - mean[:, None], 0.0)
        inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(centred * centred, 1) / D + eps))[:, None]
        weight = tl.load(weight_ptr + offs_d, mask=real, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + offs_d, mask=real, other=0.0).to(tl.float32)
        x = centred * inverse * weight + bias
        weight = tl.load(weight_ptr + other_d, mask=real, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + other_d, mask=real, other=0.0).to(tl.float32)
        other = (other - mean[:, None]) * inverse * weight + bias
    cos_rows, sin_rows = None, None
    if cos_ptr is not None:
        cos_rows, sin_rows = cos_ptr + (t * stride_cos_t)[:, None], sin_ptr + (t * stride_sin_t)[:, None]
    x = turn_rows(x, other, offs_d, cos_rows, sin_rows, live, ROPE_DIM, PAIRING, HADAMARD, LOG_D)
    page = cache_ptr + slot // page_size * stride_cache_page  # [ROWS]
    offset = slot % page_size
    if LAYOUT == 0:
        place = (page + offset * stride_cache_n)[:, None] + offs_d.to(tl.int64) * stride_cache_d
        tl.store(place, x.to(cache_ptr.dtype.element_ty), mask=live)
    else:
        codes, scale = quantise_e4m3(x, min_scale, POWER_OF_TWO)
        tl.store((page + offset * D)[:, None] + offs_d, codes, mask=live)
        scales = (page + page_size * D + offset * 4).to(tl.pointer_type(tl.float32))
        tl.store(scales, scale, mask=exists)
