"""Keys that several processes share out, and selection and attention over all of them, exactly.

Keys are dealt out as vLLM does: ``interleave`` consecutive positions to each rank in turn. A rank selects
among its own; a token of the global top-k is in the local one of the rank that stores it, so the k best of
all candidates are the selection of one process. A candidate travels as one int64, the score in its high half
and the inverted position in its low half: integers in a total order, in which ties go to the lower position.
"""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..ops import check
from ..ops.attention import merge_attention
from ..ops.index import lightning_topk
from . import traffic
from .ranks import Ranks

LAST = 2**31 - 1  # no position is this one; inverted it is the lowest
NONE = torch.iinfo(torch.int64).min  # of a row that has fewer candidates than columns


class Shards:
    """Which positions of a sequence each rank stores: position p rank ``p // interleave % size``.

    Its arithmetic works on tensors of integers of any shape, on their device, without a synchronisation.

    Args:
        ranks: a DeviceMesh of one dimension, whose processes store the keys together; or :class:`Ranks`.
        interleave: consecutive positions on one rank. 1 spreads the selected tokens most evenly.
    """

    def __init__(self, ranks: DeviceMesh | Ranks, interleave: int = 1) -> None:
        check.integer("interleave", interleave)
        if isinstance(ranks, DeviceMesh):
            if ranks.ndim != 1:
                raise ValueError(
                    f"ranks: expected a mesh of one dimension, such as mesh['cp'], got {ranks.ndim} of them"
                )
            ranks = Ranks.of(ranks)
        if not isinstance(ranks, Ranks):
            raise TypeError(f"ranks: expected a DeviceMesh, got {type(ranks).__name__}")
        self.ranks, self.interleave = ranks, interleave

    @property
    def size(self) -> int:
        return self.ranks.size

    @property
    def _round(self) -> int:
        """Positions that all ranks take together before the first is dealt to again."""
        return self.interleave * self.size

    def rows(self, length: int) -> int:
        """Rows that hold a rank's part of the first ``length`` positions: the same number on every rank."""
        return -(-length // self._round) * self.interleave

    def local_length(self, length: Tensor) -> Tensor:
        """How many of a sequence's first ``length`` positions this rank stores."""
        rest = length % self._round - self.ranks.rank * self.interleave
        return length // self._round * self.interleave + rest.clamp(0, self.interleave)

    def to_global(self, local: Tensor) -> Tensor:
        """The position of this rank's key number ``local``; -1 stays."""
        first = local // self.interleave * self._round + self.ranks.rank * self.interleave
        return torch.where(local >= 0, first + local % self.interleave, -1)

    def to_local(self, position: Tensor) -> Tensor:
        """The number among this rank's keys; -1 where another rank stores it, or position is negative."""
        mine = (position >= 0) & (position // self.interleave % self.size == self.ranks.rank)
        local = position // self._round * self.interleave + position % self.interleave
        return torch.where(mine, local, -1)

    def own(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What this rank reads of selections ``[s_q, topk]``: the numbers of its keys, with -1 after them,
        and how many they are, ``[s_q]`` int32: the ``topk_length`` that saves a GPU's kernels the rest.
        """
        return valid_first(self.to_local(positions))

    def gather(self, x: Tensor) -> Tensor:
        """``[n, size * rows, ...]`` in the order of positions, from every rank's ``[n, rows, ...]``.

        rows is a multiple of interleave.
        """
        if self.size == 1:
            return x
        every = self.ranks.gather(x)  # [size, n, rows, ...]
        return every.unflatten(2, (-1, self.interleave)).movedim(0, 2).flatten(1, 3)


def valid_first(indices: Tensor) -> tuple[Tensor, Tensor]:
    """``[s_q, topk]`` in descending order, -1 at the end, and how many come before it, ``[s_q]`` int32."""
    ordered = indices.sort(1, descending=True).values
    return ordered, (ordered >= 0).sum(1, dtype=torch.int32)


def candidates(position: Tensor, scores: Tensor) -> Tensor:
    """``[s_q, n]`` int64 from selected positions, -1 where there is none, and their fp32 scores."""
    bits = (scores + 0.0).view(torch.int32)  # the sum makes -0.0 a 0.0, which it equals
    ordered = torch.where(bits >= 0, bits, bits ^ LAST).long()
    return torch.where(position >= 0, ordered << 32 | (LAST - position.long()), NONE)


def best(gathered: Tensor, topk: int) -> Tensor:
    """``[s_q, topk]`` int32 positions, ascending and -1 padded, from ``[s_q, n]`` candidates, n >= topk."""
    kept = gathered.topk(topk, 1, sorted=False).values
    position = torch.where(kept == NONE, LAST, LAST - (kept & 0xFFFFFFFF)).int().sort(1).values
    return torch.where(position == LAST, -1, position)


def global_topk(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    topk: int,
    ks: Tensor | None = None,
    ke: Tensor | None = None,
    *,
    shards: Shards,
    max_length: int | None = None,
    **options,
) -> Tensor:
    """:func:`sparse_attn.lightning_topk` over keys that several ranks store; the same on each of them.

    Every rank calls it with the same arguments but its own ``k``. If logits are equal, so are the selected
    positions to those that one process selects among all keys, ties included. On a CPU the C++ kernels give
    equal logits; elsewhere ``batch_invariant=True`` does.

    Args:
        q, weights, topk: as for one process.
        k: this rank's keys, of one sequence in the order of its positions; or with ``block_table`` (and
            ``cu_seqlens_q``) pages of them, ``[pages, page_size, ...]``.
        ks, ke: ``[s_q]`` int32, positions of the whole sequence; by default a query sees all keys.
        shards: who stores which position.
        max_length: the most keys that a query sees, if that is known on the host: where a rank stores fewer
            than topk of them, fewer candidates travel.
        options: others of :func:`sparse_attn.lightning_topk`, but ``return_scores`` and ``out``.

    Returns:
        ``[s_q, topk]`` int32 positions of the whole sequence, ascending, -1 padded.
    """
    if not isinstance(shards, Shards):
        raise TypeError(f"shards: expected Shards, got {type(shards).__name__}")
    if shards.size == 1:
        return lightning_topk(q, k, weights, topk, ks, ke, **options)
    if isinstance(q, Tensor) and q.dtype == torch.float64:
        raise TypeError("q: expected a dtype of at most 32 bits, as scores travel as fp32, got float64")
    check.integer("topk", topk)
    columns = topk if max_length is None else min(topk, max(1, shards.rows(max_length)))
    own = [None if x is None else shards.local_length(x).int() for x in (ks, ke)]
    local, scores = lightning_topk(q, k, weights, columns, *own, return_scores=True, **options)
    found = candidates(shards.to_global(local), scores)
    if columns * shards.size < topk:
        found = torch.nn.functional.pad(found, (0, topk - columns), value=NONE)
    ranks, queries = shards.ranks, found.shape[0]
    if queries < 2:
        return best(ranks.gather(found).movedim(0, 1).flatten(1), topk)
    # Each rank merges the candidates of its share of the queries.
    every = torch.stack([found[slice(*part)] for part in parts(queries, ranks.size)])
    mine = best(ranks.exchange(every).movedim(0, 1).flatten(1), topk)
    return joined(ranks.gather(mine), queries)


def parts(queries: int, size: int) -> list[tuple[int, int]]:
    """The range of queries that each rank takes. All are of one size, so some of them may overlap."""
    n = traffic.share(queries, size)
    return [(begin, begin + n) for begin in (min(rank * n, queries - n) for rank in range(size))]


def joined(results: Tensor, queries: int) -> Tensor:
    """``[queries, ...]`` from the results ``[size, n, ...]`` for those :func:`parts`."""
    size, n = results.shape[:2]
    if size * n == queries:
        return results.flatten(0, 1)
    query = torch.arange(queries, device=results.device)
    rank = query // n
    return results[rank, query - (rank * n).clamp(max=queries - n)]


def global_merge(
    out: Tensor, lse: Tensor, shards: Shards, *, own_heads: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """:func:`sparse_attn.merge_attention` of the outputs that each rank computed over its own keys.

    Args:
        out: ``[s_q, h, d_v]``, of the same queries on every rank.
        lse: ``[s_q, h]`` fp32.
        shards: who stores which keys.
        own_heads: return only this rank's part of the heads, ``h / size`` of them, as an output projection
            that is divided by heads needs them: size times fewer bytes travel.

    Returns:
        out ``[s_q, h, d_v]`` and lse ``[s_q, h]``, or with own_heads ``h / size`` heads of them.
    """
    if not isinstance(shards, Shards):
        raise TypeError(f"shards: expected Shards, got {type(shards).__name__}")
    dims: dict[str, int] = {}
    check.tensor("out", out, "s_q h d_v", dims, check.WRITER_FLOATS)
    check.tensor("lse", lse, "s_q h", dims, (torch.float32,), out.device)
    ranks, (_, heads, d_v) = shards.ranks, out.shape
    if ranks.size == 1:
        return out, lse
    # One message: the bytes of an output, then those of its lse.
    message = torch.cat(
        [out.contiguous().view(torch.uint8), lse[..., None].contiguous().view(torch.uint8)], -1
    )
    if own_heads:
        if heads % ranks.size:
            raise ValueError(f"out: expected heads that {ranks.size} ranks can share, got {heads}")
        every = ranks.exchange(message.unflatten(1, (ranks.size, -1)).movedim(1, 0))
    else:
        every = ranks.gather(message)
    outs = every[..., : d_v * out.element_size()].contiguous().view(out.dtype)
    lses = every[..., d_v * out.element_size() :].contiguous().view(torch.float32)[..., 0]
    return merge_attention(outs, lses, backend=backend)
