"""The lightning indexer at the methods of SGLang's: its queries, its keys' cache, scoring and selection.

Selections are exact and ascending, where SGLang's fast top-k may drop tokens. They are made from the cache of
index keys by page, so that neither the keys nor the logits of a batch are ever held at once.
"""

import torch
from sglang.srt.environ import envs
from sglang.srt.layers.attention.dsa.dsa_indexer import _index_k_write_targets
from sglang.srt.layers.attention.dsa.dsa_topk_backend import TopkTransformMethod
from sglang.srt.layers.attention.kv_shard_hooks import get_kv_shard_pool
from sglang.srt.model_executor.forward_context import get_token_to_kv_pool
from torch import Tensor

from ... import lightning_topk, physical_slots, quantise_index_q, select_topk, write_index_k
from ...compat import deep_gemm
from .attention import batch_invariant

KEY_BYTES = 132
# What SGLang's CUDA kernels write: scales of fp32 that are no powers of two, and no Hadamard matrix, which is
# applied before them where it is applied at all.
UNROUNDED = {"hadamard": False, "power_of_two": False}


def get_topk_paged(
    original, indexer, forward_batch, layer_id: int, q_fp8: Tensor, weights: Tensor, metadata
) -> Tensor:
    """What each of the newest tokens selects: ``[tokens, index_topk]`` int32 slots, -1 for padded tokens.

    ``q_fp8 [tokens, heads, 128]`` e4m3, ``weights [tokens, heads, 1]``; the page table has a row per query.
    """
    if _forces_tokens(indexer):
        return original(indexer, forward_batch, layer_id, q_fp8, weights, metadata)
    tokens, queries = len(q_fp8), sum(metadata.get_dsa_extend_len_cpu())
    batch = metadata.attn_metadata
    selected = _select(indexer, layer_id, q_fp8[:queries], weights[:queries], batch, None)
    how = metadata.topk_transform_method, metadata.force_unfused_topk
    selected = _placed(selected, *how, batch.page_size, batch.real_page_table)
    return (
        selected
        if queries == tokens
        else torch.nn.functional.pad(selected, (0, 0, 0, tokens - queries), value=-1)
    )


def get_topk_ragged(
    original,
    indexer,
    enable_dual_stream: bool,
    forward_batch,
    layer_id: int,
    q_fp8: Tensor,
    weights: Tensor,
    metadata,
    topk_result: Tensor | None = None,
) -> Tensor:
    """The same in prefill, where a sequence has several queries. Fills ``topk_result`` if there is one."""
    # A pool whose pages are dealt out to several ranks gathers the keys, which is left to SGLang.
    if _forces_tokens(indexer) or get_kv_shard_pool(get_token_to_kv_pool()) is not None:
        inputs = enable_dual_stream, forward_batch, layer_id, q_fp8, weights, metadata, topk_result
        return original(indexer, *inputs)
    batch = metadata.attn_metadata
    if topk_result is None:
        shape = len(q_fp8), indexer.index_topk
        topk_result = torch.full(shape, -1, dtype=torch.int32, device=q_fp8.device)
    queries = len(batch.dsa_seqlens_expanded)
    if len(batch.real_page_table) == 0:
        return topk_result
    selected = _select(indexer, layer_id, q_fp8[:queries], weights[:queries], batch, batch.cu_seqlens_q)
    how = metadata.topk_transform_method, metadata.force_unfused_topk
    where = batch.real_page_table, batch.cu_seqlens_q, batch.topk_indices_offset
    topk_result[:queries] = _placed(selected, *how, batch.page_size, *where)
    return topk_result


def topk_transform(
    original,
    topk_backend,
    logits: Tensor,
    lengths: Tensor,
    topk: int,
    topk_transform_method,
    attn_metadata,
    cu_seqlens_q_topk: Tensor | None = None,
    topk_indices_offset: Tensor | None = None,
    row_starts: Tensor | None = None,
    batch_idx_list: Tensor | list[int] | None = None,
    force_unfused_topk: bool = False,
) -> Tensor:
    """From logits ``[queries, keys]`` fp32 to ``[queries, topk]``, where SGLang has made logits all the same.

    Row t sees ``lengths[t]`` keys from ``row_starts[t]`` on, and positions count from there.
    """
    if attn_metadata.pooled_index_kpool > 1:  # models whose keys are pooled have page tables of another kind
        inputs = logits, lengths, topk, topk_transform_method, attn_metadata, cu_seqlens_q_topk
        rest = topk_indices_offset, row_starts, batch_idx_list, force_unfused_topk
        return original(topk_backend, *inputs, *rest)
    ends = lengths if row_starts is None else row_starts + lengths
    positions = select_topk(logits, topk, row_starts, ends)
    if row_starts is not None:
        positions = torch.where(positions < 0, positions, positions - row_starts[:, None])
    table = attn_metadata.real_page_table
    if batch_idx_list is not None:  # of each query, or of each sequence that this rank has a part of
        table = table[batch_idx_list]
    cu_seqlens_q = None if len(table) == len(logits) else cu_seqlens_q_topk
    how = topk_transform_method, force_unfused_topk
    return _placed(positions, *how, attn_metadata.page_size, table, cu_seqlens_q, topk_indices_offset)


def build_topk_v2_plan(backend, seqlens_expanded: Tensor) -> None:
    """No plan: :func:`topk_transform` needs none, and SGLang's kernels are for the clusters of sm_90."""


def store_index_k_cache(
    indexer,
    forward_batch,
    layer_id: int,
    key: Tensor,
    *,
    act_quant=None,
    out_cache_loc: Tensor | None = None,
) -> None:
    """Store index keys ``[tokens, 128]``, which are normalised and rotated already, in 132 bytes each."""
    slots = forward_batch.out_cache_loc if out_cache_loc is None else out_cache_loc
    keys = key.view(-1, key.shape[-1])
    for cache, places, rows in _write_targets(layer_id, slots):
        write_index_k(keys if rows is None else keys[rows], cache, places, **UNROUNDED)


def fused_k_prepare_and_store(
    indexer,
    key_raw: Tensor,
    positions: Tensor,
    forward_batch,
    layer_id: int,
    act_quant,
    out_cache_loc: Tensor | None = None,
) -> None:
    """LayerNorm, RoPE and storage of index keys ``[tokens, 128]`` as they come from their projection."""
    slots = forward_batch.out_cache_loc if out_cache_loc is None else out_cache_loc
    norm = {"norm_weight": indexer.k_norm.weight, "norm_bias": indexer.k_norm.bias}
    for cache, places, rows in _write_targets(layer_id, slots):
        keys, at = (key_raw, positions) if rows is None else (key_raw[rows], positions[rows])
        rope = _rope(indexer._indexer_cos_sin_cache, at)
        write_index_k(keys, cache, places, eps=indexer.k_norm.variance_epsilon, **norm, **rope, **UNROUNDED)


def fused_q_rope_quant(
    q_input: Tensor, weight: Tensor, weight_scale: float, cos_sin_cache: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """RoPE and e4m3 of ``q_input [tokens, heads, 128]``; scales go into weights ``[tokens, heads, 1]``."""
    rope = _rope(cos_sin_cache, positions)
    q, weights = quantise_index_q(q_input, weight.float() * weight_scale, **rope, **UNROUNDED)
    return q, weights.unsqueeze(-1)


def act_quant(
    original, x: Tensor, block_size: int = 128, scale_fmt: str | None = None
) -> tuple[Tensor, Tensor]:
    """e4m3 of ``x [..., 128]`` and scales ``[..., 1]``, which ``scale_fmt`` rounds up to powers of two."""
    if x.shape[-1] != block_size:
        return original(x, block_size, scale_fmt)
    rows = x.view(-1, 1, block_size)
    ones = torch.ones(rows.shape[:2], device=x.device)
    q, scales = quantise_index_q(rows, ones, hadamard=False, power_of_two=scale_fmt is not None)
    return q.view(x.shape), scales.view(*x.shape[:-1], 1)


def resolve_num_sms() -> int:
    return deep_gemm.get_num_sms()


def resolve_paged_mqa_logits_metadata_fn():
    return deep_gemm.get_paged_mqa_logits_metadata


def resolve_fp8_paged_mqa_logits_fn():
    return deep_gemm.fp8_paged_mqa_logits


def resolve_fp8_mqa_logits_fn():
    return deep_gemm.fp8_mqa_logits


def _select(indexer, layer_id: int, q: Tensor, weights: Tensor, batch, cu_seqlens_q: Tensor | None) -> Tensor:
    """Positions in their sequences, ``[queries, index_topk]`` int32, ascending and -1 padded."""
    pool = get_token_to_kv_pool()
    cache = indexer._get_index_k_read_buffer(pool, layer_id)
    return lightning_topk(
        q,
        cache.view(-1, pool.index_page_size, KEY_BYTES),
        weights.squeeze(-1),
        indexer.index_topk,
        ke=batch.dsa_seqlens_expanded[: len(q)],
        block_table=batch.real_page_table,
        cu_seqlens_q=cu_seqlens_q,
        batch_invariant=batch_invariant(),
    )


def _placed(
    positions: Tensor,
    method,
    unfused: bool,
    page_size: int,
    table: Tensor,
    cu_seqlens_q: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """Positions as SGLang's attention reads them: slots of the cache, or rows of the keys of a batch."""
    if unfused or not envs.SGLANG_DSA_FUSE_TOPK.get():
        return positions  # the attention backend places them itself
    if method == TopkTransformMethod.RAGGED:
        assert offset is not None
        return torch.where(positions < 0, positions, positions + offset[: len(positions), None])
    return physical_slots(positions, table, page_size, cu_seqlens_q=cu_seqlens_q)


def _forces_tokens(indexer) -> bool:
    """Whether a model always selects its first or last tokens. SGLang does that in its logits."""
    return indexer.num_init_tokens > 0 or indexer.num_local_tokens > 0


def _write_targets(layer_id: int, slots: Tensor):
    """Pages ``[pages, page_size, 132]``, slots, and which tokens they are for (None: all)."""
    pool = get_token_to_kv_pool()
    if hasattr(pool, "invalidate_index_buffer_for_layer"):
        pool.invalidate_index_buffer_for_layer(layer_id)
    if hasattr(pool, "_is_layer_owned") and not pool._is_layer_owned(layer_id):
        return
    for cache, places, rows in _index_k_write_targets(pool, layer_id, slots):
        yield cache.view(-1, pool.index_page_size, KEY_BYTES), places, rows


def _rope(cos_sin_cache: Tensor, positions: Tensor) -> dict:
    cos, sin = cos_sin_cache[positions].float().chunk(2, -1)
    return {"cos": cos, "sin": sin, "pairing": "interleaved"}
