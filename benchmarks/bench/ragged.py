"""A batch of sequences of very different lengths: all in one call, beside a call for each of them."""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from sparse_attn import lightning_topk, physical_slots

from .case import Case, Cases, Sizes
from .limits import Work, index_work
from .tensors import cache, normal

D, PAGE_SIZE = 128, 64
MOST_QUERIES = 4  # of a sequence: drafts are scored together


def ragged(sizes: Sizes, device: torch.device) -> Cases:
    """The selection, and its slots, of sequences from 1 token to the longest context."""
    longest = sizes.contexts[-1]
    yield longest, f"{sizes.sequences} sequences", partial(_ragged, sizes, device, longest)


def _ragged(sizes: Sizes, device: torch.device, longest: int) -> Case:
    n = sizes.sequences
    lengths = torch.logspace(0, 1, n, base=longest, dtype=torch.float64).round().int()
    counts = torch.arange(n) % MOST_QUERIES + 1
    pages = -(-lengths // PAGE_SIZE)
    table = torch.full((n, int(pages.max())), -1, dtype=torch.int32)
    free = torch.randperm(int(pages.sum())).int()
    for row, own in zip(table, free.split(pages.tolist()), strict=True):
        row[: len(own)] = own
    ends = torch.cat([torch.zeros(1), counts.cumsum(0)]).int()
    s_q = int(ends[-1])
    ke = lengths.repeat_interleave(counts).to(device)
    q, k = normal(device, s_q, sizes.index_heads, D), cache(device, len(free), PAGE_SIZE, D)
    weights, ks = torch.randn(s_q, sizes.index_heads, device=device), torch.zeros_like(ke)
    table, cu_seqlens_q = table.to(device), ends.to(device)
    sequences = [slice(*bounds) for bounds in pairwise(ends.tolist())]

    def select(t: slice, table: Tensor, **options: Tensor) -> Tensor:
        inputs = q[t], k, weights[t], sizes.topk, ks[t], ke[t]
        positions = lightning_topk(*inputs, block_table=table, **options)
        return physical_slots(positions, table, PAGE_SIZE, **options)

    def together() -> Tensor:
        return select(slice(s_q), table, cu_seqlens_q=cu_seqlens_q)

    def apart() -> list[Tensor]:
        """A caller that knows each length on the host cuts the table to it."""
        return [select(t, table[i : i + 1, : pages[i]]) for i, t in enumerate(sequences)]

    def check() -> None:
        assert torch.equal(together(), torch.cat(apart())), "a sequence depends on its neighbours"

    parts = (
        index_work(int(m), int(length), sizes.index_heads, D)
        for m, length in zip(counts, lengths, strict=True)
    )
    return Case({"one call": together, "a call per sequence": apart}, check, sum(parts, start=Work()))
