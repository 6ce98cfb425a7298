"""Arguments for the conformance checks: the same numbers on every machine."""

from typing import Any

import torch
from torch import Tensor


def randn(*shape: int, seed: int = 0) -> Tensor:
    """fp64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randint(low: int, high: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """int32."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).int()


def permutation(n: int) -> Tensor:
    """int32."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0)).int()


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def to_device(value: Any, device: str) -> Any:
    """Tensors, also in a dict or tuple, on the device, with their strides and the gaps between elements."""
    if isinstance(value, dict):
        return {name: to_device(item, device) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(to_device(item, device) for item in value)
    if not isinstance(value, Tensor):
        return value
    size = 1 + sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
    offset = value.storage_offset()
    buffer = value.as_strided((offset + size,), (1,), 0).to(device)
    return buffer.as_strided(value.shape, value.stride(), offset)
