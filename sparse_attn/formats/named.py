"""Formats of latent caches by name. Bytes per token alone cannot tell those of 528 and of 288 bytes.

The branch `formats` defines these; this file is here until then.
"""

import torch
from torch import Tensor

from .elements import FP8_MIN_SCALE, Format, split_pages
from .latent import V4_KV, V32_KV, V41_FP4_KV, V41_KV


def v41_by_page_kv_views(pages: Tensor) -> tuple[Tensor, Tensor]:
    V41_BY_PAGE_KV.check(pages)
    values, scales = split_pages(pages, 512, 16)
    return values.view(torch.float8_e4m3fn), scales


def pack_v41_by_page_kv(kv: Tensor, *, min_scale: float = FP8_MIN_SCALE) -> Tensor:
    return V41_BY_PAGE_KV.quantised("kv", kv, min_scale=min_scale)


def v41_fp4_by_page_kv_views(pages: Tensor) -> tuple[Tensor, Tensor]:
    V41_FP4_BY_PAGE_KV.check(pages)
    values, scales = split_pages(pages, 256, 32)
    return values, scales.view(torch.float8_e4m3fn)


def pack_v41_fp4_by_page_kv(kv: Tensor) -> Tensor:
    return V41_FP4_BY_PAGE_KV.quantised("kv", kv, power_of_two=False, min_scale=2.0**-9)


def nope_kv_views(packed: Tensor) -> tuple[Tensor, Tensor]:
    NOPE_KV.check(packed)
    latent, scales = packed.split([512, 16], -1)
    return latent.view(torch.float8_e4m3fn), scales.view(torch.float32)


def pack_nope_kv(kv: Tensor, *, power_of_two: bool = True, min_scale: float = FP8_MIN_SCALE) -> Tensor:
    return NOPE_KV.quantised("kv", kv, power_of_two=power_of_two, min_scale=min_scale)


V41_BY_PAGE_KV = Format(528, 512, 1, v41_by_page_kv_views, pack_v41_by_page_kv, by_page=True)
V41_FP4_BY_PAGE_KV = Format(288, 512, 1, v41_fp4_by_page_kv_views, pack_v41_fp4_by_page_kv, by_page=True)
NOPE_KV = Format(528, 512, 4, nope_kv_views, pack_nope_kv)

NAMED_KV_FORMATS = {
    "v32": V32_KV,
    "v4": V4_KV,
    "v41": V41_KV,
    "v41_by_page": V41_BY_PAGE_KV,
    "nope": NOPE_KV,
    "v41_fp4": V41_FP4_KV,
    "v41_fp4_by_page": V41_FP4_BY_PAGE_KV,
}
