"""What the writers in C++ and Triton are told of a format. It is read off the format's views."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .elements import Format

VALUES = {torch.float8_e4m3fn: "e4m3", torch.uint8: "e2m1"}  # e2m1 in pairs
SCALES = {torch.float32: "fp32", torch.uint8: "ue8m0", torch.float8_e4m3fn: "e4m3"}


class Layout(NamedTuple):
    """What the parts of a token are, and where they lie in a page, in bytes from its start.

    Token i's values lie at ``i * values_step``, its scales at ``scales_start + i * scales_step`` and its bf16
    RoPE dimensions, if they are not quantised, at ``rope_start + i * rope_step``.
    """

    values: str  # "e4m3" or "e2m1"
    scales: str  # "fp32", "ue8m0" or "e4m3"
    quantised: int  # values per token; the RoPE dimensions behind them stay bf16
    group: int  # values per scale
    values_step: int = 0
    scales_start: int = 0
    scales_step: int = 0
    rope_start: int = 0
    rope_step: int = 0


def layout_of(fmt: Format, pages: Tensor) -> Layout:
    """Of a cache ``[pages, page_size, bytes]`` with tokens."""
    return _layout(fmt, pages.shape[1], pages.stride(1))


@functools.lru_cache(maxsize=256)
def _layout(fmt: Format, page_size: int, step: int) -> Layout:
    step = step if page_size > 1 else fmt.bytes  # the stride of one token may be anything
    strides = page_size * step, step, 1
    page = torch.empty_strided((1, page_size, fmt.bytes), strides, dtype=torch.uint8, device="meta")
    values, scales, *rope = fmt.views(page)
    width = values.shape[2] * (2 if values.dtype == torch.uint8 else 1)
    groups = scales.shape[2] if scales.dim() == 3 else 1
    what = VALUES[values.dtype], SCALES[scales.dtype], width, width // groups, values.stride(1)
    places = [int(n) * x.element_size() for x in (scales, *rope) for n in (x.storage_offset(), x.stride(1))]
    return Layout(*what, *places)
