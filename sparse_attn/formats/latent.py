"""Caches of latent keys and values, as :func:`sparse_attn.sparse_mla` reads them."""

import torch
from torch import Tensor

from .elements import FP8_MIN_SCALE, Format, split_pages

V41_FP4_MIN_SCALE = 2.0**-9  # the smallest e4m3


def v32_kv_views(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of DeepSeek-V3.2's fp8 latent cache, ``[..., 656]`` uint8, for each token::

        byte 0            512           528                  656
             | 512 e4m3   | 4 fp32      | 64 bf16            |
             | latent     | scales, one | RoPE dimensions    |
             |            | per 128     | of the key         |

    Returns:
        latent ``[..., 512]`` fp8, scales ``[..., 4]`` fp32, rope ``[..., 64]`` bf16, all views.

    Source: FlashMLA, the sparse decoding format for ``is_fp8_kvcache=True``.
    """
    V32_KV.check(packed)
    latent, scales, rope = packed.split([512, 16, 128], -1)
    return latent.view(torch.float8_e4m3fn), scales.view(torch.float32), rope.view(torch.bfloat16)


def pack_v32_kv(kv: Tensor, *, power_of_two: bool = True, min_scale: float = FP8_MIN_SCALE) -> Tensor:
    """``[..., 576]`` floats to ``[..., 656]`` uint8.

    Args:
        kv: the latent and the rotated key.
        power_of_two: round scales up to powers of two, as DeepSeek and FlashMLA do; GLM stores plain fp32.
        min_scale: a scale is ``max(amax / 448, min_scale)``. The default is that of DeepSeek's model code,
            which raises amax to 1e-4; FlashMLA's is :data:`FLASH_MLA_MIN_SCALE`.
    """
    return V32_KV.quantised("kv", kv, power_of_two=power_of_two, min_scale=min_scale)


def v4_kv_views(pages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of DeepSeek-V4's fp8 cache, ``[pages, page_size, 584]`` uint8, for each *page*::

        byte 0            448                576 ...   576 * page_size              584 * page_size
             | 448 e4m3   | 64 bf16          | ...     | 7 ue8m0 scales, | 1 pad | ... |      next page
             | values     | RoPE dimensions  |         | one per 64      |       |     | gap |
             |-- a token ------------------->| others  |-- a token ------------->| others

    Key and value are the same 512 numbers. The shape suggests 584 bytes per token, but the scales of a page
    lie together behind its values. Pages start at multiples of 576 bytes (:func:`v4_page_bytes`), so a
    cache is a view of a wider buffer; the pad and the gap may hold anything.

    Returns:
        values ``[pages, page_size, 448]`` fp8, scales ``[pages, page_size, 7]`` uint8 (ue8m0), rope
        ``[pages, page_size, 64]`` bf16, all views.

    Source: FlashMLA, the format that its code calls MODEL1.
    """
    V4_KV.check(pages)
    tokens, scales = split_pages(pages, 576, 8)
    values, rope = tokens.split([448, 128], -1)
    return values.view(torch.float8_e4m3fn), scales[..., :7], rope.view(torch.bfloat16)


def v4_page_bytes(page_size: int) -> int:
    """From one page of DeepSeek-V4's cache to the next: its bytes, up to a multiple of 576."""
    return V4_KV.page_bytes(page_size)


def pack_v4_kv(kv: Tensor, *, min_scale: float = FP8_MIN_SCALE) -> Tensor:
    """``[pages, page_size, 512]`` floats to ``[pages, page_size, 584]`` uint8 with padded pages.

    Scales are rounded up to powers of two; ``min_scale`` is that of :func:`pack_v32_kv`. The pad and the
    gap between pages are zero.
    """
    return V4_KV.quantised("kv", kv, min_scale=min_scale)


def nope_kv_views(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of GLM-5.3-Flash's fp8 latent cache, ``[..., 528]`` uint8, for each token::

        byte 0            512           528
             | 512 e4m3   | 4 fp32      |
             | latent     | scales, one |
             |            | per 128     |

    It is DeepSeek-V3.2's without the RoPE part: the model has none.

    Returns:
        latent ``[..., 512]`` fp8 and scales ``[..., 4]`` fp32, views.

    Source: FlashMLA, its V3.2 format without RoPE, for GLM-5.3-Flash.
    """
    NOPE_KV.check(packed)
    latent, scales = packed.split([512, 16], -1)
    return latent.view(torch.float8_e4m3fn), scales.view(torch.float32)


def pack_nope_kv(kv: Tensor, *, power_of_two: bool = True, min_scale: float = FP8_MIN_SCALE) -> Tensor:
    """``[..., 512]`` floats to ``[..., 528]`` uint8; the options are those of :func:`pack_v32_kv`."""
    return NOPE_KV.quantised("kv", kv, power_of_two=power_of_two, min_scale=min_scale)


def v41_kv_views(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of DeepSeek-V4.1's fp8 cache, ``[..., 528]`` uint8, for each token::

        byte 0                          512                528
             | 512 e4m3                 | 16 ue8m0         |
             | values, the RoPE         | scales, one      |
             | dimensions last          | per 32           |

    Returns:
        values ``[..., 512]`` fp8 and scales ``[..., 16]`` uint8 (ue8m0), views.

    Source: FlashMLA, its V41 format since the release of 30 September 2026.
    """
    V41_KV.check(packed)
    values, scales = packed.split([512, 16], -1)
    return values.view(torch.float8_e4m3fn), scales


def pack_v41_kv(kv: Tensor, *, min_scale: float = FP8_MIN_SCALE) -> Tensor:
    """``[..., 512]`` floats to ``[..., 528]`` uint8.

    Scales are rounded up to powers of two; ``min_scale`` is that of :func:`pack_v32_kv`.
    """
    return V41_KV.quantised("kv", kv, min_scale=min_scale)


def v41_by_page_kv_views(pages: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of the same cache by page, ``[pages, page_size, 528]`` uint8, for each *page*::

        byte 0          512 ...   512 * page_size      528 * page_size
             | 512 e4m3 | ...     | 16 ue8m0   | ...   |      next page
             | values   |         | scales,    |       | gap |
             |          |         | one per 32 |       |     |
             |- a token | others  |- a token --| others

    FlashMLA and SGLang want the distance of pages to be a multiple of 512 bytes; the gap may hold anything.

    Returns:
        values ``[pages, page_size, 512]`` fp8 and scales ``[pages, page_size, 16]`` uint8 (ue8m0), views.

    Source: FlashMLA, its V41 format from 10 to 30 September 2026; vLLM #56893, SGLang #39123.
    """
    V41_BY_PAGE_KV.check(pages)
    values, scales = split_pages(pages, 512, 16)
    return values.view(torch.float8_e4m3fn), scales


def pack_v41_by_page_kv(kv: Tensor, *, min_scale: float = FP8_MIN_SCALE) -> Tensor:
    """``[pages, page_size, 512]`` floats to ``[pages, page_size, 528]`` uint8, as :func:`pack_v41_kv`."""
    return V41_BY_PAGE_KV.quantised("kv", kv, min_scale=min_scale)


def v41_fp4_kv_views(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of DeepSeek-V4.1's fp4 cache, ``[..., 288]`` uint8, for each token::

        byte 0                          256                288
             | 256 x 2 e2m1             | 32 e4m3          |
             | values, the RoPE         | scales, one      |
             | dimensions last          | per 16           |

    Value 2i is the low nibble of byte i, value 2i + 1 the high one.

    Returns:
        values ``[..., 256]`` uint8 (pairs of e2m1) and scales ``[..., 32]`` fp8, views.

    Source: FlashMLA, its V41_FP4 format since the release of 30 September 2026.
    """
    V41_FP4_KV.check(packed)
    values, scales = packed.split([256, 32], -1)
    return values, scales.view(torch.float8_e4m3fn)


def pack_v41_fp4_kv(kv: Tensor) -> Tensor:
    """``[..., 512]`` floats to ``[..., 288]`` uint8.

    A scale is amax / 6 rounded to the *nearest* e4m3, at least the smallest one, 2 ** -9: it is no power of
    two, and when it is rounded down, the largest values of its block saturate.
    """
    return V41_FP4_KV.quantised("kv", kv, power_of_two=False, min_scale=V41_FP4_MIN_SCALE)


def v41_fp4_by_page_kv_views(pages: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of the same cache by page, ``[pages, page_size, 288]`` uint8, for each *page*::

        byte 0             256 ...   256 * page_size      288 * page_size
             | 256 x 2     | ...     | 32 e4m3    | ...   |      next page
             | e2m1 values |         | scales,    |       | gap |
             |             |         | one per 16 |       |     |
             |- a token ---| others  |- a token --| others

    SGLang wants the distance of pages to be a multiple of 256 bytes; the gap may hold anything.

    Returns:
        values ``[pages, page_size, 256]`` uint8 (pairs of e2m1) and scales ``[pages, page_size, 32]`` fp8,
        views.

    Source: FlashMLA, its V41_FP4 format from 10 to 30 September 2026; SGLang #39123.
    """
    V41_FP4_BY_PAGE_KV.check(pages)
    values, scales = split_pages(pages, 256, 32)
    return values, scales.view(torch.float8_e4m3fn)


def pack_v41_fp4_by_page_kv(kv: Tensor) -> Tensor:
    """``[pages, page_size, 512]`` floats to ``[pages, page_size, 288]`` uint8, as :func:`pack_v41_fp4_kv`."""
    return V41_FP4_BY_PAGE_KV.quantised("kv", kv, power_of_two=False, min_scale=V41_FP4_MIN_SCALE)


V32_KV = Format("v32", 656, 576, 4, v32_kv_views, pack_v32_kv)
V4_KV = Format("v4", 584, 512, 2, v4_kv_views, pack_v4_kv, by_page=True, page_multiple=576)
V41_KV = Format("v41", 528, 512, 1, v41_kv_views, pack_v41_kv)
V41_BY_PAGE_KV = Format(
    *("v41_by_page", 528, 512, 1, v41_by_page_kv_views, pack_v41_by_page_kv), by_page=True, page_multiple=512
)
NOPE_KV = Format("nope", 528, 512, 4, nope_kv_views, pack_nope_kv)
V41_FP4_KV = Format("v41_fp4", 288, 512, 1, v41_fp4_kv_views, pack_v41_fp4_kv)
V41_FP4_BY_PAGE_KV = Format(
    *("v41_fp4_by_page", 288, 512, 1, v41_fp4_by_page_kv_views, pack_v41_fp4_by_page_kv),
    by_page=True,
    page_multiple=256,
)
KV_FORMATS = {
    fmt.name: fmt for fmt in (V32_KV, V4_KV, V41_KV, V41_BY_PAGE_KV, NOPE_KV, V41_FP4_KV, V41_FP4_BY_PAGE_KV)
}
