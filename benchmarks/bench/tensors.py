"""Random tensors of the cases, and the few rows of them that a check reads."""

import torch
from torch import Tensor

from sparse_attn.cache import huge_pages
from sparse_attn.formats import pack_v32_kv


def normal(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=device)


def cache(device: torch.device, *shape: int) -> Tensor:
    """Random values, in memory that is allocated as in DSACache."""
    return huge_pages(torch.empty(shape, dtype=torch.bfloat16, device=device)).normal_()


def on_huge_pages(x: Tensor) -> Tensor:
    """A contiguous copy on huge pages."""
    return huge_pages(torch.empty(x.shape, dtype=x.dtype, device=x.device)).copy_(x)


def packed(kv: Tensor) -> Tensor:
    """kv in 656 bytes per token, packed in parts: fp32 copies of a whole cache would not fit into memory."""
    parts = [pack_v32_kv(part) for part in kv.split(1 << 16)]
    return on_huge_pages(torch.cat(parts).unflatten(0, (-1, 64)))


def highest(scores: Tensor, topk: int, ke: Tensor, first_row: Tensor) -> Tensor:
    """``[s_q, topk]`` rows of the highest scores among the first ``ke`` tokens, which start at first_row."""
    hidden = torch.arange(scores.shape[1], device=scores.device) >= ke[:, None]
    score, selected = scores.masked_fill(hidden, float("-inf")).topk(min(topk, scores.shape[1]))
    return torch.where(score == float("-inf"), -1, selected + first_row).sort().values.int()


def gathered(indices: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
    """The selected rows, and indices into them: whole caches would not fit into memory in fp64."""
    places = torch.arange(indices.numel(), dtype=torch.int32, device=indices.device).view_as(indices)
    slots = indices.clamp(min=0).flatten().long()
    return torch.where(indices < 0, -1, places), *(cache[slots] for cache in caches)
