"""Caches of index keys, as :func:`sparse_attn.lightning_topk` reads them."""

import torch
from torch import Tensor

from .elements import FP4_MIN_SCALE, FP8_MIN_SCALE, Format, split_pages


def index_k_views(pages: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of a paged fp8 cache of index keys, ``[pages, page_size, 132]`` uint8, for each *page*::

        byte 0                         128 * page_size                132 * page_size
             | page_size x 128 e4m3    | page_size x fp32 scale       |

    The shape suggests 132 bytes per token, but the scales of a page lie together behind its keys.

    Returns:
        keys ``[pages, page_size, 128]`` fp8 and scales ``[pages, page_size]`` fp32, views.

    Source: DeepGEMM's paged MQA logits.
    """
    INDEX_K.check(pages)
    keys, scales = split_pages(pages, 128, 4)
    return keys.view(torch.float8_e4m3fn), scales.view(torch.float32)[..., 0]


def pack_index_k(k: Tensor, *, power_of_two: bool = True, min_scale: float = FP8_MIN_SCALE) -> Tensor:
    """``[pages, page_size, 128]`` floats to ``[pages, page_size, 132]`` uint8, one scale per key.

    ``power_of_two`` and ``min_scale`` are those of :func:`sparse_attn.formats.pack_v32_kv`.
    """
    return INDEX_K.quantised("k", k, power_of_two=power_of_two, min_scale=min_scale)


def mxfp4_index_k_views(pages: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of a paged fp4 cache of index keys, ``[pages, page_size, 68]`` uint8, for each *page*::

        byte 0                             64 * page_size                            68 * page_size
             | page_size x 64 x 2 e2m1     | page_size x int32: 4 ue8m0 scales,      |
             |                             | one per 32, the first in the low byte   |

    Value 2i of a key is the low nibble of its byte i, value 2i + 1 the high one. Keys of 64 values have 36
    bytes: 32 of e2m1, and an int32 whose two low bytes are scales; the others may hold anything.

    Returns:
        keys ``[pages, page_size, 64]`` uint8 (pairs of e2m1) and scales ``[pages, page_size, 4]`` uint8
        (ue8m0), views; of 36 bytes 32 and 2 of them.

    Source: DeepGEMM's paged MQA logits for fp4.
    """
    fmt = MXFP4_INDEX_K_64 if pages.shape[-1:] == (MXFP4_INDEX_K_64.bytes,) else MXFP4_INDEX_K
    fmt.check(pages)
    keys, scales = split_pages(pages, fmt.width // 2, 4)
    return keys, scales[..., : fmt.width // 32]


def pack_mxfp4_index_k(k: Tensor, *, min_scale: float = FP4_MIN_SCALE) -> Tensor:
    """``[pages, page_size, 128]`` floats to ``[pages, page_size, 68]`` uint8, or 64 floats to 36 bytes.

    A scale is ``max(amax / 6, min_scale)`` rounded up to a power of two. The default is DeepGEMM's, which
    raises amax to 1e-4. Values are rounded to the nearest, ties to even, as the hardware does.
    """
    fmt = MXFP4_INDEX_K_64 if k.shape[-1:] == (MXFP4_INDEX_K_64.width,) else MXFP4_INDEX_K
    return fmt.quantised("k", k, min_scale=min_scale)


INDEX_K = Format("fp8_index", 132, 128, alignment=4, views=index_k_views, pack=pack_index_k, by_page=True)
MXFP4_INDEX_K = Format(
    "mxfp4_index", 68, 128, alignment=4, views=mxfp4_index_k_views, pack=pack_mxfp4_index_k, by_page=True
)
MXFP4_INDEX_K_64 = MXFP4_INDEX_K._replace(name="mxfp4_index_64", bytes=36, width=64)
INDEX_K_FORMATS = {fmt.name: fmt for fmt in (INDEX_K, MXFP4_INDEX_K, MXFP4_INDEX_K_64)}
