"""Byte layouts of quantised caches: views on their parts, pack and unpack.

Views copy nothing, so that a kernel or a packer works on the cache itself. fp8 is e4m3 (torch's
``float8_e4m3fn``); a stored value times its scale is the value.
"""

import torch
from torch import Tensor

FP8_MAX = 448.0  # largest finite e4m3 value

V32_KV_BYTES = 656
V32_KV_LATENT, V32_KV_ROPE, V32_KV_BLOCK = 512, 64, 128
INDEX_K_DIM, INDEX_K_BYTES = 128, 132


def fp8_scale(amax: Tensor, power_of_two: bool = True) -> Tensor:
    """The fp32 scale of a block whose largest magnitude is ``amax``: ``max(amax, 1e-4) / 448``.

    With ``power_of_two`` (ue8m0) it is rounded up to one, as DeepSeek's inference code does.
    """
    scale = amax.float().clamp(min=1e-4) / FP8_MAX
    return torch.exp2(torch.ceil(torch.log2(scale))) if power_of_two else scale


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
    _check_bytes(packed, V32_KV_BYTES)
    latent, scales, rope = packed.split([V32_KV_LATENT, 16, 2 * V32_KV_ROPE], -1)
    return latent.view(torch.float8_e4m3fn), scales.view(torch.float32), rope.view(torch.bfloat16)


def pack_v32_kv(kv: Tensor, *, power_of_two: bool = True) -> Tensor:
    """``[..., 576]`` floats to ``[..., 656]`` uint8; DeepSeek stores powers of two, GLM plain fp32 scales."""
    packed = torch.empty(*kv.shape[:-1], V32_KV_BYTES, dtype=torch.uint8, device=kv.device)
    latent, scales, rope = v32_kv_views(packed)
    blocks = kv[..., :V32_KV_LATENT].float().unflatten(-1, (-1, V32_KV_BLOCK))  # [..., 4, 128]
    scales.copy_(fp8_scale(blocks.abs().amax(-1), power_of_two))
    latent.copy_(_to_fp8(blocks / scales[..., None]).flatten(-2))
    rope.copy_(kv[..., V32_KV_LATENT:])
    return packed


def unpack_v32_kv(packed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``[..., 656]`` uint8 to ``[..., 576]``; the products are exact in fp64 and rounded to ``dtype``."""
    latent, scales, rope = v32_kv_views(packed)
    blocks = latent.to(dtype).unflatten(-1, (-1, V32_KV_BLOCK)) * scales[..., None].to(dtype)
    return torch.cat([blocks.flatten(-2), rope.to(dtype)], -1)


def index_k_views(pages: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of a paged fp8 cache of index keys, ``[pages, page_size, 132]`` uint8, for each *page*::

        byte 0                         128 * page_size                132 * page_size
             | page_size x 128 e4m3    | page_size x fp32 scale       |

    The shape suggests 132 bytes a token, but the scales of a page lie together behind its keys.

    Returns:
        keys ``[pages, page_size, 128]`` fp8 and scales ``[pages, page_size]`` fp32, views.

    Source: DeepGEMM's paged MQA logits.
    """
    _check_bytes(pages, INDEX_K_BYTES)
    page_size = pages.shape[1]
    flat = pages.view(len(pages), page_size * INDEX_K_BYTES)
    keys, scales = flat.split([page_size * INDEX_K_DIM, page_size * 4], -1)
    keys = keys.view(torch.float8_e4m3fn).unflatten(-1, (page_size, INDEX_K_DIM))
    return keys, scales.view(torch.float32)


def pack_index_k(k: Tensor, *, power_of_two: bool = True) -> Tensor:
    """``[pages, page_size, 128]`` floats to ``[pages, page_size, 132]`` uint8, one scale a key."""
    packed = torch.empty(*k.shape[:-1], INDEX_K_BYTES, dtype=torch.uint8, device=k.device)
    keys, scales = index_k_views(packed)
    wide = k.float()
    scales.copy_(fp8_scale(wide.abs().amax(-1), power_of_two))
    keys.copy_(_to_fp8(wide / scales[..., None]))
    return packed


def unpack_index_k(pages: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``[pages, page_size, 132]`` uint8 to ``[pages, page_size, 128]``."""
    keys, scales = index_k_views(pages)
    return keys.to(dtype) * scales[..., None].to(dtype)


def _to_fp8(x: Tensor) -> Tensor:
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def _check_bytes(packed: Tensor, size: int) -> None:
    if packed.dtype != torch.uint8 or packed.shape[-1] != size:
        raise ValueError(
            f"packed: expected uint8 [..., {size}], got {str(packed.dtype).removeprefix('torch.')} "
            f"{list(packed.shape)}"
        )
