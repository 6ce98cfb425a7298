"""The lightning indexer over single tokens: DeepSeek-V3.2, GLM-5 and the families that took it over."""

from typing import Any

import torch
from torch import Tensor

from ...ops.index import lightning_topk
from .inputs import Visible, query_chunks, slots_of
from .selections import Indexer


class TokenIndexer(Indexer):
    """Mixed into an indexer class of transformers; families differ in how they make and rotate q and k."""

    rotation: Any  # transformers' function, half-split or interleaved
    rotates_last = False  # the trailing dimensions instead of the leading ones

    @torch.no_grad()
    def forward(
        self,
        hidden_states: Tensor,
        q_resid: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,  # the cache's name before transformers 5.24
    ) -> Tensor:
        """Rows of the cache that each new token attends to, ``[B, S, topk]`` int32, -1 padded."""
        cache = past_key_values if cache is None else cache
        k = self._rotated_key(hidden_states, position_embeddings)
        if cache is not None:
            k = cache.update_indexer(k, self.layer_idx)
        (batch, rows, d), s_q = k.shape, hidden_states.shape[1]
        visible = Visible.of(attention_mask, s_q, rows)

        def select(t: slice) -> Tensor:
            if rows <= self.index_topk:
                return visible.part(t).table(rows)
            positions = None if position_ids is None else position_ids[:, t]
            q = self._rotate(self._query(q_resid[:, t], positions), [x[:, t] for x in position_embeddings])
            weights = head_weights(self, hidden_states[:, t])
            return self._select(q, k, weights, visible.part(t))

        chunks = query_chunks(s_q, batch * self.n_heads * d * k.element_size())
        return self.selected(select, chunks, hidden_states)

    def _select(self, q: Tensor, k: Tensor, weights: Tensor, visible: Visible) -> Tensor:
        """For :func:`lightning`; ``[B, s_q, topk]``."""
        return lightning(q, k, weights, self.index_topk, visible)

    def _query(self, q_resid: Tensor, position_ids: Tensor | None) -> Tensor:
        """``[B, s_q, n_heads, head_dim]``."""
        return self.wq_b(q_resid).unflatten(-1, (-1, self.head_dim))

    def _key(self, hidden_states: Tensor) -> Tensor:
        """``[B, s_q, head_dim]``."""
        return self.k_norm(self.wk(hidden_states))

    def _rotated_key(self, hidden_states: Tensor, position_embeddings: Any) -> Tensor:
        """``[B, s_q, head_dim]``, as it is stored."""
        return self._rotate(self._key(hidden_states)[:, :, None], position_embeddings)[:, :, 0]

    def _rotate(self, x: Tensor, position_embeddings: Any) -> Tensor:
        """``x`` ``[B, s_q, heads, head_dim]`` with its RoPE dimensions rotated."""
        rope = self.qk_rope_head_dim
        passed, rotated = (
            x.split([self.head_dim - rope, rope], -1) if self.rotates_last else (x[..., rope:], x[..., :rope])
        )
        rotated, _ = self.rotation(rotated, rotated, *position_embeddings, unsqueeze_dim=2)
        return torch.cat([passed, rotated] if self.rotates_last else [rotated, passed], -1)


class HYV4Indexer(TokenIndexer):
    rotates_last = True

    def _key(self, hidden_states: Tensor) -> Tensor:
        k = self.wk(hidden_states).to(self.k_norm.weight.dtype)
        return self.k_norm(k).to(hidden_states.dtype)


class MistralIndexer(TokenIndexer):
    """Its queries come from the hidden states, and grow with the logarithm of their position."""

    def forward(self, hidden_states, position_embeddings, attention_mask, position_ids, **caches):  # type: ignore[override]
        inputs = hidden_states, self.q_input_norm(hidden_states), position_embeddings
        return super().forward(*inputs, attention_mask, position_ids, **caches)

    def _query(self, q_resid, position_ids):
        return self.softmax_scaling(super()._query(q_resid, position_ids), position_ids, head_dim_first=False)

    def _rotate(self, x, position_embeddings):
        return super()._rotate(x, position_embeddings) if self.use_rope else x


def head_weights(indexer: Any, hidden_states: Tensor) -> Tensor:
    """``[B, s_q, n_heads]`` in fp32 (fp64 for fp64 hidden states)."""
    weights = indexer.weights_proj(hidden_states.to(indexer.weights_proj.weight.dtype))
    weights = weights.to(torch.promote_types(hidden_states.dtype, torch.float32))
    return weights * (indexer.n_heads**-0.5 * indexer.softmax_scale)


def lightning(q: Tensor, k: Tensor, weights: Tensor, topk: int, visible: Visible) -> Tensor:
    """Rows of ``k`` ``[B, T, d]`` that each query selects, ``[B, s_q, topk]`` int32, -1 padded.

    Args:
        q: ``[B, s_q, heads, d]``.
        weights: ``[B, s_q, heads]`` fp32 (fp64 with fp64 q).
        visible: the rows that each query may select.
    """
    if visible.rows is None:  # a page is a sequence
        pages, table = k, torch.arange(len(k), dtype=torch.int32, device=k.device)[:, None]
    else:  # a page is a row, so that any row can be left out
        pages, table = k.flatten(0, 1)[:, None], slots_of(visible.rows[:, None], k.shape[1])
    ks, ke = visible.first.flatten(), visible.stop.flatten()
    selected = lightning_topk(q.flatten(0, 1), pages, weights.flatten(0, 1), topk, ks, ke, block_table=table)
    return selected.unflatten(0, q.shape[:2])
