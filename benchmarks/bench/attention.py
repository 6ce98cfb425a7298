"""Cases of attention over selected tokens, beside dense attention over all of them."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_attn import lightning_topk, merge_attention, reference, sparse_gqa, sparse_mla
from sparse_attn.formats import KV_FORMATS, dequantise, unpack
from sparse_attn.testing import assert_close, relative_error

from . import dense, peers
from .case import Case, Cases, Functions, Sizes, decodes
from .index import scores
from .limits import Work, attention_work, index_work
from .tensors import cache, gathered, highest, normal, on_huge_pages, packed

D_QK, D_V, SCALE = 576, 512, 192**-0.5
GQA_D = 128
GQA_MOST = 1 << 22  # tokens in all caches: 17 GB, and as much again in the dense forms' layout
PARTS = 8  # how many are merged
MEMORY_QUERIES = 64
# The error allowed, in roundings to bf16; GPU kernels round the probabilities too.
FACTOR = {"cpu": 1.5, "cuda": 2.5}


def attention(sizes: Sizes, device: torch.device) -> Cases:
    """MLA of one query per sequence over the selected tokens, beside dense attention over all of them.

    Where sizes say so, with fewer heads too, and those also in a prefill; the layer's prefill has all heads.
    """
    yield from decodes(sizes, "gaussian", partial(_attention, sizes, device, "gaussian"))
    if "clustered" in sizes.scores:
        yield sizes.middle, "clustered", partial(_attention, sizes, device, "clustered", 1, sizes.middle)
    tokens, context = sizes.prefill
    for heads in sizes.fewer_heads:
        fewer = sizes._replace(heads=heads, contexts=(sizes.middle,))
        yield from decodes(fewer, f"{heads} heads", partial(_few_heads, fewer, device))
        yield context, f"{heads} heads, prefill of {tokens}", partial(_few_heads, fewer, device, 0, context)


def _attention(sizes: Sizes, device: torch.device, kind: str, batch: int, context: int) -> Case:
    q, kv, indices = _decode_inputs(sizes, device, kind, batch, context)
    rows = kv.flatten(0, 1)
    functions, check = attend(q, rows, indices, SCALE)
    functions |= {
        "torch, gathered": lambda: dense.gemm(q, rows[indices.long()], SCALE),
        **dense_mla(q, kv, SCALE),
    }
    if context == sizes.flex:
        every = kv[:, None]
        functions["dense flex_attention"] = lambda: dense.flex(q[:, None], every, every)
    return Case(functions, check, _work(q, indices))


def _few_heads(sizes: Sizes, device: torch.device, batch: int, context: int) -> Case:
    """Of ``batch`` sequences, or a prefill of one where that is 0; nothing dense."""
    if batch:
        q, kv, indices = _decode_inputs(sizes, device, "gaussian", batch, context)
    else:
        tokens = sizes.prefill[0]
        q, kv = normal(device, tokens, sizes.heads, D_QK), cache(device, 1, context, D_QK)
        ke = torch.arange(context - tokens + 1, context + 1, device=device)
        random = torch.rand(tokens, context, device=device)
        indices = highest(random, sizes.topk, ke, torch.zeros_like(ke)[:, None])
    functions, check = attend(q, kv.flatten(0, 1), indices, SCALE)
    return Case(functions, check, _work(q, indices))


def _decode_inputs(sizes: Sizes, device: torch.device, kind: str, batch: int, context: int):
    """q ``[batch, heads, 576]``, kv ``[batch, context, 576]`` and selected rows ``[batch, topk]``."""
    q, kv = normal(device, batch, sizes.heads, D_QK), cache(device, batch, context, D_QK)
    ke, first_row = ranges(batch, context, device)
    return q, kv, highest(scores(kind, batch, context, device), sizes.topk, ke, first_row)


def _work(q: Tensor, indices: Tensor) -> Work:
    return attention_work(len(q), indices.shape[1], q.shape[1], D_QK, D_V, 2 * D_QK)


def formats(sizes: Sizes, device: torch.device) -> Cases:
    """The selected tokens of one query per sequence, in every format of a latent cache, beside bf16."""
    middle = sizes._replace(contexts=(sizes.middle,))
    return decodes(middle, "gaussian", partial(_formats, middle, device))


def _formats(sizes: Sizes, device: torch.device, batch: int, context: int) -> Case:
    q, kv, indices = _decode_inputs(sizes, device, "gaussian", batch, context)
    rows, t = kv.flatten(0, 1), spread(batch)
    caches = {
        name: torch.cat(
            [fmt.pack(part[..., : fmt.width]) for part in rows.unflatten(0, (-1, 64)).split(1 << 10)]
        )
        for name, fmt in KV_FORMATS.items()
    }

    def attend_to(name: str) -> Tensor:
        queries = q[..., : KV_FORMATS[name].width]
        return sparse_mla(queries, caches[name], indices, softmax_scale=SCALE, kv_format=name)

    def check() -> None:
        places, slots = gathered(indices[t], torch.arange(len(rows), device=device))
        for name, pages in caches.items():
            parts = (part[slots // 64, slots % 64] for part in KV_FORMATS[name].views(pages))
            values = dequantise(*parts, dtype=torch.float64)
            exact = reference.sparse_mla(q[t, :, : values.shape[1]].double(), values, places, D_V, SCALE)[0]
            assert_close(attend_to(name)[t], exact, FACTOR[device.type])

    functions: Functions = {"bf16": lambda: sparse_mla(q, rows, indices, softmax_scale=SCALE)}
    functions |= {name: partial(attend_to, name) for name in caches}
    return Case(functions, check, _work(q, indices))


def ranges(batch: int, context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For one query per sequence: how many tokens it sees ``[batch]``, and their first row ``[batch, 1]``."""
    sequences = torch.arange(batch, dtype=torch.int32, device=device)
    return torch.full_like(sequences, context), context * sequences[:, None]


def attend(q: Tensor, kv: Tensor, indices: Tensor, scale: float) -> tuple[Functions, Callable[[], dict]]:
    """The ways to attend from q ``[s_q, heads, 576]`` to selected rows of kv, and the check of ours."""
    fp8, factor = packed(kv), FACTOR[q.device.type]

    def ours() -> Tensor:
        return sparse_mla(q, kv, indices, softmax_scale=scale)

    def fp8_cache() -> Tensor:
        return sparse_mla(q, fp8, indices, softmax_scale=scale)

    def exact(rows: Tensor, selected: Tensor) -> Tensor:
        return reference.sparse_mla(q[t].double(), selected.double(), rows, D_V, scale)[0]

    t = spread(len(q))

    def check() -> dict[str, Any]:
        expected, result = exact(*gathered(indices[t], kv)), ours()[t]
        assert_close(result, expected, factor)
        rows, codes = gathered(indices[t], fp8.flatten(0, 1))
        assert_close(fp8_cache()[t], exact(rows, unpack(codes, torch.float64)), factor)
        rounding = relative_error(expected.bfloat16(), expected)
        return {"errors": {"attention": relative_error(result, expected), "bf16_rounding": rounding}}

    functions = {"attend": ours, "attend, fp8 cache": fp8_cache}
    return functions | peers.flash_mla(q, kv, fp8, indices, scale), check


def spread(count: int) -> list[int]:
    """Which of ``count`` queries are compared with fp64: a few, with the first and the last."""
    return sorted({*range(0, count, max(1, count // 4)), count - 1})


def dense_mla(q: Tensor, kv: Tensor, scale: float) -> Functions:
    """Attention from q ``[batch, heads, 576]`` to all of kv ``[batch, context, 576]``."""
    gemm = dense.gemm if q.is_cuda else dense.gemm_chunked
    return {
        "dense SDPA": lambda: dense.sdpa_folded(q, kv, scale),
        "dense GEMM": lambda: gemm(q, kv, scale),
        "dense, own kernel": lambda: dense.own_kernel(q, kv, scale),
        **peers.flashinfer_mla(q, kv, scale),
    }


def gqa(sizes: Sizes, device: torch.device) -> Cases:
    """Grouped queries in decode, once with rows that no cache holds, and in prefill."""
    yield from decodes(sizes, "gaussian", partial(_gqa_decode, sizes, device), most=GQA_MOST)
    if 1 in sizes.batches and device.type == "cpu":  # a GPU's cache is flushed before every call
        cold = partial(_gqa_decode, sizes, device, 1, sizes.contexts[-1], cold=True)
        yield sizes.contexts[-1], "gaussian, cold rows", cold
    tokens, context = sizes.prefill
    yield context, f"prefill of {tokens}", partial(_gqa_prefill, sizes, device)


def _gqa_decode(sizes: Sizes, device: torch.device, batch: int, context: int, *, cold: bool = False) -> Case:
    h_q, h_kv = sizes.gqa_heads
    q = normal(device, batch, h_q, GQA_D)
    k, v = (cache(device, batch * context, h_kv, GQA_D) for _ in "kv")
    ke, first_row = ranges(batch, context, device)
    selections = [
        highest(torch.rand(batch, context, device=device), sizes.topk, ke, first_row)
        for _ in range(max(1, context // sizes.topk) if cold else 1)  # cold: other rows in every call
    ]
    grouped = q.unflatten(1, (h_kv, -1))  # the heads of a group as query rows: each key is read once
    # The layout in which the dense forms are fastest.
    keys, values = (on_huge_pages(x.unflatten(0, (batch, context)).transpose(1, 2)) for x in (k, v))

    def matmul() -> Tensor:
        return ((grouped @ keys.mT * GQA_D**-0.5).softmax(-1) @ values).flatten(1, 2)

    dense_forms = {
        "dense SDPA": lambda: F.scaled_dot_product_attention(grouped, keys, values).flatten(1, 2),
        "dense matmul": matmul,
    }
    if context == sizes.flex and not cold:
        dense_forms["dense flex_attention"] = lambda: dense.flex(grouped, keys, values)
    return _gqa(q, k, v, selections, dense_forms)


def _gqa_prefill(sizes: Sizes, device: torch.device) -> Case:
    (tokens, context), (h_q, h_kv) = sizes.prefill, sizes.gqa_heads
    q = normal(device, tokens, h_q, GQA_D)
    k, v = (cache(device, context, h_kv, GQA_D) for _ in "kv")
    ke = torch.arange(context - tokens + 1, context + 1, device=device)
    picked = highest(
        torch.rand(tokens, context, device=device), sizes.topk, ke, torch.zeros_like(ke)[:, None]
    )
    group = h_q // h_kv
    timed = min(h_kv, max(1, sizes.dense_heads // group))  # kv heads
    some = [x[:, :n].transpose(0, 1).contiguous() for x, n in ((q, timed * group), (k, timed), (v, timed))]
    dense_forms = {
        "dense SDPA": lambda: dense.sdpa_causal(*some, GQA_D**-0.5).transpose(0, 1),
        **peers.flashinfer_gqa(q, k, v),
    }
    return _gqa(q, k, v, [picked], dense_forms)._replace(shares={"dense SDPA": timed / h_kv})


def _gqa(q: Tensor, k: Tensor, v: Tensor, selections: list[Tensor], dense_forms: Functions) -> Case:
    (s_q, h_q, d), h_kv, first = q.shape, k.shape[1], selections[0]
    turns = itertools.cycle(selections)

    def check() -> None:
        t = spread(s_q)
        rows, *kv = gathered(first[t], k, v)
        exact, _ = reference.sparse_gqa(q[t].double(), *(x.double() for x in kv), rows, d**-0.5)
        assert_close(sparse_gqa(q, k, v, first)[t], exact, FACTOR[q.device.type])

    functions = {"sparse_gqa": lambda: sparse_gqa(q, k, v, next(turns)), **dense_forms}
    return Case(functions, check, attention_work(s_q, first.shape[1], h_q, d, d, 2 * h_kv * 2 * d))


def merge(sizes: Sizes, device: torch.device) -> Cases:
    """Attention over parts of the keys, joined by their lse."""
    for batch in sizes.batches:
        yield PARTS, f"parts of {batch}", partial(_merge, sizes.heads, batch, device)


def _merge(heads: int, batch: int, device: torch.device) -> Case:
    outs, lses = normal(device, PARTS, batch, heads, D_V), torch.randn(PARTS, batch, heads, device=device)

    def ours() -> Tensor:
        return merge_attention(outs, lses)[0]

    def check() -> None:
        assert_close(ours(), reference.merge_attention(outs.double(), lses.double())[0])

    functions = {"merge_attention": ours, "torch": lambda: (lses.softmax(0)[..., None] * outs).sum(0)}
    moved = (PARTS + 1) * batch * heads * (2 * D_V + 4)
    return Case(functions, check, Work(bytes=moved))


def memory(sizes: Sizes, device: torch.device) -> Cases:
    """Bytes above the inputs while 64 queries select and attend; the reference is the formula as it reads."""
    if device.type == "cpu":
        for context in sizes.contexts:
            yield context, f"{MEMORY_QUERIES} queries", partial(_memory, sizes, device, context)


def _memory(sizes: Sizes, device: torch.device, context: int) -> Case:
    s_q = MEMORY_QUERIES
    q, kv = normal(device, s_q, sizes.heads, D_QK), normal(device, context, D_QK)
    index_q, index_k = normal(device, s_q, sizes.index_heads, 128), normal(device, context, 128)
    index = index_q, index_k, torch.randn(s_q, sizes.index_heads)
    ke = torch.arange(context - s_q + 1, context + 1, dtype=torch.int32)
    head_q, head_k = normal(device, 1, s_q, 192), normal(device, 1, context, 192)  # one head, expanded
    head_v = normal(device, 1, context, 128)

    def ours(backend: str = "auto") -> Tensor:
        indices = lightning_topk(*index, sizes.topk, ke * 0, ke, backend=backend)
        return sparse_mla(q, kv, indices, softmax_scale=SCALE, backend=backend)

    def check() -> None:
        t = slice(0, 2)
        indices = lightning_topk(index_q[t], index_k, index[2][t], sizes.topk, ke[t] * 0, ke[t])
        exact, *_ = reference.sparse_mla(q[t].double(), kv.double(), indices, D_V, SCALE)
        assert_close(ours()[t], exact, FACTOR["cpu"])

    functions = {
        "sparse": ours,
        "torch, as the formula reads": partial(ours, "reference"),
        "dense SDPA, one head of 128": lambda: dense.sdpa_causal(head_q, head_k, head_v, SCALE),
    }
    work = index_work(s_q, context, sizes.index_heads, 128)
    work += attention_work(s_q, min(sizes.topk, context), sizes.heads, D_QK, D_V, 2 * D_QK)
    return Case(functions, check, work, memory=True)
