"""An exact selection over keys that the ranks of a context-parallel group share out.

Keys are dealt out as vLLM does: ``interleave`` consecutive positions to each rank in turn. A rank selects
among its own; a token of the global top-k is in the local one of the rank that stores it, so the k best of
all candidates are the selection of one process. A candidate travels as one int64, the score in its high half
and the inverted position in its low half: integers in a total order, in which ties go to the lower position.
"""

import torch
from torch import Tensor

LAST = 2**31 - 1  # no position is this one; inverted it is the lowest
NONE = torch.iinfo(torch.int64).min  # of a row that has fewer candidates than columns


def local_length(length: Tensor, rank: int, world: int, interleave: int) -> Tensor:
    """How many of a sequence's first ``length`` keys this rank stores."""
    rounds, rest = length // (interleave * world), length % (interleave * world)
    return rounds * interleave + (rest - rank * interleave).clamp(0, interleave)


def to_global(local: Tensor, rank: int, world: int, interleave: int) -> Tensor:
    """The position in the sequence of this rank's key number ``local``."""
    return local // interleave * (interleave * world) + rank * interleave + local % interleave


def to_local(position: Tensor, rank: int, world: int, interleave: int) -> Tensor:
    """The number among this rank's keys, -1 where another rank stores it or there is none."""
    mine = (position >= 0) & (position // interleave % world == rank)
    local = position // (interleave * world) * interleave + position % interleave
    return torch.where(mine, local, -1)


def candidates(local: Tensor, scores: Tensor, rank: int, world: int, interleave: int) -> Tensor:
    """``[s_q, topk]`` int64 from what this rank selected: its numbers, -1 padded, and fp32 scores."""
    bits = (scores + 0.0).view(torch.int32)  # the sum makes -0.0 a 0.0, which it equals
    ordered = torch.where(bits >= 0, bits, bits ^ LAST).long()
    inverted = LAST - to_global(local, rank, world, interleave).long()
    return torch.where(local >= 0, ordered << 32 | inverted, NONE)


def best(gathered: Tensor, topk: int) -> Tensor:
    """``[s_q, topk]`` int32 positions, ascending and -1 padded, from all ranks' ``[s_q, n]`` candidates."""
    kept = gathered.topk(topk, 1).values
    position = torch.where(kept == NONE, LAST, LAST - (kept & 0xFFFFFFFF)).sort(1).values
    return torch.where(position == LAST, -1, position).int()
