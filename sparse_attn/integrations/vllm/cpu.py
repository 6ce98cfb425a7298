"""vLLM's CPU platform, with sparse attention allowed, and what vLLM's CPU build lacks for it."""

import torch
from torch import Tensor
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import DeviceCapability

from ...distributed.ranks import Ranks
from ...distributed.shards import Shards
from .selection import check_backend, is_ours, kv_cache_dtype, serves

PAGE_SIZE = 64


class SparseCpuPlatform(CpuPlatform):
    prefers_sparse_attn = True

    @classmethod
    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None) -> str:
        if is_ours(attn_selector_config):
            return check_backend(selected_backend, attn_selector_config, DeviceCapability(0, 0))
        return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)

    @classmethod
    def check_and_update_config(cls, vllm_config) -> None:
        scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
        kept = scheduler.enable_chunked_prefill, scheduler.max_num_batched_tokens
        kept += (
            cache.enable_prefix_caching,
            cache.block_size if cache.user_specified_block_size else PAGE_SIZE,
        )
        super().check_and_update_config(vllm_config)
        if not serves(vllm_config.model_config):
            return
        # For its own MLA kernels vLLM turns off what these kernels do not mind.
        scheduler.enable_chunked_prefill, scheduler.max_num_batched_tokens = kept[:2]
        cache.enable_prefix_caching, cache.block_size = kept[2:]
        cache.cache_dtype = kv_cache_dtype(cache.cache_dtype)
        # vLLM's CPU op misreads queries [tokens, heads, d]; its torch form is right.
        custom_ops = vllm_config.compilation_config.custom_ops
        if not any(op[1:] == "rotary_embedding" for op in custom_ops):
            custom_ops.append("-rotary_embedding")

    @classmethod
    def register_triton_kernel_overrides(cls) -> None:
        super().register_triton_kernel_overrides()
        from vllm.triton_utils import HAS_TRITON

        if HAS_TRITON:
            return
        from vllm.triton_utils.dispatcher import register_kernels
        from vllm.v1.attention.ops import dcp

        register_kernels({"vllm.v1.worker.block_table.ComputeSlotMappingKernel.kernel": slot_mapping})
        dcp.correct_attn_out = correct_attn_out  # a Triton kernel without a replacement in vLLM


def slot_mapping(
    num_tokens,
    max_num_tokens,
    query_start_loc,  # [requests + 1]
    positions,  # [tokens], within the sequence
    block_table,  # [requests, pages]
    block_table_stride,
    slot_mapping,  # [max_num_tokens], filled
    KV_CACHE_BLOCK_SIZE,
    TOTAL_CP_WORLD_SIZE=1,
    TOTAL_CP_RANK=0,
    CP_KV_CACHE_INTERLEAVE_SIZE=1,
    PAD_ID=-1,
    BLOCK_SIZE=1024,
) -> None:
    """vLLM's kernel of this name and signature, for context parallelism, which its CPU form asserts away."""
    if TOTAL_CP_WORLD_SIZE == 1:
        from vllm.utils import cpu_triton_utils

        inputs = num_tokens, max_num_tokens, query_start_loc, positions, block_table, block_table_stride
        cpu_triton_utils._compute_slot_mapping_kernel_impl(*inputs, slot_mapping, KV_CACHE_BLOCK_SIZE)
        return
    page = KV_CACHE_BLOCK_SIZE * TOTAL_CP_WORLD_SIZE  # positions that the ranks' pages of one number hold
    queries = query_start_loc.diff().long()
    request = torch.repeat_interleave(torch.arange(len(queries)), queries)
    position = positions[: len(request)].long()
    offset = position % page
    table = block_table.view(-1, block_table_stride)
    local = Shards(Ranks(TOTAL_CP_RANK, TOTAL_CP_WORLD_SIZE), CP_KV_CACHE_INTERLEAVE_SIZE).to_local(offset)
    slot = table[request, position // page].long() * KV_CACHE_BLOCK_SIZE + local
    slot_mapping[: len(request)] = torch.where(local >= 0, slot, PAD_ID)
    slot_mapping[len(request) : max_num_tokens] = PAD_ID


def correct_attn_out(
    out: Tensor, lses: Tensor, cp_rank: int, ctx: object, is_lse_base_on_e: bool = True
) -> tuple[Tensor, Tensor]:
    """vLLM's function of this name: this rank's part of the whole, ``[s_q, h, d]`` and ``[s_q, h]``."""
    if not is_lse_base_on_e:
        raise ValueError("is_lse_base_on_e: expected True, got False")
    lses = lses.reshape(len(lses), *out.shape[:2]).float()
    total = lses.logsumexp(0)
    # A rank without a selected key has lse = -inf, and all of them have it for a padded query.
    factor = torch.where(lses[cp_rank] == -torch.inf, 0, (lses[cp_rank] - total).exp())
    return (out * factor[..., None]).to(out.dtype), total
