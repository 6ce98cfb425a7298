"""The attention of DeepSeek-V3.2 and GLM-5: absorbed latents, a lightning indexer over single tokens.

Some of GLM's layers have no indexer and take the selection of an earlier layer.
"""

from collections.abc import Callable
from typing import Any

import torch
from einops import einsum
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as v32
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as glm

from ...checkpoint import dequantize_blocks
from ...layers import value_part
from ...ops.attention import sparse_mla
from ...ops.index import lightning_topk
from . import growth
from .inputs import check, check_rows, query_chunks, slots_of


class _SparseAttention:
    """The forward of both classes; they name the rotations of the attention and of its indexer."""

    shares_selection: bool  # with later layers that have no indexer
    __getattr__: Callable[[str], Any]  # for type checkers: the other attributes are those of transformers

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        position_ids: Tensor | None = None,
        prev_topk_indices: Tensor | None = None,
        **kwargs,
    ) -> Any:  # two values where DeepSeek-V3.2 returns two, three for GLM-5
        """Output ``[B, S, hidden_size]``, None, and the selected rows ``[B, S, topk]`` if they are shared.

        ``prev_topk_indices``: those of an earlier layer, for a layer without an indexer.
        """
        given = prev_topk_indices if self.indexer is None else None
        if self.indexer is None and given is None:
            raise ValueError(
                "prev_topk_indices: expected the selection of an earlier layer, because layer "
                f"{self.layer_idx} has no indexer, got None"
            )
        cache, padding = past_key_values, attention_mask
        check(self, hidden_states, padding, kwargs)
        batch, s_q, _ = hidden_states.shape
        past = 0 if cache is None else cache.get_query_offset(self.layer_idx)
        stop = torch.arange(1, s_q + 1, device=hidden_states.device) + past  # token t sees rows below stop[t]
        q_lora = self.q_a_layernorm(self.q_a_proj(hidden_states))
        latent, k_rope, index_k = self._store(hidden_states, position_embeddings, cache)
        rows = latent.shape[1]
        check_rows(padding, batch, rows, (batch,))
        kv_b = self._kv_b()
        topk = min(rows, self.config.index_topk) if given is None else given.shape[-1]
        # Decode joins latent and rope of the rows that it reads, a prompt joins those of all rows once.
        kv = None if s_q * topk < rows else torch.cat([latent, k_rope], -1).flatten(0, 1)
        outs, kept = [], []
        d_qk = self.kv_lora_rank + self.qk_rope_head_dim
        for t in query_chunks(s_q, batch * len(kv_b) * d_qk * hidden_states.element_size()):
            embeddings = [x[:, t] for x in position_embeddings]
            if given is not None:
                selected = given[:, t]
            elif rows <= self.config.index_topk:
                selected = _all_visible(stop[t], padding, batch, rows)
            else:
                inputs = hidden_states[:, t], q_lora[:, t], embeddings
                selected = self._select(*inputs, index_k, stop[t], padding)
            q = self._queries(q_lora[:, t], embeddings, kv_b)
            outs.append(self._attend(q, latent, k_rope, kv, selected, kv_b))
            if self.shares_selection:
                kept.append(selected)
        out = self.o_proj(torch.cat(outs, 1))
        return (out, None, torch.cat(kept, 1)) if self.shares_selection else (out, None)

    def _store(self, hidden_states, position_embeddings, cache):
        """Latents ``[B, T, kv_lora_rank]``, RoPE parts ``[B, T, qk_rope_head_dim]`` and the indexer's keys
        ``[B, T, index_head_dim]`` (None without an indexer) of the cache and the new tokens."""
        cos, sin = position_embeddings
        latent, k_rope = self.kv_a_proj_with_mqa(hidden_states).split(
            [self.kv_lora_rank, self.qk_rope_head_dim], -1
        )
        latent, k_rope = self.kv_a_layernorm(latent)[:, None], k_rope[:, None]
        _, k_rope = self._main_rope(k_rope, k_rope, cos, sin)
        index_k = None
        if self.indexer is not None:
            rope = self.indexer.qk_rope_head_dim
            index_k = self.indexer.k_norm(self.indexer.wk(hidden_states))
            rotated = index_k[:, :, None, :rope]
            rotated, _ = self._index_rope(rotated, rotated, cos, sin, unsqueeze_dim=2)
            index_k = torch.cat([rotated[:, :, 0], index_k[..., rope:]], -1)
        if cache is not None:
            latent, k_rope, index_k = growth.update(cache, self.layer_idx, latent, k_rope, index_k)
        return latent[:, 0], k_rope[:, 0], index_k

    def _select(self, hidden_states, q_lora, position_embeddings, index_k, stop, padding):
        """Rows of the cache that each token attends to, ``[B, s_q, topk]`` int32, -1 padded."""
        indexer = self.indexer
        batch, s_q, _ = hidden_states.shape
        rope = indexer.qk_rope_head_dim
        q = indexer.wq_b(q_lora).view(batch, s_q, -1, indexer.head_dim)
        rotated, _ = self._index_rope(q[..., :rope], q[..., :rope], *position_embeddings, unsqueeze_dim=2)
        q = torch.cat([rotated, q[..., rope:]], -1).flatten(0, 1)
        weights = indexer.weights_proj(hidden_states.to(indexer.weights_proj.weight.dtype))
        weights = weights.to(torch.promote_types(q.dtype, torch.float32)).flatten(0, 1)
        weights = weights * (indexer.n_heads**-0.5 * indexer.softmax_scale)
        ke = stop.int().repeat(batch)
        ks = torch.zeros_like(ke)
        if padding is None or padding.dim() == 1:  # a page is a sequence
            pages, table = index_k, torch.arange(batch, dtype=torch.int32, device=q.device)[:, None]
            if padding is not None:
                ks = padding.repeat_interleave(s_q)
        else:  # a page is a row, so that any row can be left out
            pages, table = index_k.flatten(0, 1)[:, None], padding
        selected = lightning_topk(q, pages, weights, indexer.index_topk, ks, ke, block_table=table)
        return selected.view(batch, s_q, -1)

    def _queries(self, q_lora, position_embeddings, kv_b):
        """Absorbed queries ``[B, s_q, heads, kv_lora_rank + qk_rope_head_dim]``."""
        q = self.q_b_proj(q_lora).unflatten(-1, (-1, self.qk_head_dim))
        q_nope, q_rope = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], -1)
        q_rope, _ = self._main_rope(q_rope, q_rope, *position_embeddings, unsqueeze_dim=2)
        q_latent = einsum(q_nope, kv_b[:, : self.qk_nope_head_dim], "b s h d, h d c -> b s h c")
        return torch.cat([q_latent, q_rope], -1)

    def _attend(self, q, latent, k_rope, kv, selected, kv_b):
        """``[B, s_q, heads * v_head_dim]``; ``kv`` ``[B * T, d]`` is latent and rope of all rows, or None."""
        batch, rows, _ = latent.shape
        if kv is None:
            taken = selected.flatten(1).clamp_min(0)  # [B, s_q * topk]
            sequence = torch.arange(batch, device=q.device)[:, None]
            kv = torch.cat([x[sequence, taken] for x in (latent, k_rope)], -1).flatten(0, 1)
            order = torch.arange(taken.numel(), dtype=torch.int32, device=q.device).view_as(selected)
            indices = torch.where(selected >= 0, order, -1).flatten(0, 1)
        else:
            indices = slots_of(selected, rows)
        out = sparse_mla(
            q.flatten(0, 1), kv, indices, d_v=self.kv_lora_rank, softmax_scale=self.scaling
        ).unflatten(0, (batch, -1))
        out = einsum(out, value_part(kv_b, self.qk_nope_head_dim), "b s h c, h d c -> b s h d")
        return out.flatten(2)

    def _kv_b(self) -> Tensor:
        """``[heads, qk_nope_head_dim + v_head_dim, kv_lora_rank]``."""
        weight = self.kv_b_proj.weight
        if _is_block_fp8(self.kv_b_proj):
            weight = dequantize_blocks(weight, self.kv_b_proj.weight_scale_inv, self.kv_b_proj.block_size)
            weight = weight.to(self.kv_a_layernorm.weight.dtype)
        return weight.unflatten(0, (-1, self.qk_nope_head_dim + self.v_head_dim))


class SparseDeepseekV32Attention(_SparseAttention, v32.DeepseekV32Attention):
    shares_selection = False
    _main_rope = staticmethod(v32.apply_rotary_pos_emb_interleave)
    _index_rope = staticmethod(v32.apply_rotary_pos_emb)  # half-split


class SparseGlmMoeDsaAttention(_SparseAttention, glm.GlmMoeDsaAttention):
    shares_selection = True
    _main_rope = _index_rope = staticmethod(glm.apply_rotary_pos_emb_interleave)


def _all_visible(stop: Tensor, padding: Tensor | None, batch: int, rows: int) -> Tensor:
    """Every row that each token may read, when there are no more than topk: ``[B, s_q, T]`` int32."""
    row = torch.arange(rows, dtype=torch.int32, device=stop.device)
    visible = (row < stop[:, None]).expand(batch, -1, -1)
    if padding is not None:
        exists = row >= padding[:, None] if padding.dim() == 1 else padding >= 0
        visible = visible & exists[:, None]
    return torch.where(visible, row, -1)


def check_kv_b_proj(linear: nn.Module) -> None:
    """Its weight is read without its forward, so nothing may stand between the two."""
    weight = getattr(linear, "weight", None)
    held = isinstance(weight, Tensor)
    plain = held and type(linear) is nn.Linear and weight.is_floating_point() and weight.element_size() > 1
    if not held or not (plain or _is_block_fp8(linear)):
        dtype = weight.dtype if held else "no"
        raise TypeError(
            "kv_b_proj: expected torch.nn.Linear with a floating-point weight, or one in fp8 with "
            f"weight_scale_inv, got {type(linear).__name__} with {dtype} weight; merge adapters and "
            "dequantise this projection first"
        )
    if weight.is_meta:
        raise TypeError(
            "kv_b_proj: expected a weight in memory, got one on the meta device; "
            "layers whose weights are offloaded are not supported"
        )


def _is_block_fp8(linear: nn.Module) -> bool:
    weight, scale = getattr(linear, "weight", None), getattr(linear, "weight_scale_inv", None)
    if weight is None or scale is None:
        return False
    return weight.dtype == torch.float8_e4m3fn and scale.dim() == 2


SPARSE = {
    v32.DeepseekV32Attention: SparseDeepseekV32Attention,
    glm.GlmMoeDsaAttention: SparseGlmMoeDsaAttention,
}
