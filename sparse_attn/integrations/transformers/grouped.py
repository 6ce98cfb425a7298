"""Grouped-query attention over the selected rows, inside the forwards of transformers' own layers."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...ops.attention import sparse_gqa
from .attention import SparseAttention
from .dense import dense
from .gradients import attend_with_gradients, divergence
from .indexers import AttentionScores, HiddenStates, IndexKeys
from .inputs import Visible, query_chunks

INDEX_BYTES = 8  # of an index while it is made: itself, and what it is compared with


class GroupedAttention(SparseAttention):
    """Mixed into an attention class of transformers that has no indexer; :func:`attach` gives it one."""

    indexer: AttentionScores | HiddenStates | None  # None for a layer with a window
    adapting: list[Tensor] | None = None  # in :func:`adapt`, where the indexer's losses go
    measured_by: Callable[..., None] | None = None  # in :func:`kept_attention`

    def selection(self, hidden_states: Tensor, kwargs: dict) -> dict:
        if not isinstance(self.indexer, HiddenStates):
            return {}
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if cache is not None:
            cache = IndexKeys(cache, self.config.num_hidden_layers)
        angles = _angles(kwargs.get("position_embeddings"))
        mask = kwargs.get("attention_mask")
        made = {"indices": self.indexer(hidden_states, hidden_states, angles, mask, cache=cache)}
        if self.adapting is not None:
            if cache is not None:
                raise ValueError("use_cache: expected False inside adapt(), got a cache")
            made["index_scores"] = self.indexer.scores_of(hidden_states.detach(), angles, made["indices"])
        return made

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        indices: Tensor | None = None,
        index_scores: Tensor | None = None,
        **known,
    ) -> Tensor:
        """The attention function.

        Args:
            query: ``[B, heads, S, d]``.
            key, value: ``[B, kv_heads, T, d]`` and ``[B, kv_heads, T, d_v]``.
            mask: for :meth:`~.inputs.Visible.of`.
            indices: ``[B, S, topk]`` int32, negative for none; by default those of the training-free indexer.
            index_scores: of these, with gradients; inside :func:`adapt`.

        Returns:
            ``[B, S, heads, d_v]``.

        Raises:
            TypeError: an option of the attention that changes its result, and that is not known here.
        """
        for name, option in known.items():
            if name not in self.accepted and option is not None:
                raise TypeError(
                    f"{name}: {type(self).__name__} does not know this option, got {option!r:.60}"
                )
        scaling = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
        if self.indexer is None:
            return dense(query, key, value, mask, scaling, sliding_window)
        selected: Tensor = self.indexer(query, key, mask, scaling) if indices is None else indices
        if self.measured_by is not None:
            self.measured_by(query, key, mask, selected, scaling)
        if self.adapting is not None:
            out, paid = attend_with_gradients(query, key, value, selected, scaling)
            if index_scores is not None:
                first, stop, _ = Visible.of(mask, query.shape[2], key.shape[2])
                ranked = (selected > first[..., None]) & (
                    selected < stop[..., None] - 1
                )  # not always selected
                self.adapting.append(divergence(paid, index_scores, ranked).mean())
            return out
        return attend_grouped(query, key, value, lambda t: selected[:, t], scaling)


def _angles(position_embeddings: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(position_embeddings, tuple) or len(position_embeddings) != 2:
        got = type(position_embeddings).__name__
        raise TypeError(f"position_embeddings: expected (cos, sin) for the indexer's rotation, got {got}")
    return position_embeddings


def attend_grouped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Callable[[slice], Tensor],
    scaling: float,
    indices_per_token: int = 0,
) -> Tensor:
    """Attention to the rows that each query reads.

    Args:
        query: ``[B, heads, S, d]``.
        key, value: ``[B, kv_heads, T, d]`` and ``[B, kv_heads, T, d_v]``.
        indices: gives those of some of the queries: ``[B, s_q, k]`` or ``[B, s_q, kv_heads, k]`` int32,
            negative for none.
        indices_per_token: how many those are, of all sequences and heads; for memory, where they are many.

    Returns:
        ``[B, S, heads, d_v]``.
    """
    batch, heads, s_q, d = query.shape
    k, v = key.transpose(1, 2), value.transpose(1, 2)
    q = query.transpose(1, 2)
    out = query.new_empty(batch, s_q, heads, value.shape[3])
    bytes_per_token = batch * heads * d * query.element_size() + INDEX_BYTES * indices_per_token
    for t in query_chunks(s_q, bytes_per_token):
        selected = indices(t)
        # A call for each sequence: their keys lie in one tensor, but not as rows of one distance.
        for b in range(batch):
            sparse_gqa(q[b, t], k[b], v[b], selected[b], softmax_scale=scaling, out=out[b, t])
    return out
