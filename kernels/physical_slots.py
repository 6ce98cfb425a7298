"""Logical positions to physical slots of a paged cache.

    out[t, i] = block_table[row, position // page_size] * page_stride + position % page_size

with position = indices[t, i] and row = t // (s_q / n), or the query's sequence. -1 where the position is
negative or beyond the table, where the table holds a negative page or a page whose slots do not fit int32,
and for queries of no sequence.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .arguments import cdiv, contiguous
from .sequences import row_of

if TYPE_CHECKING:
    from ..ops.index import PhysicalSlotsOp

BLOCK = 1024


def refuses(a: "PhysicalSlotsOp") -> None:
    """Nothing."""


def physical_slots(a: "PhysicalSlotsOp") -> None:
    """Fill out."""
    indices, block_table, page_size, page_stride, out, cu_seqlens_q = a
    (s_q, topk), (n, max_pages) = indices.shape, block_table.shape
    if out.numel() == 0:
        return
    blocks = cdiv(topk, BLOCK)
    with torch.cuda.device_of(indices):
        _physical_slots_kernel[(s_q * blocks,)](
            indices,
            *indices.stride(),
            block_table,
            *block_table.stride(),
            out,
            *out.stride(),
            contiguous(cu_seqlens_q),
            topk,
            n,
            max_pages,
            page_size,
            page_stride,
            1 if cu_seqlens_q is not None else s_q // n,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )


@triton.jit(do_not_specialize=["topk", "n", "max_pages", "page_stride", "queries_per_row"])
def _physical_slots_kernel(
    indices_ptr,  # [s_q, topk]
    stride_indices_t,
    stride_indices_n,
    table_ptr,  # [n, max_pages]
    stride_table_row,
    stride_table_page,
    out_ptr,  # [s_q, topk]
    stride_out_t,
    stride_out_n,
    cu_seqlens_q_ptr,  # [n + 1], or None
    topk,
    n,
    max_pages,
    page_size,
    page_stride,
    queries_per_row,  # without cu_seqlens_q
    BLOCK: tl.constexpr,
):
    """One program: BLOCK indices of one query."""
    blocks = tl.cdiv(topk, BLOCK)
    t = (tl.program_id(0) // blocks).to(tl.int64)
    offs_n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = offs_n < topk
    offs_n = offs_n.to(tl.int64)
    index = tl.load(indices_ptr + t * stride_indices_t + offs_n * stride_indices_n, mask=inside, other=-1)
    row = t // queries_per_row
    if cu_seqlens_q_ptr is not None:
        row = row_of(t, cu_seqlens_q_ptr, n).to(tl.int64)
        max_pages = tl.where(row < n, max_pages, 0)
    table_row = table_ptr + row * stride_table_row
    mapped = (index >= 0) & (index // page_size < max_pages)
    page = tl.load(
        table_row + (index // page_size).to(tl.int64) * stride_table_page, mask=mapped, other=-1
    )  # [BLOCK]
    slot = page.to(tl.int64) * page_stride + index % page_size
    slot = tl.where((page >= 0) & (slot <= 0x7FFFFFFF), slot, -1)
    tl.store(out_ptr + t * stride_out_t + offs_n * stride_out_n, slot.to(tl.int32), mask=inside)
