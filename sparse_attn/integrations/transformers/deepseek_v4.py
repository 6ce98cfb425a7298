"""The attention of DeepSeek-V4: a window of tokens, compressed entries behind it, and sinks.

A layer reads a window alone, or also one entry for every 4 tokens (CSA: the lightning indexer selects
among its entries) or for every 128 (HCA: every entry is read). transformers' forward joins both in one
tensor and one mask; the forward here gives them to the kernel as two segments of one softmax. ``R``: rows of
the window that the cache returns, the new tokens last. ``E``: entries so far; position p sees the entries
below ``(p + 1) // rate``.

As in transformers' own layers, the entries of a padded sequence pool its padding too, and before release
5.23 its caches did not follow the beams of a beam search.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4
from transformers.utils.import_utils import is_tracing

from ...ops.attention import sparse_mla
from .growth import append, same_kind
from .inputs import Visible, check, query_chunks, slots_of
from .selections import Indexer
from .tokens import lightning

CACHES = {
    "sliding_attention": DynamicSlidingWindowLayer,
    "compressed_sparse_attention": v4.DeepseekV4CSACache,
    "heavily_compressed_attention": v4.DeepseekV4HCACache,
}


class CompressedAttention:
    """Mixed into the attention class."""

    accepted: frozenset[str]
    __getattr__: Callable[[str], Any]  # for type checkers: the other attributes are those of transformers

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: dict[str, tuple[Tensor, Tensor]],  # cos and sin by rope_layer_type
        position_ids: Tensor,
        attention_mask: Tensor,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,  # the cache's name before transformers 5.24
        **kwargs,
    ) -> tuple[Tensor, None]:
        check(self, hidden_states, kwargs)
        cache = past_key_values if cache is None else cache
        states = None if cache is None else self._states(cache)
        batch, s_q, _ = hidden_states.shape
        cos, sin = (x.expand(batch, -1, -1) for x in position_embeddings[self.rope_layer_type])
        positions = position_ids.expand(batch, -1)
        q_residual = self.q_a_norm(self.q_a_proj(hidden_states))
        kv = v4.apply_rotary_pos_emb(self.kv_norm(self.kv_proj(hidden_states))[:, None], cos, sin)
        if cache is not None:
            kv, _ = cache.update(kv, kv, self.layer_idx, kwargs=kwargs)
        kv = kv[:, 0]
        rows = kv.shape[1]
        visible = Visible.of(attention_mask, s_q, rows)
        if cache is None and self.layer_idx == 0:  # once per model, as it waits for the device
            _check_not_packed(visible)
        entries, selected = None, None
        if self.compressor is not None:
            entries, selected = self.compressor(hidden_states, q_residual, positions, states)
        outs = []
        for t in query_chunks(s_q, batch * self.num_heads * self.head_dim * hidden_states.element_size()):
            q = self.q_b_norm(self.q_b_proj(q_residual[:, t]).unflatten(-1, (-1, self.head_dim)))
            q = v4.apply_rotary_pos_emb(q, cos[:, t], sin[:, t], unsqueeze_dim=2)
            window = _last_rows(visible.part(t), min(self.sliding_window, rows))
            extra_kv, extra_slots, extra_length = self._second_segment(entries, selected, positions, t)
            out = sparse_mla(
                q.flatten(0, 1),
                kv.flatten(0, 1),
                slots_of(window, rows),
                d_v=self.head_dim,
                softmax_scale=self.scaling,
                attn_sink=self.sinks.float(),
                extra_kv=extra_kv,
                extra_indices=extra_slots,
                extra_topk_length=extra_length,
            ).unflatten(0, (batch, -1))
            # Keys are values here: what their rotation did to the values is undone at the query's position.
            out = v4.apply_rotary_pos_emb(out, cos[:, t], -sin[:, t], unsqueeze_dim=2)
            out = out.flatten(2).unflatten(2, (self.config.o_groups, -1))
            outs.append(self.o_b_proj(self.o_a_proj(out).flatten(2)))
        return torch.cat(outs, 1), None

    def _states(self, cache: Cache) -> Any:
        """What the cache holds of this layer."""
        states = next(iter(getattr(cache, "layers", [])[self.layer_idx :]), None)
        expected = CACHES[self.layer_type]
        if not isinstance(states, expected):
            raise ValueError(
                f"cache: expected transformers.DynamicCache(config=model.config), whose layer "
                f"{self.layer_idx} is a {expected.__name__}, got {type(cache).__name__} with "
                f"{type(states).__name__}; static caches cannot hold compressed entries"
            )
        return states

    def _second_segment(
        self, entries: Tensor | None, selected: Tensor | None, positions: Tensor, t: slice
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of sparse_mla, for some of the tokens: rows, indices and their length."""
        if entries is None or entries.shape[1] == 0:
            return None, None, None
        batch, count, d = entries.shape
        length = None
        if selected is not None:
            selected = selected[:, t]
        else:
            stop = _entries_before(positions[:, t], self.compressor.compress_rate)
            every = torch.arange(count, dtype=torch.int32, device=entries.device)
            selected = every.expand(batch, stop.shape[1], -1)
            # With left padding there are more entries than the positions say. As in transformers, a single
            # token then sees them all.
            length = None if positions.shape[1] == 1 else stop.flatten()
        apart = entries.stride(0) // d  # there is room for more entries between the sequences
        rows = entries.as_strided(((batch - 1) * apart + count, d), (d, 1))
        return rows, slots_of(selected, apart), length


class Compressor:
    """Mixed into the classes of both compressors: one makes the entries of CSA, the other those of HCA."""

    name = "compressor"  # of its tokens and entries in the cache
    __getattr__: Callable[[str], Any]

    def forward(
        self, hidden_states: Tensor, q_residual: Tensor, positions: Tensor, states: Any
    ) -> tuple[Tensor, Tensor | None]:
        """All entries so far ``[B, E, head_dim]``, and which of them each new token reads
        ``[B, S, k]`` int32, -1 padded, if the layer has an indexer.

        Args:
            q_residual: ``[B, S, q_lora_rank]``.
            positions: ``[B, S]``.
            states: what the cache holds of the layer, or None.
        """
        entries = self.compress(hidden_states, states)
        indexer = getattr(self, "indexer", None)
        return entries, None if indexer is None else indexer(hidden_states, q_residual, positions, states)

    def compress(self, hidden_states: Tensor, states: Any) -> Tensor:
        """All entries so far, ``[B, E, head_dim]``: a gated mean of each group of ``rate`` tokens.

        The projections of CSA have two halves: an entry pools the second half of its own group and the
        first half of the group before it.
        """
        rate, d = self.compress_rate, self.head_dim
        kv, gate, start = self.kv_proj(hidden_states), self.gate_proj(hidden_states), 0
        if states is None:
            kv, gate = (x[:, : x.shape[1] // rate * rate] for x in (kv, gate))
        else:  # tokens of an unfinished group stay in the cache
            kv, gate, start = states.store_compression_weights(self.name, kv, gate)
        groups = kv.shape[1] // rate
        if groups == 0:
            entries = kv.new_zeros(len(kv), 0, d)
        else:
            kv = kv.unflatten(1, (groups, rate))
            gate = gate.unflatten(1, (groups, rate)) + self.position_bias
            if kv.shape[-1] == 2 * d:
                kv, gate = self._overlapping(kv, gate, states)
            pooled = self.kv_norm((kv * gate.softmax(2, dtype=torch.float32).to(kv.dtype)).sum(2))
            at = start + rate * torch.arange(groups, device=kv.device)
            cos, sin = self.rotary_emb(pooled, position_ids=at[None], layer_type=self.rope_layer_type)
            entries = v4.apply_rotary_pos_emb(pooled[:, None], cos, sin)[:, 0]
        return entries if states is None else self._store(entries, states)

    def _store(self, entries: Tensor, states: Any) -> Tensor:
        """Also those that were stored before; transformers' own method copies them."""
        held = states.compressed_kv[self.name]
        if is_tracing(entries) or not same_kind(held, entries):
            return states.update_compressor_states(self.name, entries)
        states.compressed_kv[self.name] = append(held, entries)
        states.entry_count[self.name] += entries.shape[1]
        return states.compressed_kv[self.name]

    def _overlapping(self, kv: Tensor, gate: Tensor, states: Any) -> tuple[Tensor, Tensor]:
        """``[B, groups, rate, 2 * d]`` to ``[B, groups, 2 * rate, d]``: the previous group's first half, then
        this group's second half. Before the first group there is nothing, with a gate of -inf."""
        d = self.head_dim
        before = (None, None) if states is None else states.update_overlap_state(self.name, kv, gate, d)
        out = []
        for x, first, nothing in ((kv, before[0], 0.0), (gate, before[1], float("-inf"))):
            if first is None:
                first = x.new_full((len(x), x.shape[2], d), nothing)
            previous = torch.cat([first[:, None].to(x.dtype), x[:, :-1, :, :d]], 1)
            out.append(torch.cat([previous, x[..., d:]], 2))
        return out[0], out[1]


class CompressedIndexer(Compressor, Indexer):
    """Mixed into the indexer class, which has a small compressor of its own for its keys."""

    name = "indexer"

    @torch.no_grad()
    def forward(self, hidden_states: Tensor, q_residual: Tensor, positions: Tensor, states: Any) -> Tensor:  # type: ignore[override]
        """The entries that each new token reads, ``[B, S, k]`` int32, -1 padded."""
        k = self.compress(hidden_states, states)
        batch, count, d = k.shape
        stop = _entries_before(positions, self.compress_rate)
        visible = Visible(torch.zeros_like(stop), stop, None)

        def select(t: slice) -> Tensor:
            if count <= self.index_topk:
                return visible.part(t).table(count)
            x = hidden_states[:, t]
            cos, sin = self.rotary_emb(x, position_ids=positions[:, t], layer_type=self.rope_layer_type)
            q = self.q_b_proj(q_residual[:, t]).unflatten(-1, (-1, d))
            q = v4.apply_rotary_pos_emb(q, cos, sin, unsqueeze_dim=2)
            weights = self.scorer.weights_proj(x).to(torch.promote_types(q.dtype, torch.float32))
            weights = weights * (self.scorer.weights_scaling * self.scorer.softmax_scale)
            return lightning(q, k, weights, self.index_topk, visible.part(t))

        chunks = query_chunks(len(positions[0]), batch * self.num_heads * d * k.element_size())
        return self.selected(select, chunks, hidden_states)


def _entries_before(positions: Tensor, rate: int) -> Tensor:
    """How many entries each position sees, int32."""
    return (positions + 1).div(rate, rounding_mode="floor").int()


def _last_rows(visible: Visible, width: int) -> Tensor:
    """The last ``width`` rows that each token may read, ``[B, s_q, width]`` int32, -1 for none."""
    back = torch.arange(width, 0, -1, dtype=torch.int32, device=visible.stop.device)
    rows = visible.stop[..., None] - back
    exists = rows >= visible.first[..., None]
    if visible.rows is not None:
        numbers = visible.rows.gather(1, rows.clamp_min(0).long().flatten(1)).view_as(rows)
        exists &= numbers >= 0
    return torch.where(exists, rows, -1)


def _check_not_packed(visible: Visible) -> None:
    if (visible.first != visible.first[:, :1]).any():
        raise ValueError(
            "position_ids: expected each to follow the one before it; several sequences packed in a row "
            "would share compressed entries, so give each a row of its own"
        )
