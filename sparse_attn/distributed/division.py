"""How the ranks of a mesh share the work of an attention layer.

Heads are divided over all ranks of the mesh, keys over those along its dimension "cp". Every rank has all
hidden states, and all have the whole output in the end. For a few new tokens queries and outputs travel, and
each rank selects and attends among its own keys; for many the keys travel, in parts that fit a workspace.
Both give the selection of one process.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..checkpoint import Part
from ..ops.attention import merge_attention
from ..ops.index import DEFAULT_WORKSPACE_BYTES, lightning_topk
from . import traffic
from .ranks import Ranks, calls_of
from .shards import Shards, best, candidates, global_merge, global_topk, joined, parts, valid_first

if TYPE_CHECKING:
    from ..cache import DSACache, Placement
    from ..config import DSAConfig

TENSOR, CONTEXT = "tp", "cp"  # names of the mesh's dimensions
Rows: TypeAlias = dict[str, Tensor]
# (q, rows, indices, **options of sparse_mla) -> out, or out and lse; rows are [n, ...] by names of the cache.
Attention: TypeAlias = Callable[..., Any]
HERE = Shards(Ranks())  # all keys are in this process


class Division:
    """Of a layer over a mesh; without one everything stays in this process.

    Args:
        mesh: a DeviceMesh with a dimension "tp", "cp" or both.
        config: of the layer.
    """

    def __init__(self, mesh: DeviceMesh | None, config: "DSAConfig") -> None:
        self.tp = self.cp = Ranks()
        self.calls = None
        if mesh is not None:
            if not isinstance(mesh, DeviceMesh):
                raise TypeError(f"mesh: expected a DeviceMesh, got {type(mesh).__name__}")
            names = mesh.mesh_dim_names or ()
            if not names or set(names) - {TENSOR, CONTEXT}:
                raise ValueError(
                    f"mesh: expected dimensions named {TENSOR!r}, {CONTEXT!r} or both, such as "
                    f"mesh[{TENSOR!r}, {CONTEXT!r}] of a larger one, got {names or None}"
                )
            self.tp, self.cp = (Ranks.of(mesh, n) if n in names else Ranks() for n in (TENSOR, CONTEXT))
            self.calls = calls_of(mesh)
        self.size = self.tp.size * self.cp.size
        self.rank = self.tp.rank * self.cp.size + self.cp.rank
        heads = config.num_attention_heads
        if heads % self.size:
            raise ValueError(
                f"mesh: expected a number of ranks that divides num_attention_heads={heads}, got {self.size}"
            )
        self.heads = heads // self.size
        self.kv_heads, self._own_kv = 1, slice(None)
        if not config.is_mla:
            self._divide_kv_heads(config.num_key_value_heads, heads // config.num_key_value_heads)

    def _divide_kv_heads(self, kv_heads: int, shared: int) -> None:
        """Along "tp"; along "cp" ranks take whole kv heads of these, or part of the query heads of one."""
        if kv_heads % self.tp.size or (self.heads % shared and shared % self.heads):
            raise ValueError(
                f"mesh: expected ranks that share out num_key_value_heads={kv_heads} of {shared} query heads "
                f"each, got {self.tp.size} along {TENSOR!r} and {self.cp.size} along {CONTEXT!r}"
            )
        self.kv_heads = kv_heads // self.tp.size
        first = self.cp.rank * self.heads // shared
        self._own_kv = slice(first, first + max(1, self.heads // shared))

    def parts(
        self, by_heads: Mapping[str, int], by_kv_heads: Mapping[str, int] | None = None
    ) -> dict[str, Part]:
        """This rank's part of weights that are divided along a dimension: by heads of queries or of keys."""
        owns = {name: Part(dim, self.rank, self.size) for name, dim in by_heads.items()}
        owns |= {name: Part(dim, self.tp.rank, self.tp.size) for name, dim in (by_kv_heads or {}).items()}
        return {name: part for name, part in owns.items() if part.of > 1}

    def together(self):
        """Around a call of the layer: see :meth:`Calls.together`."""
        return contextlib.nullcontext() if self.calls is None else self.calls.together()

    def sum(self, out: Tensor) -> Tensor:
        """Over all ranks, in place."""
        return self.tp.sum(self.cp.sum(out))

    def spread(self, select: Callable[[int, int], Tensor], queries: int, *over: Ranks) -> Tensor:
        """``select(0, queries)``, of which each rank computes a part; it selects for a range of queries."""
        if not over:
            return select(0, queries)
        ranks, *others = over
        if ranks.size == 1 or queries < 2:
            return self.spread(select, queries, *others)
        begin, end = parts(queries, ranks.size)[ranks.rank]
        mine = self.spread(lambda a, b: select(begin + a, begin + b), end - begin, *others)
        return joined(ranks.gather(mine), queries)

    def select(
        self,
        q: Tensor,
        k: Tensor,
        weights: Tensor,
        topk: int,
        placement: "Placement",
        cache: "DSACache | None",
        backend: str,
    ) -> Tensor:
        """Positions that each query attends to, ``[tokens, topk]`` int32, -1 padded.

        The index keys are those of the cache; without one k ``[tokens, d]``.
        """
        if cache is not None:
            return self._select_in_cache(q, weights, topk, placement, cache, backend)

        def select(begin: int, end: int) -> Tensor:
            ks = placement.first_rows[begin:end].int()
            ke = ks + placement.positions[begin:end].int() + 1
            inputs = q[begin:end], k, weights[begin:end], topk, ks, ke
            rows = global_topk(*inputs, shards=HERE, backend=backend)
            return torch.where(rows >= 0, rows - ks[:, None], -1)

        return self.spread(select, q.shape[0], self.tp, self.cp)

    def _select_in_cache(self, q, weights, topk, placement, cache, backend) -> Tensor:
        shards, tokens = cache.shards, q.shape[0]
        stored = [x for x in cache.index_keys(placement.longest) if x is not None]
        table = torch.arange(cache.batch_size, dtype=torch.int32, device=q.device)[:, None]
        own, columns = traffic.share(tokens, self.tp.size), min(topk, stored[0].shape[1])
        with_keys = _bytes(stored, shards.size) + traffic.selected(own, topk, shards.size)
        keys_travel = with_keys < traffic.candidates(own, columns, topk, shards.size)

        def select(begin: int, end: int) -> Tensor:
            queries = q[begin:end], weights[begin:end]
            options = {
                "ke": (placement.positions[begin:end] + 1).int(),
                "cu_seqlens_q": placement.cu_seqlens_q.clamp(begin, end) - begin,
                "block_table": table,
                "backend": backend,
            }
            if keys_travel:
                return _topk_of_gathered(*queries, topk, stored, shards, **options)
            k, k_scale = stored[0], stored[1] if len(stored) > 1 else None
            options |= {"k_scale": k_scale, "shards": shards, "max_length": placement.longest}
            return global_topk(queries[0], k, queries[1], topk, **options)

        over = (self.tp,) if shards.size > 1 and not keys_travel else (self.tp, self.cp)
        return self.spread(select, tokens, *over)

    def attend(
        self,
        attention: Attention,
        q: Tensor,
        rows: Rows,
        positions: Tensor,
        placement: "Placement",
        cache: "DSACache | None",
        d_v: int,
    ) -> Tensor:
        """``[tokens, heads, d_v]`` of this rank's heads, from its queries and all selected positions.

        rows are ``[batch_size, rows per sequence, ...]`` of the cache, or without one ``[tokens, ...]``.
        """
        if cache is None or cache.shards.size == 1:
            if cache is not None:
                rows = {name: x.flatten(0, 1) for name, x in rows.items()}
            return attention(q, self._of_own_heads(rows), placement.rows(positions))
        size, n = cache.shards.size, cache.shards.rows(placement.longest)
        filled = {name: x[:, :n] for name, x in rows.items()}
        sizes = self.heads, q.shape[2], d_v, q.element_size(), size
        if _bytes([*filled.values()], size) < traffic.partial_outputs(len(q), *sizes):
            return self._attend_to_gathered(attention, q, filled, positions, placement, cache)
        return self._attend_to_shards(attention, q, rows, positions, placement, cache.shards, d_v)

    def _attend_to_shards(self, attention, q, rows, positions, placement, shards, d_v) -> Tensor:
        """All heads of the ranks that share out the keys attend to this rank's, in parts of the queries."""
        rows, results = {name: x.flatten(0, 1) for name, x in rows.items()}, []
        query_bytes = self.cp.size * q.shape[1] * (q.shape[2] + 2 * d_v) * q.element_size()
        step = max(1, DEFAULT_WORKSPACE_BYTES // query_bytes)
        for begin in range(0, max(1, len(q)), step):
            part = slice(begin, begin + step)
            every = self.cp.gather(q[part]).movedim(0, 1).flatten(1, 2)
            local, length = shards.own(positions[part])
            mine = torch.where(local >= 0, local + placement.first_rows[part, None], -1).int()
            out, lse = attention(every, rows, mine, topk_length=length, return_lse=True)
            results.append(global_merge(out, lse, shards, own_heads=True)[0])
        return torch.cat(results) if len(results) > 1 else results[0]

    def _attend_to_gathered(self, attention, q, rows, positions, placement, cache) -> Tensor:
        """This rank's heads attend to keys that are gathered, a part of the positions at a time."""
        sequences, merged = placement.first_rows // cache.capacity, None
        for first, tensors in _gathered([*rows.values()], cache.shards):
            held, place = tensors[0].shape[1], positions - first
            here = (place >= 0) & (place < held)
            selected = torch.where(here, place + sequences[:, None] * held, -1).int()
            options: dict[str, Any] = {"return_lse": True}
            if held < placement.longest:  # else no column belongs to another part
                selected, options["topk_length"] = valid_first(selected)
            part = {name: x.flatten(0, 1) for name, x in zip(rows, tensors, strict=True)}
            new = attention(q, self._of_own_heads(part), selected, **options)
            merged = merge_attention(*zip(merged, new, strict=True)) if merged else new
        assert merged is not None
        return merged[0]

    def _of_own_heads(self, rows: Rows) -> Rows:
        """Without the kv heads that only other ranks' queries read."""
        if self._own_kv == slice(None):
            return rows
        return {name: x[:, self._own_kv] for name, x in rows.items()}


def _bytes(tensors: list[Tensor], size: int) -> int:
    """What each rank receives if all get these tensors ``[n, rows, ...]`` of all."""
    return sum(traffic.keys(x.shape[0] * x.shape[1], _row_bytes(x), size) for x in tensors)


def _row_bytes(x: Tensor) -> int:
    return math.prod(x.shape[2:]) * x.element_size()


def _gathered(tensors: list[Tensor], shards: Shards) -> Iterator[tuple[int, list[Tensor]]]:
    """``(first position, [n, positions, ...] of each tensor)``, of all ranks' ``[n, rows, ...]`` in parts."""
    n, rows = tensors[0].shape[:2]
    # As they arrive, and in order.
    held = 2 * shards.size * n * sum(map(_row_bytes, tensors))
    step = max(1, DEFAULT_WORKSPACE_BYTES // held // shards.interleave) * shards.interleave
    for begin in range(0, rows, step):
        yield begin * shards.size, [shards.gather(x[:, begin : begin + step]) for x in tensors]


def _topk_of_gathered(
    q: Tensor, weights: Tensor, topk: int, stored: list[Tensor], shards: Shards, *, ke: Tensor, **options
) -> Tensor:
    """As :func:`global_topk`, for queries that differ between the ranks."""
    kept = None
    for first, (k, *scales) in _gathered(stored, shards):
        options["k_scale"] = scales[0] if scales else None
        if k.shape[1] == shards.size * stored[0].shape[1]:  # all of them, so that nothing is to be merged
            return lightning_topk(q, k, weights, topk, ke=ke, **options)
        seen = (ke - first).clamp(0, k.shape[1])
        found, scores = lightning_topk(q, k, weights, topk, ke=seen, return_scores=True, **options)
        new = candidates(torch.where(found >= 0, found + first, -1), scores)
        kept = new if kept is None else torch.cat([kept, new], 1).topk(topk, 1, sorted=False).values
    assert kept is not None
    return best(kept, topk)
