"""What the arguments of the public functions must be; each check says what came instead.

``dims`` collects the size that each name was first seen with, so that a later tensor which disagrees is told
what was expected of it. Some checks return their argument in the form that the ops take.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from ..formats import Format
from . import check_backend

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
WRITER_FLOATS = FLOATS[:3]
INT32 = (torch.int32,)


def tensor(
    name: str,
    x: object,
    spec: str,
    dims: dict[str, int],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
) -> Tensor:
    """The tensor itself, of the axes that ``spec`` names: a number is a size, a name stands for one."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor [{named(spec, dims)}], got {type(x).__name__}")
    axes, shape, known = _axes(spec), x.shape, len(dims)
    fits = len(axes) == len(shape)
    for axis, n in zip(axes, shape, strict=False):  # a generator would cost more than the rest of a check
        if (axis if isinstance(axis, int) else dims.setdefault(axis, n)) != n:
            fits = False
    if not fits:
        for axis in list(dims)[known:]:
            del dims[axis]
        raise ValueError(f"{name}: expected shape [{named(spec, dims)}], got {list(shape)}")
    if x.dtype not in dtypes:
        expected = " or ".join(map(dtype_name, dtypes))
        raise TypeError(f"{name}: expected dtype {expected}, got {dtype_name(x.dtype)}")
    if device is not None and x.device != device:
        raise ValueError(f"{name}: expected device {device}, got {x.device}")
    return x


@functools.cache  # splitting takes as long as the rest of a check
def _axes(spec: str) -> tuple[int | str, ...]:
    return tuple(int(axis) if axis.isdigit() else axis for axis in spec.split())


def optional(name: str, x: object, *expected: Any) -> None:
    """:func:`tensor` of an argument that may be None."""
    if x is not None:
        tensor(name, x, *expected)


def integer(name: str, value: object, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an int of at least {least}, got {value!r}")


def named(spec: str, dims: dict[str, int]) -> str:
    """The axes of a shape, with their sizes where they are known."""
    return ", ".join(
        f"{axis}={dims[axis]}" if axis in dims and not axis.isdigit() else axis for axis in spec.split()
    )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def call(backend: str, device: torch.device, *tensors: Tensor | None) -> None:
    """The backend can run on the device, and no tensor wants a gradient."""
    check_backend(backend, device)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError(
            "gradients: sparse_attn is for inference and has no backward, but an input requires grad; "
            "call it under torch.no_grad() or torch.inference_mode()"
        )


def block_table(
    block_table: Tensor,
    cu_seqlens_q: Tensor | None,
    dims: dict[str, int],
    s_q: int,
    device: torch.device,
) -> None:
    """A block table with a row per s_q / n queries, or with cu_seqlens_q per sequence."""
    tensor("block_table", block_table, "n max_pages", dims, INT32, device)
    n = block_table.shape[0]
    if cu_seqlens_q is not None:
        tensor("cu_seqlens_q", cu_seqlens_q, str(n + 1), dims, INT32, device)
    elif (n == 0 and s_q > 0) or (n > 0 and s_q % n):
        raise ValueError(
            f"block_table: expected a number of rows that divides s_q={s_q}, got {n}; sequences of different "
            "numbers of queries take cu_seqlens_q"
        )


def in_format(name: str, cache: Tensor, fmt: Format, width: int, width_name: str) -> None:
    """A quantised cache holds values of q's width, and its bytes lie where they can be read."""
    if width != fmt.width:
        raise ValueError(
            f"q: expected {width_name}={fmt.width}, as {name} has {fmt.bytes} bytes per token, got {width}"
        )
    fmt.check_in_place(name, cache)


def quantised_pages(name: str, kv: Tensor, fmt: Format, device: torch.device) -> Tensor:
    """A view ``[pages, page_size, bytes]`` of a latent cache in any of its shapes."""
    return pages(name, kv, fmt.bytes, (torch.uint8,), device, by_page=fmt.by_page)


def pages(
    name: str,
    cache: Tensor,
    last: int,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    *,
    by_page: bool = False,
) -> Tensor:
    """A view ``[pages, page_size, last]`` of a cache in any of its shapes."""
    rank = cache.dim()
    if rank == 2 and not by_page:
        return tensor(name, cache, f"s_kv {last}", {}, dtypes, device)[:, None]  # pages of one token
    if rank == 4:
        return tensor(name, cache, f"pages page_size 1 {last}", {}, dtypes, device).squeeze(2)
    return tensor(name, cache, f"pages page_size {last}", {}, dtypes, device)


def output(name: str, out: object, dims: dict[str, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The caller's tensor of these sizes, or a new one."""
    if out is None:
        return torch.empty(tuple(dims.values()), dtype=dtype, device=device)
    return tensor(name, out, " ".join(dims), dims, (dtype,), device)
