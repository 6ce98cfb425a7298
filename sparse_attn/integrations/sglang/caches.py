"""The latent cache in fp8, 656 bytes per token. SGLang's own kernels need Triton's e4m3: sm_89."""

import torch
from torch import Tensor

from ... import formats

VALUES_AND_SCALES = 528  # bytes of 512 values and 4 scales; the RoPE dimensions lie behind them
# SGLang has no least scale, and makes NaN of a block of zeros. This one changes no other scale.
MIN_SCALE = torch.finfo(torch.float32).tiny


def quantize_k_cache(cache_k: Tensor, dv: int | None = None) -> Tensor:
    """bf16 ``[pages, page_size, 1, 576]`` to ``[pages, page_size, 1, 656]``, bytes that are called e4m3."""
    if dv not in (None, 512):
        raise ValueError(f"dv: expected 512, got {dv}")
    return _pack(cache_k).view(torch.float8_e4m3fn)


def quantize_k_cache_separate(k_nope: Tensor, k_rope: Tensor, tile_size: int = 128) -> tuple[Tensor, Tensor]:
    """``[tokens, 512]`` and ``[tokens, 64]``, or with a 1 between, to bytes ``[tokens, 1, 528 and 128]``."""
    if tile_size != 128:
        raise ValueError(f"tile_size: expected 128, got {tile_size}")
    packed = _pack(torch.cat([k_nope.view(len(k_nope), 1, -1), k_rope.view(len(k_rope), 1, -1)], -1))
    return packed[..., :VALUES_AND_SCALES].contiguous(), packed[..., VALUES_AND_SCALES:].contiguous()


def dequantize_k_cache_paged_dsa(
    quant_k_cache: Tensor, page_table_1_flattened: Tensor, group_size: int = 128
) -> Tensor:
    """The rows ``[n]`` of a cache ``[..., 656]`` as bf16 ``[n, 1, 576]``."""
    rows = quant_k_cache.view(torch.uint8).view(-1, quant_k_cache.shape[-1])[page_table_1_flattened.long()]
    return formats.unpack(rows, torch.bfloat16)[:, None]


def _pack(kv: Tensor) -> Tensor:
    return formats.pack_v32_kv(kv, power_of_two=False, min_scale=MIN_SCALE)
