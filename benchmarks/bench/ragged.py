"""A batch of sequences of very different lengths: all in one call, beside a call for each of them."""

from functools import partial
from itertools import accumulate, pairwise, starmap

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
    lengths = [round(longest ** (i / (n - 1))) for i in range(n)]
    counts = [i % MOST_QUERIES + 1 for i in range(n)]
    pages = [-(-length // PAGE_SIZE) for length in lengths]
    ends, s_q = [0, *accumulate(counts)], sum(counts)
    table = torch.full((n, max(pages)), -1, dtype=torch.int32, device=device)
    for row, own in zip(table, torch.randperm(sum(pages), device=device).split(pages), strict=True):
        row[: len(own)] = own
    seen = [length for length, count in zip(lengths, counts, strict=True) for _ in range(count)]
    ke, cu_seqlens_q = (torch.tensor(x, dtype=torch.int32, device=device) for x in (seen, ends))
    q, k = normal(device, s_q, sizes.index_heads, D), cache(device, sum(pages), PAGE_SIZE, D)
    weights, ks = torch.randn(s_q, sizes.index_heads, device=device), torch.zeros_like(ke)

    def select(t: slice, table: Tensor, batch_invariant: bool, **sequences: Tensor) -> Tensor:
        inputs = q[t], k, weights[t], sizes.topk, ks[t], ke[t]
        options = {"block_table": table, **sequences}
        positions = lightning_topk(*inputs, **options, batch_invariant=batch_invariant)
        return physical_slots(positions, page_size=PAGE_SIZE, **options)

    def together(batch_invariant: bool = False) -> Tensor:
        return select(slice(s_q), table, batch_invariant, cu_seqlens_q=cu_seqlens_q)

    def apart(batch_invariant: bool = False) -> list[Tensor]:
        """A caller that knows each length on the host cuts the table to it."""
        tables = (table[i : i + 1, : pages[i]] for i in range(n))
        sequences = zip(starmap(slice, pairwise(ends)), tables, strict=True)
        return [select(t, own, batch_invariant) for t, own in sequences]

    def check() -> None:
        same = torch.equal(together(True), torch.cat(apart(True)))
        assert same, "a sequence depends on its neighbours"

    parts = (index_work(m, length, sizes.index_heads, D) for m, length in zip(counts, lengths, strict=True))
    return Case({"one call": together, "a call per sequence": apart}, check, sum(parts, start=Work()))
