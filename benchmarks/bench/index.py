"""Cases of the indexer and of the exact selection."""

from functools import partial

import torch
from torch import Tensor

from sparse_attn import index_logits, lightning_topk, quantise_index_q, reference, select_topk
from sparse_attn.formats import index_k_views, pack_index_k
from sparse_attn.testing import adversarial_logits, assert_logits_close

from . import peers, real
from .case import Case, Cases, Sizes, decodes
from .limits import index_work, select_work
from .tensors import cache, normal, on_huge_pages

D = 128
CHECKED = 32768  # keys of a long context whose scores are compared with fp64
REAL_TOKENS, REAL_TOPK = 2048, 256


def indexer(sizes: Sizes, device: torch.device) -> Cases:
    """Scores of one query per sequence over all its keys, then of several, then of a prefill."""
    longer = sizes._replace(contexts=(*sizes.contexts, *sizes.long))
    yield from decodes(longer, "gaussian", partial(_indexer, sizes, device))
    if sizes.queries > 1:
        several = partial(_indexer, sizes, device, 1, sizes.middle, sizes.queries)
        yield sizes.middle, f"gaussian, {sizes.queries} queries", several
    tokens, context = sizes.prefill
    yield context, f"gaussian, prefill of {tokens}", partial(_prefill, sizes, device)


def _indexer(sizes: Sizes, device: torch.device, batch: int, context: int, queries: int = 1) -> Case:
    s_q, heads, page_size = batch * queries, sizes.index_heads, sizes.page_size or context
    q, weights = normal(device, s_q, heads, D), torch.randn(s_q, heads, device=device)
    table = torch.randperm(batch * context // page_size, device=device).int().view(batch, -1)
    k = cache(device, table.numel(), page_size, D)
    packed = on_huge_pages(pack_index_k(k))
    codes, folded = quantise_index_q(q, weights, hadamard=False)
    ks = torch.zeros(s_q, dtype=torch.int32, device=device)
    ke = ks + context
    options = {"block_table": table.repeat_interleave(queries, 0)}

    def of_sequence(pages: Tensor) -> Tensor:  # [batch, context, ...]
        return pages[table.long()].flatten(1, 2)

    def by_sequence(x: Tensor) -> Tensor:  # [batch, queries, ...]
        return x.unflatten(0, (batch, queries))

    def score(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
        return index_logits(q, k, weights, ks, ke, **options)

    def naive(dtype: torch.dtype) -> Tensor:
        rows = q.view(batch, queries * heads, D).to(dtype)
        scores = (rows @ keys.to(dtype).mT).relu_().unflatten(1, (queries, heads))
        return torch.einsum("bqh,bqhs->bqs", by_sequence(weights), scores.float())

    keys = of_sequence(k)
    values, scales = map(of_sequence, index_k_views(packed))

    def check() -> None:
        forms = (q, k, weights, keys, None), (q, packed, weights, values, scales)
        for q_, k_, weights_, keys_, scales_ in (*forms, (codes, packed, folded, values, scales)):
            logits = score(q_, k_, weights_)
            for t in {0, s_q - 1}:
                own = None if scales_ is None else scales_[t // queries]
                _assert_scores(t, logits, keys_[t // queries], own, q_, weights_, ks, ke)

    functions = {
        "index_logits": lambda: score(q, k, weights),
        "fp8 keys": lambda: score(q, packed, weights),
        "fp8 queries and keys": lambda: score(codes, packed, folded),
        "lightning_topk, fp8": lambda: lightning_topk(codes, packed, folded, sizes.topk, ks, ke, **options),
        "torch bf16, [s_q, h, s_kv]": partial(naive, torch.bfloat16),
        "torch fp32": partial(naive, torch.float32),
        **peers.deep_gemm_paged(by_sequence(codes), packed, folded, by_sequence(ke), table),
    }
    return Case(functions, check, index_work(queries, context, heads, D) * batch)


def _assert_scores(t: int, logits: Tensor, k: Tensor, k_scale: Tensor | None, *by_query: Tensor) -> None:
    """Query t's scores of the first keys are right; ``by_query``: q, weights, ks and ke."""
    logits, q, weights, ks, ke = (x[t : t + 1] for x in (logits, *by_query))
    scale = None if k_scale is None else k_scale[:CHECKED]
    assert_logits_close(logits[:, :CHECKED], q, k[:CHECKED], weights, ks, ke, k_scale=scale)


def _prefill(sizes: Sizes, device: torch.device) -> Case:
    """The last tokens of a sequence over contiguous keys, each up to itself."""
    (tokens, context), heads = sizes.prefill, sizes.index_heads
    q, k = normal(device, tokens, heads, D), normal(device, context, D)
    weights = torch.randn(tokens, heads, device=device)
    codes, folded = quantise_index_q(q, weights, hadamard=False)
    values, scales = (part[0] for part in index_k_views(pack_index_k(k[None])))
    ke = torch.arange(context - tokens + 1, context + 1, dtype=torch.int32, device=device)
    ks = torch.zeros_like(ke)

    def bf16() -> Tensor:
        return index_logits(q, k, weights, ks, ke)

    def fp8() -> Tensor:
        return index_logits(codes, values, folded, ks, ke, k_scale=scales)

    def check() -> None:
        for t in {0, tokens - 1}:
            _assert_scores(t, bf16(), k, None, q, weights, ks, ke)
            _assert_scores(t, fp8(), values, scales, codes, folded, ks, ke)

    functions = {
        "index_logits": bf16,
        "fp8 queries and keys": fp8,
        **peers.deep_gemm(codes, (values, scales), folded, ks, ke),
    }
    return Case(functions, check, index_work(tokens, context, heads, D))


def top_k(sizes: Sizes, device: torch.device) -> Cases:
    """The selection from rows of logits; its time depends on the distribution of the scores."""
    for rows in sizes.rows:
        for context in (*sizes.contexts, *sizes.long):
            for kind in sizes.scores:
                data = kind if rows == 1 else f"{kind}, {rows} rows"
                topk = min(sizes.topk, context // 2)
                yield context, data, partial(_top_k, kind, rows, context, topk, device)
    if sizes.real and real.installed():  # loading the model takes a while
        for layer in real.LAYERS:
            kind = f"real, layer {layer}"
            yield REAL_TOKENS, kind, partial(_top_k, kind, 1, REAL_TOKENS, REAL_TOPK, device)


def scores(kind: str, rows: int, context: int, device: torch.device) -> Tensor:
    if kind.startswith("real"):
        return real.scores(context)[int(kind.split()[-1])].to(device)
    if kind == "clustered":
        return clustered(rows, context).to(device)
    if kind == "plateaus":
        return adversarial_logits("relu_plateau", rows, context).to(device)
    return torch.randn(rows, context, device=device)


def clustered(rows: int, context: int, width: int = 64) -> Tensor:
    """Scores whose high ones lie together: each run of ``width`` tokens has a mean of its own."""
    means = 2 * torch.randn(rows, -(-context // width)).repeat_interleave(width, 1)[:, :context]
    return means + 0.5 * torch.randn(rows, context)


def _top_k(kind: str, rows: int, context: int, topk: int, device: torch.device) -> Case:
    logits = scores(kind, rows, context, device)
    ks = torch.zeros(rows, dtype=torch.int32, device=device)
    ke = ks + context

    def ours() -> Tensor:
        return select_topk(logits, topk, ks, ke)

    def check() -> None:
        expected = reference.select_topk(logits, topk, ks, ke)
        assert torch.equal(ours(), expected), "the selection differs from the reference's"

    functions = {
        "select_topk": ours,
        "torch.topk, unordered, any of the ties": lambda: logits.topk(topk, sorted=False).indices,
        "torch.sort, stable": lambda: (
            logits.sort(descending=True, stable=True).indices[:, :topk].sort().values
        ),
    }
    return Case(functions, check, select_work(rows, context, topk))
