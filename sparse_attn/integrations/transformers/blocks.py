"""Attention to selected blocks of rows: MiniMax-M3.

An index head scores rows with plain dot products, the best row of a block speaks for all of them, and every
token selects some blocks for each kv head; those just before it and its own are always among them. Layers
without an indexer read all rows.

What padding does is as in transformers' own eager attention. Blocks begin at multiples of their size in the
cache, so padding on the left moves them, and a text selects otherwise than alone. The indexer knows positions
but no padding: a token sees the rows up to the number of its position, and blocks that hold padding, even
nothing else, may be selected and take a place. A token whose blocks hold no row that it may read gets the
mean of all values in the cache, also of later tokens and of unused rows. That happens to real tokens that
padding moved far from their positions, and to all but the first of several sequences packed in a row. It is
done for padding in every layer too, because index keys of padding have a part in what real tokens select.
Equal scores (those of such padding are) give the lower block, in transformers' layers any of them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.utils.import_utils import is_tracing

from ...ops.index import select_topk
from .attention import SparseAttention
from .dense import dense
from .grouped import attend_grouped
from .growth import update_index
from .inputs import Visible, query_chunks
from .selections import Indexer

_may_lack_rows = WeakTensorKeyDictionary()  # by the mask of a forward, so that it is looked at once


class BlockIndexer(Indexer):
    """Mixed into an indexer class of transformers."""

    rotation: Any  # transformers' function

    @torch.no_grad()
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        cache: Any,
        position_ids: Tensor,
    ) -> Tensor:
        """Blocks that each new token reads, ``[B, index_n_heads, S, index_topk_blocks]`` int32, ascending and
        -1 padded; recorded and replayed as ``[B, S, index_n_heads * index_topk_blocks]``.

        Args:
            position_ids: ``[B, S]``.
        """
        rotary = [x[..., : self.head_dim] for x in position_embeddings]
        k = self._rotate(self.k_norm(self.k_proj(hidden_states))[:, :, None], rotary).transpose(1, 2)
        if cache is not None:
            k = update_index(cache, k, self.layer_idx)
        k, (batch, s_q, _) = k[:, 0].float(), hidden_states.shape
        rows, heads, topk = k.shape[1], self.num_heads, self.topk_blocks
        own = (position_ids // self.block_size).int()[..., None, None]

        def select(t: slice) -> Tensor:
            keys, last = k[:, : rows - s_q + t.stop], own[:, t]  # rows behind are the future of all of them
            block = torch.arange(-(-keys.shape[1] // self.block_size), dtype=torch.int32, device=k.device)
            if len(block) <= topk:
                every = F.pad(torch.where(block <= last, block, -1), (0, topk - len(block)), value=-1)
                return every.expand(-1, -1, heads, -1).flatten(2)
            q = self.q_norm(self.q_proj(hidden_states[:, t]).unflatten(-1, (heads, self.head_dim)))
            q = self._rotate(q, [x[:, t] for x in rotary]).float()
            best = self._best_of_blocks(q, keys, position_ids[:, t])
            best = best.masked_fill((block <= last) & (block > last - self.local_blocks), torch.inf)
            stop = (last + 1).repeat(1, 1, heads, 1).flatten()
            return select_topk(best.flatten(0, 2), topk, ke=stop).view(batch, -1, heads * topk)

        chunks = query_chunks(s_q, batch * heads * rows * k.element_size())
        selected = self.selected(select, chunks, hidden_states)
        return selected.unflatten(2, (heads, -1)).transpose(1, 2)

    def _best_of_blocks(self, q: Tensor, keys: Tensor, position_ids: Tensor) -> Tensor:
        """The highest score in each block up to a query's own, ``[B, s_q, heads, blocks]``."""
        scores = torch.bmm(keys, q.flatten(1, 2).mT)  # [B, rows, s_q * heads]
        if self.local_blocks == 0:  # else a query's own block is selected whatever it holds
            row = torch.arange(keys.shape[1], device=keys.device)[:, None]
            future = row > position_ids.repeat_interleave(self.num_heads, 1)[:, None]
            scores.masked_fill_(future, -torch.inf)
        whole, rest = divmod(keys.shape[1], self.block_size)
        best = [scores[:, : whole * self.block_size].unflatten(1, (whole, self.block_size)).amax(2)]
        if rest:
            best.append(scores[:, -rest:].amax(1, keepdim=True))
        return torch.cat(best, 1).mT.contiguous().unflatten(1, q.shape[1:3])

    def _rotate(self, x: Tensor, rotary: list[Tensor]) -> Tensor:
        """``x`` ``[B, s_q, heads, head_dim]``."""
        return self.rotation(x, x, *rotary, unsqueeze_dim=2)[0]


class BlockAttention(SparseAttention):
    """Mixed into an attention class of transformers."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        *,
        scaling: float,
        block_indices: Tensor | None,
        position_ids: Tensor | None = None,
        **known,
    ) -> Tensor:
        """The attention function.

        Args:
            query: ``[B, heads, S, d]``.
            key, value: ``[B, kv_heads, T, d]`` and ``[B, kv_heads, T, d_v]``.
            mask: for :meth:`~.inputs.Visible.of`.
            block_indices: ``[B, kv_heads, S, blocks]``, negative for none; None to read all rows.
            position_ids: ``[B, S]`` or ``[1, S]``; by default the numbers of the rows.
            known: what :func:`~.inputs.check` let through.

        Returns:
            ``[B, S, heads, d_v]``.
        """
        batch, kv_heads, rows, _ = key.shape
        visible = Visible.of(mask, query.shape[2], rows)
        lacking = _some_may_lack_rows(mask, visible, position_ids, self.config)
        if block_indices is None:
            out = dense(query, key, value, mask, scaling, None)
            return _or_mean(out, value, _lacks_rows(visible)[..., None]) if lacking else out
        if block_indices.shape[1] != kv_heads:
            raise ValueError(
                f"index_n_heads: expected num_key_value_heads={kv_heads}, got {block_indices.shape[1]}"
            )
        table = _rows_of_blocks(visible, rows, self.config.index_block_size)
        sequence = torch.arange(batch, device=key.device)[:, None, None, None]
        blocks = block_indices.transpose(1, 2).clamp_min(-1)
        nothing = []

        def indices(t: slice) -> Tensor:
            found = table[sequence, blocks[:, t]].flatten(3)
            first, stop = visible.first[:, t, None, None], visible.stop[:, t, None, None]
            found.masked_fill_((found < first) | (found >= stop), -1)
            if lacking:
                nothing.append((found < 0).all(-1))
            return found

        per_token = batch * kv_heads * blocks.shape[3] * table.shape[2]
        out = attend_grouped(query, key, value, indices, scaling, per_token)
        return _or_mean(out, value, torch.cat(nothing, 1)) if lacking else out


def _rows_of_blocks(visible: Visible, rows: int, size: int) -> Tensor:
    """``[B, blocks + 1, size]`` int32: the rows in each block, -1 for padding and behind the last row. The
    block behind the last has none; it is also block -1."""
    return F.pad(visible.numbers(rows), (0, -rows % size + size), value=-1).unflatten(1, (-1, size))


def _some_may_lack_rows(mask: Tensor, visible: Visible, position_ids: Tensor | None, config: Any) -> bool:
    """Whether there may be a token whose blocks hold no row that it may read."""
    if visible.rows is not None or is_tracing(mask):
        return visible.rows is not None
    if mask not in _may_lack_rows:
        # A token reads at least the block of its position, if blocks before it are always selected.
        positions = visible.stop - 1 if position_ids is None else position_ids
        blocks = positions // config.index_block_size + (config.index_local_blocks > 0)
        stop = torch.minimum(visible.stop, blocks * config.index_block_size)
        _may_lack_rows[mask] = bool((stop <= visible.first).any())
    return _may_lack_rows[mask]


def _lacks_rows(visible: Visible) -> Tensor:
    """``[B, S]``: whether a token may read no row at all."""
    if visible.rows is None:
        return visible.stop <= visible.first
    return (visible.rows >= 0).cumsum(1).gather(1, visible.stop.long() - 1) == 0


def _or_mean(out: Tensor, value: Tensor, nothing: Tensor) -> Tensor:
    """``out`` ``[B, S, heads, d_v]``, but the mean of all values where ``nothing`` ``[B, S, kv_heads or 1]``
    was read."""
    of_kv_heads = out.unflatten(2, (value.shape[1], -1))
    mean = value.mean(2)[:, None, :, None]
    return torch.where(nothing[..., None, None], mean, of_kv_heads).flatten(2, 3)
