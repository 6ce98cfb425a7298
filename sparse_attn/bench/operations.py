"""What ``sparse-attn bench`` times: the cases of each operation, ours first, then what it is compared with.

Shapes are DeepSeek-V3.2's (128 heads of 576 / 512, an indexer of 64 x 128, k = 2048) and, for grouped
queries, 32 / 8 heads of 128. A new operation is a function that yields cases, and a line in ``OPERATIONS``.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..cache import huge_pages
from ..formats import index_k_views, pack_index_k, pack_v32_kv, unpack_v32_kv
from ..functional import index_logits, lightning_topk, select_topk, sparse_gqa, sparse_mla
from ..testing import adversarial_logits, assert_close, assert_logits_close
from . import dense, real
from .limits import Work, attention_work, index_work, select_work

HEADS, D_QK, D_V, TOPK, SCALE = 128, 576, 512, 2048, 192**-0.5
INDEX_HEADS, INDEX_D = 64, 128
GQA_HEADS, GQA_D = (32, 8), 128
QUICK = (8192, 32768)
CONTEXTS = (1024, 8192, 32768, 131072)
MILLION = 1 << 20
FLEX_CONTEXT = 8192  # flex_attention takes seconds a call on a CPU beyond it
MEMORY_QUERIES = 64
REAL_TOKENS = 2048
CHECKED = 32768  # keys of a long context whose scores are compared with fp64

Functions = dict[str, Callable[[], object]]


@dataclasses.dataclass(frozen=True)
class Case:
    """Functions by name, ours first. ``check`` raises if ours is wrong; ``data`` says what it is made of."""

    context: int
    data: str
    functions: Functions
    check: Callable[[], None]
    work: Work
    memory: bool = False  # whether peak memory is measured instead of time


Cases = Iterator[Callable[[], Case]]  # each builds its tensors when its turn comes


def indexer(quick: bool) -> Cases:
    """Scores of one query over all keys, then of 16 queries."""
    for s_kv in QUICK if quick else (*CONTEXTS, MILLION):
        yield partial(_indexer, 1, s_kv)
    if not quick:
        yield partial(_indexer, 16, 32768)


def _indexer(s_q: int, s_kv: int) -> Case:
    q, k, weights = _normal(s_q, INDEX_HEADS, INDEX_D), _cache(s_kv, INDEX_D), torch.randn(s_q, INDEX_HEADS)
    ks = torch.zeros(s_q, dtype=torch.int32)
    ke = ks + s_kv

    def ours() -> Tensor:
        return index_logits(q, k, weights, ks, ke)

    def naive(dtype: torch.dtype) -> Tensor:
        scores = (q.to(dtype) @ k.to(dtype).mT).relu_()  # [s_q, heads, s_kv]
        return torch.einsum("th,ths->ts", weights, scores.float())

    codes, scales = index_k_views(_on_huge_pages(pack_index_k(k[None])))  # one page

    def fp8_keys() -> Tensor:
        return index_logits(q, codes[0], weights, ks, ke, k_scale=scales[0])

    def check() -> None:
        some = weights[:1], ks[:1], ke[:1]
        assert_logits_close(ours()[:1, :CHECKED], q[:1], k[:CHECKED], *some)
        quantised = codes[0, :CHECKED], *some, None, scales[0, :CHECKED]
        assert_logits_close(fp8_keys()[:1, :CHECKED], q[:1], *quantised)

    peers = {
        "fp8 keys": fp8_keys,
        "torch bf16, [s_q, h, s_kv]": partial(naive, torch.bfloat16),
        "torch fp32": partial(naive, torch.float32),
    }
    data = "gaussian" if s_q == 1 else f"gaussian, {s_q} queries"
    work = index_work(s_q, s_kv, INDEX_HEADS, INDEX_D)
    return Case(s_kv, data, {"index_logits": ours, **peers}, check, work)


def top_k(quick: bool) -> Cases:
    """The selection of one row: what it costs depends on how the scores are spread."""
    for context in QUICK if quick else (*CONTEXTS, MILLION):
        for data in ("gaussian", "clustered", "plateaus"):
            yield partial(_top_k, data, context, min(TOPK, context // 2))
    for layer in () if quick or not real.installed() else real.LAYERS:  # loading the model takes a while
        yield partial(_top_k, f"real, layer {layer}", REAL_TOKENS, 256)


def _logits(data: str, context: int) -> Tensor:
    if data.startswith("real"):
        return real.scores(context)[int(data.split()[-1])]
    if data == "clustered":
        return clustered(1, context)
    return adversarial_logits("relu_plateau", 1, context) if data == "plateaus" else torch.randn(1, context)


def clustered(rows: int, context: int, width: int = 64) -> Tensor:
    """Scores whose high ones lie together: each run of ``width`` tokens has a mean of its own."""
    means = 2 * torch.randn(rows, -(-context // width)).repeat_interleave(width, 1)[:, :context]
    return means + 0.5 * torch.randn(rows, context)


def _top_k(data: str, context: int, topk: int) -> Case:
    logits = _logits(data, context)
    ks = torch.zeros(len(logits), dtype=torch.int32)
    ke = ks + logits.shape[1]

    def ours() -> Tensor:
        return select_topk(logits, topk, ks, ke)

    def stable_sort() -> Tensor:
        return logits.sort(descending=True, stable=True).indices[:, :topk].sort().values

    def check() -> None:
        assert torch.equal(ours(), reference.select_topk(logits, topk, ks, ke)), "another selection"

    peers = {
        "torch.topk, unordered, any of the ties": lambda: logits.topk(topk, sorted=False),
        "torch.sort, stable": stable_sort,
    }
    work = select_work(*logits.shape, topk)
    return Case(logits.shape[1], data, {"select_topk": ours, **peers}, check, work)


def attention(quick: bool) -> Cases:
    """One query over 2048 tokens, beside dense attention over all of them."""
    for context in QUICK if quick else CONTEXTS:
        yield partial(_attention, "gaussian", context, not quick)
    yield partial(_attention, "clustered", QUICK[-1], False)


def _attention(data: str, s_kv: int, flex: bool) -> Case:
    q, kv = _normal(1, HEADS, D_QK), _cache(s_kv, D_QK)
    indices = _logits(data, s_kv).topk(min(TOPK, s_kv)).indices.sort().values.int()

    def ours() -> Tensor:
        return sparse_mla(q, kv, indices, d_v=D_V, softmax_scale=SCALE)

    def gathered() -> Tensor:
        rows = kv[indices[0].long()]
        return (q[0] @ rows.mT * SCALE).softmax(-1) @ rows[:, :D_V]

    packed = _on_huge_pages(pack_v32_kv(kv))

    def fp8_cache() -> Tensor:
        return sparse_mla(q, packed, indices, d_v=D_V, softmax_scale=SCALE)

    def check() -> None:
        for result, rows in ((ours(), kv.double()), (fp8_cache(), unpack_v32_kv(packed, torch.float64))):
            exact, *_ = reference.sparse_mla(q.double(), rows, indices, D_V, SCALE)
            assert_close(result, exact, 1.5)

    peers = {
        "fp8 cache": fp8_cache,
        "torch, gathered": gathered,
        "dense SDPA": lambda: dense.sdpa_folded(q[0], kv, SCALE),
        "dense GEMM": lambda: dense.gemm_chunked(q[0], kv, SCALE),
        "dense, own kernel": lambda: dense.own_kernel(q[0], kv, SCALE),
    }
    if flex and s_kv == FLEX_CONTEXT:
        peers["dense flex_attention"] = lambda: dense.flex(q[0][None, None], kv[None, None], kv[None, None])
    work = attention_work(1, indices.shape[1], HEADS, D_QK, D_V, 2 * D_QK)
    return Case(s_kv, data, {"sparse_mla": ours, **peers}, check, work)


def grouped(quick: bool) -> Cases:
    """The same for grouped queries, and once with rows that no cache holds."""
    for context in QUICK if quick else CONTEXTS:
        yield partial(_grouped, context, False, not quick)
    yield partial(_grouped, (QUICK if quick else CONTEXTS)[-1], True, False)


def _grouped(s_kv: int, cold: bool, flex: bool) -> Case:
    (h_q, h_kv), d = GQA_HEADS, GQA_D
    q, k, v = _normal(1, h_q, d), _cache(s_kv, h_kv, d), _cache(s_kv, h_kv, d)
    # Cold: every call selects other rows, so that no cache holds them.
    selections = torch.randperm(s_kv)[: max(1, s_kv // TOPK) * TOPK].int().split(TOPK)
    selections = itertools.cycle([s.sort().values[None] for s in selections][: None if cold else 1])
    indices = next(selections)
    rows = q[0].unflatten(0, (h_kv, -1))  # [h_kv, group, d]
    # The layout that dense forms like best.
    keys, values = (_on_huge_pages(x.transpose(0, 1)) for x in (k, v))

    def ours() -> Tensor:
        return sparse_gqa(q, k, v, next(selections))

    def matmul() -> Tensor:
        return (rows @ keys.mT * d**-0.5).softmax(-1) @ values

    def check() -> None:
        exact, _ = reference.sparse_gqa(q.double(), k.double(), v.double(), indices, d**-0.5)
        assert_close(sparse_gqa(q, k, v, indices), exact, 1.5)

    peers = {
        "dense SDPA": lambda: F.scaled_dot_product_attention(rows[None], keys[None], values[None]),
        "dense matmul": matmul,
    }
    if flex and s_kv == FLEX_CONTEXT:
        peers["dense flex_attention"] = lambda: dense.flex(rows[None], keys[None], values[None])
    work = attention_work(1, indices.shape[1], h_q, d, d, 2 * h_kv * 2 * d)
    data = "gaussian, cold rows" if cold else "gaussian"
    return Case(s_kv, data, {"sparse_gqa": ours, **peers}, check, work)


def memory(quick: bool) -> Cases:
    """Bytes above the inputs while 64 queries select and attend; the reference is the formula as it reads."""
    for context in QUICK[:1] if quick else (8192, 32768, 131072):
        yield partial(_memory, MEMORY_QUERIES, context)


def _memory(s_q: int, s_kv: int) -> Case:
    q, kv = _normal(s_q, HEADS, D_QK), _normal(s_kv, D_QK)
    index_q, index_k = _normal(s_q, INDEX_HEADS, INDEX_D), _normal(s_kv, INDEX_D)
    index = index_q, index_k, torch.randn(s_q, INDEX_HEADS)
    ke = torch.arange(s_kv - s_q + 1, s_kv + 1, dtype=torch.int32)
    k, v = _normal(1, s_kv, 192), _normal(1, s_kv, 128)  # one of the heads that dense attention expands

    def ours(backend: str = "auto") -> Tensor:
        indices = lightning_topk(*index, TOPK, ke * 0, ke, backend=backend)
        return sparse_mla(q, kv, indices, d_v=D_V, softmax_scale=SCALE, backend=backend)

    def check() -> None:
        t = slice(0, 2)
        indices = lightning_topk(*(index[0][t], index[1], index[2][t]), TOPK, ke[t] * 0, ke[t])
        exact, *_ = reference.sparse_mla(q[t].double(), kv.double(), indices, D_V, SCALE)
        assert_close(ours()[t], exact, 1.5)

    peers = {
        "torch, as the formula reads": partial(ours, "reference"),
        "dense SDPA, one head of 128": lambda: dense.sdpa_causal(_normal(1, s_q, 192), k, v, SCALE),
    }
    work = index_work(s_q, s_kv, INDEX_HEADS, INDEX_D) + attention_work(s_q, TOPK, HEADS, D_QK, D_V, 2 * D_QK)
    return Case(s_kv, f"{s_q} queries", {"sparse": ours, **peers}, check, work, memory=True)


OPERATIONS: dict[str, Callable[[bool], Cases]] = {
    "indexer": indexer,
    "top-k": top_k,
    "attention": attention,
    "gqa": grouped,
    "memory": memory,
}


def _cache(*shape: int) -> Tensor:
    """As DSACache allocates."""
    return huge_pages(torch.empty(shape, dtype=torch.bfloat16)).normal_()


def _on_huge_pages(x: Tensor) -> Tensor:
    """A contiguous copy."""
    return huge_pages(torch.empty(x.shape, dtype=x.dtype)).copy_(x)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16)
