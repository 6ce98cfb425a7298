"""The layers that vLLM's generic DeepSeek model builds, in our forms.

``Indexer`` projects queries, keys and weights; what follows is one custom op, so that torch.compile and
piecewise CUDA graphs break there: store the keys, quantise the queries, select.
"""

import torch
from torch import Tensor
from vllm import envs
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import CompilationConfig, get_current_vllm_config
from vllm.distributed.parallel_state import get_dcp_group, get_dcp_world_size_and_rank
from vllm.forward_context import get_forward_context
from vllm.model_executor.custom_op import CustomOp, PluggableLayer
from vllm.model_executor.layers.mla import MLAModules, MultiHeadLatentAttentionWrapper
from vllm.model_executor.layers.sparse_attn_indexer import SparseAttnIndexer
from vllm.model_executor.models.deepseek_v2 import DeepseekV32IndexerCache, Indexer
from vllm.platforms import current_platform
from vllm.utils.torch_utils import (
    LayerNameType,
    _encode_layer_name,
    _resolve_layer_name,
    direct_register_custom_op,
)

from ... import lightning_topk, quantise_index_q, write_index_k
from ...distributed.ranks import Ranks
from ...distributed.shards import Shards, best, candidates
from ...formats.elements import FP8_MAX
from ...ops.index import DEFAULT_WORKSPACE_BYTES
from . import BACKEND
from .backend import SparseIndexerBackend, SparseMetadata

OP = "sparse_attn_select"
QUERY_MIN_SCALE = 1e-10 / FP8_MAX  # that of vLLM's kernel for queries; of keys our default is the same


class SparseIndexerCache(DeepseekV32IndexerCache):
    """Index keys, 132 bytes per token, and which part of them this rank stores."""

    def get_attn_backend(self):
        return SparseIndexerBackend

    def place(self) -> None:
        """What __init__ would do, in an object whose class was changed."""
        self.batch_invariant = envs.VLLM_BATCH_INVARIANT
        self.parallel_config = get_current_vllm_config().parallel_config
        enabled = self.parallel_config.decode_context_parallel_size > 1
        self.dcp_world_size, self.dcp_rank = get_dcp_world_size_and_rank(enabled)
        ranks = Ranks(self.dcp_rank, self.dcp_world_size)
        self.shards = Shards(ranks, self.parallel_config.cp_kv_cache_interleave_size)


class SparseIndexer(Indexer):
    def forward(self, hidden_states: Tensor, qr: Tensor, positions: Tensor, rotary_emb) -> Tensor:
        """From hidden states ``[tokens, hidden_size]`` and latent queries ``[tokens, q_lora_rank]``."""
        q = self.wq_b(qr)[0].view(-1, self.n_head, self.head_dim)
        k, weights = self.wk_weights_proj(hidden_states)[0].split([self.head_dim, self.n_head], -1)
        weights = weights.float() * (self.softmax_scale * self.n_head_scale)
        cos, sin = rotary_emb.cos_sin_cache[positions].float().chunk(2, -1)
        torch.ops.vllm.sparse_attn_select(
            q,
            k,
            weights,
            cos,
            sin,
            self.k_norm.weight,
            self.k_norm.bias,
            self.k_norm.eps,
            "half" if rotary_emb.is_neox_style else "interleaved",
            self.topk_indices_buffer,
            _encode_layer_name(self.k_cache.prefix),
        )
        return self.topk_indices_buffer


@eager_break_during_capture  # vLLM's default for these models: graphs of what lies between such ops
def select(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    pairing: str,
    topk_indices: Tensor,
    layer_name: LayerNameType,
) -> None:
    """Append index keys to the cache of ``layer_name``; write each token's selection to ``topk_indices``."""
    context, name = get_forward_context(), _resolve_layer_name(layer_name)
    batches = context.attn_metadata
    if isinstance(batches, list):  # the first is the model's, the others belong to its drafts
        batches = batches[0]
    if batches is None:  # vLLM measures the memory that a batch needs
        torch.empty(DEFAULT_WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
        return
    batch: SparseMetadata = batches[name]
    layer: SparseIndexerCache = context.no_compile_layers[name]
    tokens, slots = batch.num_actual_tokens, batch.slot_mapping.flatten()
    if {len(q), len(slots)} != {tokens}:  # padded
        q, k, weights, cos, sin, slots = (x[:tokens] for x in (q, k, weights, cos, sin, slots))
    turn = {"cos": cos, "sin": sin, "pairing": pairing, "hadamard": False}
    norm = {"norm_weight": norm_weight, "norm_bias": norm_bias, "eps": eps}
    write_index_k(k, layer.kv_cache, slots, **norm, **turn)
    q, weights = quantise_index_q(q, weights, min_scale=QUERY_MIN_SCALE, **turn)
    out, visible, topk = topk_indices[:tokens], batch.visible, topk_indices.shape[1]
    where = {"block_table": batch.block_table, "cu_seqlens_q": batch.query_start_loc}
    where["batch_invariant"] = layer.batch_invariant
    if layer.dcp_world_size == 1:
        lightning_topk(q, layer.kv_cache, weights, topk, ke=visible, out=out, **where)
        return
    own = layer.shards.local_length(visible)
    local, scores = lightning_topk(q, layer.kv_cache, weights, topk, ke=own, return_scores=True, **where)
    gathered = get_dcp_group().all_gather(candidates(layer.shards.to_global(local), scores), dim=1)
    out.copy_(best(gathered, topk))


class SparseIndexerOp(SparseAttnIndexer):
    """In the place of vLLM's op, whose constructor demands DeepGEMM on a GPU; SparseIndexer does its work."""

    def __init__(self, *arguments, **options) -> None:
        if _chosen():
            CustomOp.__init__(self)
        else:
            super().__init__(*arguments, **options)


class SparseLatentAttention(MultiHeadLatentAttentionWrapper):
    """Built with the projections and the indexer of a layer, before vLLM asks what caches it needs."""

    def __init__(self, *arguments, **options) -> None:
        modules = next(x for x in (*arguments, *options.values()) if isinstance(x, MLAModules))
        if modules.indexer is not None and _chosen():
            modules.indexer.__class__ = SparseIndexer
            modules.indexer.k_cache.__class__ = SparseIndexerCache
            modules.indexer.k_cache.place()
        super().__init__(*arguments, **options)


def _chosen() -> bool:
    """Whether the model that is being built attends through sparse_attn."""
    backend = get_current_vllm_config().attention_config.backend
    if backend is not None:
        return backend.name == BACKEND
    return getattr(current_platform, "prefers_sparse_attn", False)


def register() -> None:
    """Make vLLM build these layers, where our backend is chosen; once, when the models are imported."""
    direct_register_custom_op(
        OP,
        select,
        mutates_args=["topk_indices"],
        fake_impl=lambda *arguments: None,
        dispatch_key=current_platform.dispatch_key,
    )
    CompilationConfig._attention_ops.append(f"vllm::{OP}")  # where piecewise CUDA graphs are cut
    CustomOp.register_oot(SparseIndexerOp, name=SparseAttnIndexer.__name__)
    PluggableLayer.register_oot(SparseLatentAttention, name=MultiHeadLatentAttentionWrapper.__name__)
