"""Other libraries where they are installed: FlashMLA, FlashInfer and DeepGEMM."""

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec

import torch
from torch import Tensor

from .case import Functions


def flash_mla(q: Tensor, kv: Tensor, packed: Tensor, indices: Tensor, scale: float) -> Functions:
    """Sparse attention over the bf16 rows, and over their pages of 656 bytes per token."""
    if not find_spec("flash_mla"):
        return {}

    def rows() -> Tensor:
        from flash_mla import flash_mla_sparse_fwd

        return flash_mla_sparse_fwd(q, kv[:, None], indices[:, None], scale)[0]

    @cache
    def pages() -> Callable[[], Tensor]:
        from flash_mla import flash_mla_with_kvcache, get_mla_metadata

        inputs = q[:, None], packed[:, :, None], None, None, 512, *get_mla_metadata(), scale, False, True
        return lambda: flash_mla_with_kvcache(*inputs, indices[:, None])[0].flatten(0, 1)

    return {"attend, FlashMLA": rows, "attend, FlashMLA fp8 cache": lambda: pages()()}


def flashinfer_mla(q: Tensor, kv: Tensor, scale: float) -> Functions:
    """Dense absorbed MLA of one query per sequence, planned once as an engine would."""
    if not find_spec("flashinfer"):
        return {}

    @cache
    def plan() -> Callable[[], Tensor]:
        from flashinfer.mla import BatchMLAPagedAttentionWrapper

        batch, context = kv.shape[:2]
        wrapper = BatchMLAPagedAttentionWrapper(torch.empty(128 << 20, dtype=torch.int8, device=q.device))
        starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        rows = torch.arange(batch * context, dtype=torch.int32, device=q.device)
        lengths = torch.full((batch,), context, dtype=torch.int32, device=q.device)
        shape = q.shape[1], 512, 64, 1  # heads, latent, RoPE, page size
        wrapper.plan(starts, starts * context, rows, lengths, *shape, False, scale, q.dtype, kv.dtype)
        parts = *q.split([512, 64], -1), *kv.flatten(0, 1)[:, None].split([512, 64], -1)
        return partial(wrapper.run, *(part.contiguous() for part in parts))

    return {"dense FlashInfer": lambda: plan()()}


def flashinfer_gqa(q: Tensor, k: Tensor, v: Tensor) -> Functions:
    """A dense causal prefill; the queries are the last of the positions."""
    if not find_spec("flashinfer"):
        return {}

    def prefill() -> Tensor:
        from flashinfer import single_prefill_with_kv_cache

        return single_prefill_with_kv_cache(q, k, v, causal=True)

    return {"dense FlashInfer": prefill}


def deep_gemm(q: Tensor, k: tuple[Tensor, Tensor], weights: Tensor, ks: Tensor, ke: Tensor) -> Functions:
    """Index logits of fp8 queries over contiguous fp8 keys and their scales."""
    if not find_spec("deep_gemm"):
        return {}

    def logits() -> Tensor:
        from deep_gemm import fp8_mqa_logits

        return fp8_mqa_logits(q, k, weights, ks, ke)

    return {"fp8, DeepGEMM": logits}


def deep_gemm_paged(q: Tensor, pages: Tensor, weights: Tensor, lengths: Tensor, table: Tensor) -> Functions:
    """The same over pages of 132 bytes per key; q ``[batch, next_n, heads, 128]``, planned once per step."""
    if not find_spec("deep_gemm"):
        return {}

    @cache
    def plan() -> Callable[[], Tensor]:
        from deep_gemm import fp8_paged_mqa_logits, get_num_sms, get_paged_mqa_logits_metadata

        page_size, context = pages.shape[1], table.shape[1] * pages.shape[1]
        schedule = get_paged_mqa_logits_metadata(lengths, page_size, get_num_sms())
        where = lengths, table, schedule, context
        return partial(fp8_paged_mqa_logits, q, pages[:, :, None], weights, *where)

    return {"fp8, DeepGEMM": lambda: plan()()}
