"""The attention backend: what a batch looks like, how latents are stored, how queries attend to them.

Every token takes one way, which vLLM calls decode: prompts, chunks of prompts, drafts and single tokens
alike. Tokens of a batch are packed; ``query_start_loc`` says which are whose. Nothing is read on the host.
"""

import json
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm import envs
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention.sparse_mla_attention import SharedTopkIndicesBuffer
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MLAAttentionImpl,
)

from ... import physical_slots, sparse_mla, write_kv
from ...distributed.ranks import Ranks
from ...distributed.shards import Shards
from . import BACKEND, MODELS

FP8 = "fp8_ds_mla"  # vLLM's name of the format with 656 bytes per token


@dataclass
class SparseMetadata(AttentionMetadata):
    """One batch of packed tokens, as the layers read it. A captured graph pads requests and tokens."""

    num_actual_tokens: int
    query_start_loc: Tensor  # [requests + 1] int32
    seq_lens: Tensor  # [requests] int32, over all ranks
    block_table: Tensor  # [requests, pages] int32
    slot_mapping: Tensor  # [tokens] int64, -1 for what is not stored here
    visible: Tensor | None  # the indexer's: [tokens] int32 keys that each token sees, 0 for padding
    num_decodes: int
    num_decode_tokens: int
    num_prefills: int = 0
    prefill: None = None
    decode: None = None


class SparseMetadataBuilder(AttentionMetadataBuilder[SparseMetadata]):
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec, layer_names, vllm_config: VllmConfig, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> SparseMetadata:
        batch = common_attn_metadata
        return SparseMetadata(
            batch.num_actual_tokens,
            batch.query_start_loc,
            batch.seq_lens,
            batch.block_table_tensor,
            batch.slot_mapping,
            self.visible_keys(batch),
            num_decodes=batch.num_reqs,
            num_decode_tokens=batch.num_actual_tokens,
        )

    def visible_keys(self, batch: CommonAttentionMetadata) -> Tensor | None:
        return None  # attention reads what the indexer selected


class IndexerMetadataBuilder(SparseMetadataBuilder):
    def __init__(self, kv_cache_spec, layer_names, vllm_config: VllmConfig, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.tokens = torch.arange(tokens, dtype=torch.int32, device=device)
        self.visible = torch.zeros_like(self.tokens)  # at one address, where captured graphs read it

    def visible_keys(self, batch: CommonAttentionMetadata) -> Tensor:
        starts, tokens = batch.query_start_loc, self.tokens[: batch.num_actual_tokens]
        # Padded requests repeat the last start, so a padded token finds the last request, or none.
        request = torch.searchsorted(starts[1:], tokens, right=True).clamp_(max=batch.num_reqs - 1)
        visible = batch.seq_lens[request] - starts[request + 1] + tokens + 1
        held = self.visible[: len(tokens)]
        held.copy_(torch.where(tokens < starts[-1], visible, 0))
        return held


class SparseAttnBackend(AttentionBackend):
    """DeepSeek Sparse Attention through sparse_attn, with DeepSeek-V3.2's and GLM-5's sizes of a latent."""

    supported_dtypes: ClassVar = [torch.bfloat16, torch.float16, torch.float32]
    supported_kv_cache_dtypes: ClassVar = ["auto", "bfloat16", "float16", FP8]

    @staticmethod
    def get_name() -> str:
        return BACKEND

    @staticmethod
    def get_impl_cls() -> type["SparseAttnImpl"]:
        return SparseAttnImpl

    @staticmethod
    def get_builder_cls() -> type[SparseMetadataBuilder]:
        return SparseMetadataBuilder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [576]

    @classmethod
    def is_mla(cls) -> bool:
        return True

    @classmethod
    def is_sparse(cls) -> bool:
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True


class SparseIndexerBackend(SparseAttnBackend):
    """Of the layers that hold index keys, which vLLM counts among the attention layers."""

    @staticmethod
    def get_builder_cls() -> type[SparseMetadataBuilder]:
        return IndexerMetadataBuilder


class SparseAttnImpl(SharedTopkIndicesBuffer, MLAAttentionImpl[SparseMetadata]):
    is_sparse: ClassVar[bool] = True
    supports_dense_mha_prefill = False
    can_return_lse_for_decode = True
    supports_dcp = True
    supports_mtp_with_cp_non_trivial_interleave_size = True
    supports_pcp = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None,
        attn_type: str,
        kv_sharing_target_layer_name: str | None,
        topk_indices_buffer: Tensor | None = None,
        indexer: object | None = None,
        index_group_builder: object | None = None,  # caches slots for layers that share a selection
        *,
        kv_lora_rank: int,
        **sizes: Any,  # of the heads before absorption
    ) -> None:
        refused = {
            "alibi_slopes": alibi_slopes,
            "sliding_window": sliding_window,
            "logits_soft_cap": logits_soft_cap,
            "kv_sharing_target_layer_name": kv_sharing_target_layer_name,
        }
        for name, value in refused.items():
            if value is not None:
                raise ValueError(f"{name}: expected None with {BACKEND}, got {value!r}")
        from .layers import SparseIndexer  # which is made of this module

        if indexer is not None and not isinstance(indexer, SparseIndexer):
            raise ValueError(
                f"--attention-backend {BACKEND}: expected the models of sparse_attn, got an indexer of "
                f"{type(indexer).__module__}; add --model-class-overrides '{json.dumps(MODELS)}'"
            )
        self.num_heads, self.head_size, self.num_kv_heads = num_heads, head_size, num_kv_heads
        self.scale, self.kv_cache_dtype, self.kv_lora_rank = float(scale), kv_cache_dtype, kv_lora_rank
        self.batch_invariant = envs.VLLM_BATCH_INVARIANT
        interleave = get_current_vllm_config().parallel_config.cp_kv_cache_interleave_size
        self.shards = Shards(Ranks(self.dcp_rank, self.dcp_world_size), interleave)
        self.init_topk_indices_buffer(indexer, topk_indices_buffer)

    def record_logical_topk_ready(self) -> None:
        """vLLM's mark that the selection is written, for backends that read it on another stream."""

    def do_kv_cache_update(
        self,
        kv_c_normed: Tensor,
        k_pe: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
        kv_cache_dtype: str,
        k_scale: Tensor,
    ) -> None:
        """Store latents ``[tokens, 512]`` and RoPE dimensions ``[tokens, 1, 64]``."""
        if kv_cache.numel() == 0:
            return
        slots = slot_mapping.flatten()
        new = torch.cat([kv_c_normed[: len(slots)], k_pe[: len(slots)].flatten(1)], -1)
        write_kv(new, kv_cache, slots)

    def forward_mqa(
        self,
        q: Tensor | tuple[Tensor, Tensor],
        kv_c_and_k_pe_cache: Tensor,
        attn_metadata: SparseMetadata,
        layer: AttentionLayer,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend with absorbed queries ``[tokens, heads, 576]`` to the tokens that the indexer selected."""
        if isinstance(q, tuple):
            q = torch.cat(q, -1)
        assert self.topk_indices_buffer is not None
        selected, own_length = self.topk_indices_buffer[: q.shape[0]], None
        if self.dcp_world_size > 1:
            selected, own_length = self.shards.own(selected)
        cache = kv_c_and_k_pe_cache  # [pages, page_size, 576 values or 656 bytes]
        slots = physical_slots(
            selected,
            attn_metadata.block_table,
            cache.shape[1],
            cu_seqlens_q=attn_metadata.query_start_loc,
        )
        attended = sparse_mla(
            q,
            cache,
            slots,
            topk_length=own_length,
            d_v=self.kv_lora_rank,
            softmax_scale=self.scale,
            batch_invariant=self.batch_invariant,
            return_lse=self.need_to_return_lse_for_decode,
        )
        return attended if self.need_to_return_lse_for_decode else (attended, None)
