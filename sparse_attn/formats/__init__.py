"""Byte layouts of quantised caches: views of their parts, pack and unpack.

Views copy nothing: what is written to them is in the cache. Every format has a name, and most are told by
the bytes per token, the last dimension of a cache; where these have several meanings, the name is needed:

    bytes  name               of
    656    "v32"              latent of DeepSeek-V3.2 and GLM-5    fp8, fp32 scales, bf16 RoPE
    584    "v4"               latent of DeepSeek-V4                fp8, ue8m0 scales, bf16 RoPE; by page
    528    "v41"              latent of DeepSeek-V4.1              fp8, ue8m0 scales
    528    "v41_by_page"      the same by page
    528    "nope"             latent of GLM-5.3-Flash, no RoPE     fp8, fp32 scales
    288    "v41_fp4"          latent of DeepSeek-V4.1 in 4 bits    fp4, e4m3 scales
    288    "v41_fp4_by_page"  the same by page
    132    "fp8_index"        index keys                           fp8, fp32 scale; by page
     68    "mxfp4_index"      index keys in 4 bits                 fp4, ue8m0 scales; by page
     36    "mxfp4_index_64"   the same of 64 values

"By page": behind the values of all tokens of a page lie the scales of all of them, although the shape
``[pages, page_size, bytes]`` suggests that a token's bytes lie together.

A stored value times its scale is the value. fp8 is e4m3 (torch's ``float8_e4m3fn``, up to 448); fp4 is
e2m1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives), two in a byte, the even one in the low nibble;
ue8m0 is a power of two, ``2 ** (byte - 127)``, where 255 is NaN.
"""

import torch
from torch import Tensor

from .elements import FLASH_MLA_MIN_SCALE as FLASH_MLA_MIN_SCALE
from .elements import FP4_MAX as FP4_MAX
from .elements import FP4_MIN_SCALE as FP4_MIN_SCALE
from .elements import FP8_MAX as FP8_MAX
from .elements import FP8_MIN_SCALE as FP8_MIN_SCALE
from .elements import Format as Format
from .elements import dequantise as dequantise
from .elements import format_of as format_of
from .elements import fp8_scale as fp8_scale
from .elements import from_e2m1 as from_e2m1
from .elements import from_ue8m0 as from_ue8m0
from .elements import quantise as quantise
from .elements import to_e2m1 as to_e2m1
from .elements import to_e4m3 as to_e4m3
from .elements import to_ue8m0 as to_ue8m0
from .index_keys import INDEX_K_FORMATS as INDEX_K_FORMATS
from .index_keys import index_k_views as index_k_views
from .index_keys import mxfp4_index_k_views as mxfp4_index_k_views
from .index_keys import pack_index_k as pack_index_k
from .index_keys import pack_mxfp4_index_k as pack_mxfp4_index_k
from .latent import KV_FORMATS as KV_FORMATS
from .latent import nope_kv_views as nope_kv_views
from .latent import pack_nope_kv as pack_nope_kv
from .latent import pack_v4_kv as pack_v4_kv
from .latent import pack_v32_kv as pack_v32_kv
from .latent import pack_v41_by_page_kv as pack_v41_by_page_kv
from .latent import pack_v41_fp4_by_page_kv as pack_v41_fp4_by_page_kv
from .latent import pack_v41_fp4_kv as pack_v41_fp4_kv
from .latent import pack_v41_kv as pack_v41_kv
from .latent import v4_kv_views as v4_kv_views
from .latent import v4_page_bytes as v4_page_bytes
from .latent import v32_kv_views as v32_kv_views
from .latent import v41_by_page_kv_views as v41_by_page_kv_views
from .latent import v41_fp4_by_page_kv_views as v41_fp4_by_page_kv_views
from .latent import v41_fp4_kv_views as v41_fp4_kv_views
from .latent import v41_kv_views as v41_kv_views

FORMATS = KV_FORMATS | INDEX_K_FORMATS


def views(cache: Tensor, format: str | None = None) -> tuple[Tensor, ...]:
    """The parts of a cache of any format: the arguments of :func:`dequantise`.

    Each part is ``[pages, page_size, ...]``, so that ``part[page, offset]`` belongs to one token. ``format``,
    a name, is needed where the bytes per token have several meanings.
    """
    return format_of("cache", cache, FORMATS, format).views(cache)


def unpack(packed: Tensor, dtype: torch.dtype = torch.float32, format: str | None = None) -> Tensor:
    """The values ``[..., width]`` of a cache of any format, in ``dtype``; ``format`` as in :func:`views`."""
    return dequantise(*format_of("packed", packed, FORMATS, format).views(packed), dtype=dtype)
