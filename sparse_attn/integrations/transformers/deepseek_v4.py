"""The attention of DeepSeek-V4: a window of tokens, compressed entries behind it, and sinks.

A layer reads a window alone, or also one entry for every 4 tokens (CSA: the lightning indexer selects
among its entries) or for every 128 (HCA: every entry is read). Window and entries are the two segments
of one softmax. ``R``: rows of the window that the cache returns, the new tokens last. ``E``: entries so
far; position p sees the entries below ``(p + 1) // rate``.

As in transformers' own layers, the entries of a padded sequence pool its padding too, and before release
5.23 its caches did not follow the beams of a beam search.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4

from ...ops.attention import sparse_mla
from ...ops.index import lightning_topk
from .inputs import PACKED, check, check_rows, query_chunks, slots_of


class SparseDeepseekV4Attention(v4.DeepseekV4Attention):
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any,  # cos and sin by rope_layer_type
        position_ids: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, None]:
        check(self, hidden_states, attention_mask, kwargs)
        cache = self._layer_of(past_key_values)
        if cache is None and attention_mask is None and (position_ids.diff(dim=1) != 1).any():
            raise ValueError(f"position_ids: expected each to follow the one before it; {PACKED}")
        batch, s_q, _ = hidden_states.shape
        cos, sin = (x.expand(batch, -1, -1) for x in position_embeddings[self.rope_layer_type])
        positions = position_ids.expand(batch, -1)
        q_residual = self.q_a_norm(self.q_a_proj(hidden_states))
        kv = v4.apply_rotary_pos_emb(self.kv_norm(self.kv_proj(hidden_states))[:, None], cos, sin)
        if past_key_values is not None:
            kv, _ = past_key_values.update(kv, kv, self.layer_idx)
        kv = kv[:, 0]
        rows = kv.shape[1]
        check_rows(attention_mask, batch, rows)
        entries, index_k = self._entries(hidden_states, cache)
        outs = []
        for t in query_chunks(s_q, batch * self.num_heads * self.head_dim * hidden_states.element_size()):
            q = self.q_b_norm(self.q_b_proj(q_residual[:, t]).unflatten(-1, (-1, self.head_dim)))
            q = v4.apply_rotary_pos_emb(q, cos[:, t], sin[:, t], unsqueeze_dim=2)
            window = self._window(t, s_q, attention_mask, batch, rows, q.device)
            inputs = hidden_states[:, t], q_residual[:, t], positions[:, t]
            extra = self._visible_entries(*inputs, entries, index_k, s_q)
            out = sparse_mla(
                q.flatten(0, 1),
                kv.flatten(0, 1),
                slots_of(window, rows),
                d_v=self.head_dim,
                softmax_scale=self.scaling,
                attn_sink=self.sinks.float(),
                **extra,
            ).unflatten(0, (batch, -1))
            # Keys are values here: what their rotation did to the values is undone at the query's position.
            out = v4.apply_rotary_pos_emb(out, cos[:, t], -sin[:, t], unsqueeze_dim=2)
            out = out.flatten(2).unflatten(2, (self.config.o_groups, -1))
            outs.append(self.o_b_proj(self.o_a_proj(out).flatten(2)))
        return torch.cat(outs, 1), None

    def _layer_of(self, past_key_values):
        """The cache of this layer, or None."""
        if past_key_values is None:
            return None
        cache = next(iter(past_key_values.layers[self.layer_idx :]), None)
        expected = CACHES[self.layer_type]
        if not isinstance(cache, expected):
            raise ValueError(
                f"past_key_values: expected transformers.DynamicCache(config=model.config), whose layer "
                f"{self.layer_idx} is a {expected.__name__}, got {type(past_key_values).__name__} with "
                f"{type(cache).__name__}; static caches cannot hold compressed entries"
            )
        return cache

    def _window(self, t: slice, s_q: int, padding, batch: int, rows: int, device) -> Tensor:
        """The rows in each token's window, ``[B, tokens, min(sliding_window, R)]`` int32, -1 for none."""
        width = min(self.sliding_window, rows)
        last = torch.arange(t.start, t.stop, dtype=torch.int32, device=device) + (rows - s_q)
        window = last[:, None] - torch.arange(width - 1, -1, -1, dtype=torch.int32, device=device)
        visible = (window >= 0).expand(batch, -1, -1)
        if padding is not None:
            visible = visible & padding[:, window.clamp_min(0)]
        return torch.where(visible, window, -1)

    def _entries(self, hidden_states: Tensor, cache) -> tuple[Tensor | None, Tensor | None]:
        """Entries ``[B, E, head_dim]`` and the indexer's keys of them ``[B, E, index_head_dim]``, where the
        layer has them."""
        if self.compressor is None:
            return None, None
        indexer = getattr(self.compressor, "indexer", None)
        entries = _compress(self.compressor, hidden_states, cache, "compressor", overlap=indexer is not None)
        if indexer is None:
            return entries, None
        return entries, _compress(indexer, hidden_states, cache, "indexer", overlap=True)

    def _visible_entries(
        self, hidden_states, q_residual, positions, entries, index_k, s_q: int
    ) -> dict[str, Any]:
        """The second segment of sparse_mla for some tokens: entries, which of them each reads, how many."""
        if self.compressor is None or entries is None or entries.shape[1] == 0:
            return {}
        batch, count, _ = entries.shape
        stop = (positions + 1).div(self.compressor.compress_rate, rounding_mode="floor").int()
        if index_k is not None and count > self.compressor.indexer.index_topk:
            inputs = hidden_states, q_residual, positions
            selected, length = _select(self.compressor.indexer, *inputs, index_k, stop), None
        else:
            every = torch.arange(count, dtype=torch.int32, device=stop.device)
            selected = every.expand(batch, stop.shape[1], -1)
            # With left padding there are more entries than the positions say. As in transformers, a single
            # token then sees all entries of an HCA layer.
            length = None if index_k is None and s_q == 1 else stop.flatten()
        indices = slots_of(selected, count)
        return {"extra_kv": entries.flatten(0, 1), "extra_indices": indices, "extra_topk_length": length}


def _select(indexer: v4.DeepseekV4Indexer, hidden_states, q_residual, positions, index_k, stop) -> Tensor:
    """The entries that each token reads, ``[B, tokens, index_topk]`` int32, -1 padded."""
    batch = hidden_states.shape[0]
    q = indexer.q_b_proj(q_residual).unflatten(-1, (-1, indexer.head_dim))
    cos, sin = indexer.rotary_emb(hidden_states, position_ids=positions, layer_type=indexer.rope_layer_type)
    q = v4.apply_rotary_pos_emb(q, cos, sin, unsqueeze_dim=2).flatten(0, 1)
    scorer = indexer.scorer
    weights = scorer.weights_proj(hidden_states)
    weights = weights.to(torch.promote_types(q.dtype, torch.float32)).flatten(0, 1)
    weights = weights * (scorer.weights_scaling * scorer.softmax_scale)
    table = torch.arange(batch, dtype=torch.int32, device=q.device)[:, None]  # a page is a sequence
    ke = stop.flatten()
    ks = torch.zeros_like(ke)
    selected = lightning_topk(q, index_k, weights, indexer.index_topk, ks, ke, block_table=table)
    return selected.unflatten(0, (batch, -1))


def _compress(module: Any, hidden_states: Tensor, cache, name: str, overlap: bool) -> Tensor:
    """All entries so far, ``[B, E, d]``: a gated mean of each group of ``rate`` tokens.

    With ``overlap`` the projections have two halves: an entry pools the second half of its own group and
    the first half of the group before it.
    """
    rate, d = module.compress_rate, module.head_dim
    kv, gate, start = module.kv_proj(hidden_states), module.gate_proj(hidden_states), 0
    if cache is None:
        kv, gate = (x[:, : x.shape[1] // rate * rate] for x in (kv, gate))
    else:  # tokens of an unfinished group stay in the cache
        kv, gate, start = cache.store_compression_weights(name, kv, gate)
    groups = kv.shape[1] // rate
    if groups == 0:
        entries = kv.new_zeros(len(kv), 0, d)
    else:
        kv = kv.unflatten(1, (groups, rate))
        gate = gate.unflatten(1, (groups, rate)) + module.position_bias
        if overlap:
            kv, gate = _overlapping(kv, gate, cache, name, d)
        pooled = module.kv_norm((kv * gate.softmax(2, dtype=torch.float32).to(kv.dtype)).sum(2))
        at = start + rate * torch.arange(groups, device=kv.device)
        cos, sin = module.rotary_emb(pooled, position_ids=at[None], layer_type=module.rope_layer_type)
        entries = v4.apply_rotary_pos_emb(pooled[:, None], cos, sin)[:, 0]
    return entries if cache is None else cache.update_compressor_states(name, entries)


def _overlapping(kv: Tensor, gate: Tensor, cache, name: str, d: int) -> tuple[Tensor, Tensor]:
    """``[B, groups, rate, 2 * d]`` to ``[B, groups, 2 * rate, d]``: the previous group's first half, then
    this group's second half. Before the first group there is nothing, with a gate of -inf."""
    before = (None, None) if cache is None else cache.update_overlap_state(name, kv, gate, d)
    out = []
    for x, first, nothing in ((kv, before[0], 0.0), (gate, before[1], float("-inf"))):
        if first is None:
            first = x.new_full((len(x), x.shape[2], d), nothing)
        previous = torch.cat([first[:, None].to(x.dtype), x[:, :-1, :, :d]], 1)
        out.append(torch.cat([previous, x[..., d:]], 2))
    return out[0], out[1]


CACHES = {
    "sliding_attention": DynamicSlidingWindowLayer,
    "compressed_sparse_attention": v4.DeepseekV4CSACache,
    "heavily_compressed_attention": v4.DeepseekV4HCACache,
}
SPARSE = {v4.DeepseekV4Attention: SparseDeepseekV4Attention}
