"""What launchers ask of their tensors."""

import torch
from torch import Tensor


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
