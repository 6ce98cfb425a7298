"""Sparse attention, at the signatures of SGLang's interface to FlashMLA and of one method of its backend."""

import torch
from sglang.srt import runtime_context
from torch import Tensor

from ... import sparse_mla
from ...compat import flash_mla

PLAN = 1, 8  # the shape of FlashMLA's plan on one multiprocessor


def batch_invariant() -> bool:
    """``--enable-deterministic-inference`` promises that a sequence's result does not depend on its batch."""
    return runtime_context.get_exec().deterministic.enable_deterministic_inference


def flash_mla_sparse_fwd(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    *,
    use_legacy: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """FlashMLA's sparse prefill of ``q [tokens, heads, 576]``. ``use_legacy`` has statistics in base 2."""
    return flash_mla.flash_mla_sparse_fwd(
        q,
        kv,
        indices,
        sm_scale,
        d_v,
        attn_sink,
        topk_length,
        use_legacy=use_legacy,
        return_log2_lse=True if use_legacy else None,
    )


def get_mla_metadata(
    original,
    cache_seqlens: Tensor | None = None,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
) -> tuple:
    """FlashMLA's plan of a decode, int32. Nothing reads it here, but SGLang slices and copies it."""
    if cache_seqlens is None:  # an object, which the decode call itself would fill
        return original()
    plan = torch.zeros(PLAN, dtype=torch.int32, device=cache_seqlens.device)
    return plan, torch.zeros(len(cache_seqlens) + 1, dtype=torch.int32, device=cache_seqlens.device)


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: object,
    num_splits: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    descale_q: None = None,
    descale_k: None = None,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    kv_format: str | None = None,
    *,
    use_legacy: bool = True,
) -> tuple[Tensor, Tensor]:
    """FlashMLA's decode of ``q [batch, s_q, heads, d_qk]``. Plans of any kind are taken and not read."""
    return flash_mla.flash_mla_with_kvcache(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        head_dim_v,
        flash_mla.FlashMLASchedMeta(),
        None,
        softmax_scale,
        causal,
        is_fp8_kvcache,
        indices,
        attn_sink,
        extra_k_cache,
        extra_indices_in_kvcache,
        topk_length,
        extra_topk_length,
        enable_batch_invariant=batch_invariant(),
        kv_format=kv_format,
        use_legacy=use_legacy,
        descale_q=descale_q,
        descale_k=descale_k,
    )


def forward_fa3(
    backend,
    q_rope: Tensor | None,
    kv_cache: Tensor,
    v_head_dim: int,
    q_nope: Tensor,
    page_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    sm_scale: float,
    logit_cap: float,
    page_size: int,
) -> Tensor:
    """Decode over a plain cache, for which SGLang takes FlashAttention-3 by default before sm_100.

    ``q_nope [tokens, heads, 512]`` and ``q_rope [tokens, heads, 64]`` attend to the rows of
    ``kv_cache [slots, 1, 576]`` that ``page_table [tokens, topk]`` names; -1 is none, as the lengths say too.
    """
    for name, value, expected in (("logit_cap", logit_cap, 0), ("page_size", page_size, 1)):
        if value != expected:
            raise ValueError(f"{name}: expected {expected}, got {value}")
    q = q_nope if q_rope is None else torch.cat([q_nope, q_rope], -1)
    return sparse_mla(
        q,
        kv_cache[:, 0],
        page_table,
        d_v=v_head_dim,
        softmax_scale=sm_scale,
        batch_invariant=batch_invariant(),
    )
