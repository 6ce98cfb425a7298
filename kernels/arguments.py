"""What launchers ask of their tensors, and reckon with."""

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops.records import of_queries

if TYPE_CHECKING:
    from .configs import Launch


def refuse_fp64(*tensors: Tensor | None) -> str | None:
    """Why kernels cannot run such tensors, or None: none computes in fp64."""
    if any(t is not None and t.dtype == torch.float64 for t in tensors):
        return "dtype: the triton backend takes bfloat16, float16 or float32, got float64"
    return None


def contiguous(x: Tensor | None) -> Tensor | None:
    """A small input without gaps, so that its kernel needs no strides; a copy only where there are gaps."""
    return None if x is None else x.contiguous()


def rotation(x: Tensor | None) -> tuple[Tensor | None, int]:
    """cos or sin [tokens, ROPE_DIM / 2] without gaps in its rows, and the stride of the rows."""
    if x is None:
        return None, 0
    x = x if x.stride(1) == 1 else x.contiguous()
    return x, x.stride(0)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own takes microseconds, as its next_power_of_2 does."""
    return -(-a // b)


@functools.cache
def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def in_launches(a: Any, launches: "tuple[Launch, ...]") -> Iterator[tuple[Any, int]]:
    """The record of each launch, and its splits."""
    for queries, splits in launches:
        yield a if len(launches) == 1 else of_queries(a, queries), splits
