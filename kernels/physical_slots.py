"""Logical positions to physical slots of a paged cache.

    out[t, i] = block_table[row, position // page_size] * page_size + position % page_size

with position = indices[t, i] and row = t // (s_q / n). -1 where the position is negative or beyond the table,
and where the table holds a negative page or a page whose slots do not fit int32.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .arguments import cdiv

if TYPE_CHECKING:
    from ..ops.index import PhysicalSlotsOp

BLOCK = 1024


def refuses(a: "PhysicalSlotsOp") -> None:
    """Nothing."""


def physical_slots(a: "PhysicalSlotsOp") -> None:
    """Fill out."""
    indices, block_table, page_size, out = a
    s_q, topk = indices.shape
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
            topk,
            block_table.shape[1],
            page_size,
            s_q // block_table.shape[0],
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )


@triton.jit(do_not_specialize=["topk", "max_pages", "queries_per_row"])
def _physical_slots_kernel(
    indices_ptr,  # [s_q, topk]
    stride_indices_t,
    stride_indices_n,
    table_ptr,  # [s_q / queries_per_row, max_pages]
    stride_table_row,
    stride_table_page,
    out_ptr,  # [s_q, topk]
    stride_out_t,
    stride_out_n,
    topk,
    max_pages,
    page_size,
    queries_per_row,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK indices of one query."""
    blocks = tl.cdiv(topk, BLOCK)
    t = (tl.program_id(0) // blocks).to(tl.int64)
    offs_n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = offs_n < topk
    offs_n = offs_n.to(tl.int64)
    index = tl.load(indices_ptr + t * stride_indices_t + offs_n * stride_indices_n, mask=inside, other=-1)
    table_row = table_ptr + t // queries_per_row * stride_table_row
    mapped = (index >= 0) & (index // page_size < max_pages)
    page = tl.load(
        table_row + (index // page_size).to(tl.int64) * stride_table_page, mask=mapped, other=-1
    )  # [BLOCK]
    slot = page.to(tl.int64) * page_size + index % page_size
    slot = tl.where((page >= 0) & (slot <= 0x7FFFFFFF), slot, -1)
    tl.store(out_ptr + t * stride_out_t + offs_n * stride_out_n, slot.to(tl.int32), mask=inside)
