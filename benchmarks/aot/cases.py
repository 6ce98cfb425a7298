"""The shapes that the kernels are compiled for, and what one tile of each kernel has to multiply.

A new operation: a function that gives its record with meta tensors, and a line in ``CASES`` for
each class of shapes that leads to other code. A new kernel with matrix products: a line in ``PRODUCTS``.
"""

from typing import Any, NamedTuple

import torch
from sparse_attn.kernels.configs import TRITON

from sparse_attn.formats import KV_FORMATS, index_k_views
from sparse_attn.ops.attention import MergeAttentionOp, SparseGQAOp, SparseMLAOp
from sparse_attn.ops.index import IndexLogitsOp, LightningTopkOp, PhysicalSlotsOp, SelectTopkOp
from sparse_attn.ops.writers import FP4_SCALES, QuantiseIndexQOp, WriteIndexKOp, WriteKVOp

BF16, FP16, FP32, E4M3, UINT8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.uint8
S_Q, S_KV, TOPK = 432, 100_000, 2048  # queries: whole waves of the 108 multiprocessors that are assumed
ALL = (80, 86, 89, 90, 100, 120)
WITHOUT_89 = (80, 86, 90, 100, 120)  # sm_89 has what sm_86 has, and instructions for e4m3
HOPPER = (90,) if TRITON >= (3, 9) else ()  # the warp-specialised kernel refuses an older Triton


class Case(NamedTuple):
    op: str
    label: str
    record: Any  # of the op
    quick: tuple[int, ...] = ()  # architectures that the tests compile it for
    archs: tuple[int, ...] = ALL  # those that the report compiles it for


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def int32(*shape: int) -> torch.Tensor:
    return empty(*shape, dtype=torch.int32)


def mla(
    h_q, d_qk=576, dtype=BF16, s_q=S_Q, s_kv=S_KV, topk=TOPK, extra=False, packed=None, page_size=1, d_v=512
) -> SparseMLAOp:
    """``packed``: the name of the caches' format. Without it, pages lie apart."""
    fmt = KV_FORMATS[packed] if packed else None
    d_qk = fmt.width if fmt else d_qk
    page_size = 64 if fmt and fmt.by_page else page_size

    def cache(slots: int) -> torch.Tensor:
        pages = -(-slots // page_size)
        if fmt:
            return empty(pages, page_size, fmt.bytes, dtype=UINT8)
        return (
            empty(pages, 2 * page_size, d_qk, dtype=dtype)[:, :page_size]
            if page_size > 1
            else empty(slots, d_qk, dtype=dtype)
        )

    inputs = empty(s_q, h_q, d_qk, dtype=dtype), cache(s_kv), int32(s_q, topk)
    logits = empty(s_q, h_q, dtype=FP32)
    return SparseMLAOp(
        *(*inputs, d_v, 0.1, empty(s_q, h_q, d_v, dtype=dtype), logits, logits),
        *(int32(s_q), empty(h_q, dtype=FP32)),
        *((cache(999), int32(s_q, 128), int32(s_q)) if extra else (None, None, None)),
        *(packed, packed if extra else None),
    )


def gqa(h_q, h_kv, d, dtype=BF16, s_q=S_Q, s_kv=S_KV, topk=TOPK, per_head=False) -> SparseGQAOp:
    q, k, v = empty(s_q, h_q, d, dtype=dtype), *(empty(s_kv, h_kv, d, dtype=dtype) for _ in "kv")
    indices = int32(s_q, h_kv, topk) if per_head else int32(s_q, topk)
    outputs = empty(s_q, h_q, d, dtype=dtype), empty(s_q, h_q, dtype=FP32)
    return SparseGQAOp(q, k, v, indices, 0.1, *outputs, int32(s_q), empty(h_q, dtype=FP32))


def index(
    h, q=BF16, k=None, d=128, s_q=S_Q, s_kv=S_KV, paged_rows=0, page_size=64, ragged=False
) -> IndexLogitsOp:
    """q and k by dtype, k like q by default; uint8 is e2m1."""
    k = q if k is None else k
    pages = s_kv // page_size
    keys = (pages, page_size) if paged_rows else (s_kv,)
    width, table = (page_size * pages, int32(paged_rows, pages)) if paged_rows else (s_kv, None)

    def operand(dtype, *rows):
        if dtype == UINT8:
            return empty(*rows, d // 2, dtype=dtype), empty(*rows, d // 32, dtype=UINT8)
        return empty(*rows, d, dtype=dtype), empty(*rows, dtype=FP32) if dtype == E4M3 else None

    (q, q_scale), (k, k_scale) = operand(q, s_q, h), operand(k, *keys)
    q_scale = None if q.dtype == E4M3 else q_scale
    if paged_rows and k.dtype == E4M3 and d == 128:
        k, k_scale = index_k_views(empty(pages, page_size, 132, dtype=UINT8))
    inputs = q, k, empty(s_q, h, dtype=FP32), int32(s_q), int32(s_q)
    sequences = int32(paged_rows + 1) if ragged else None
    return IndexLogitsOp(*inputs, empty(s_q, width, dtype=FP32), q_scale, k_scale, table, sequences)


def select(s_q=512, s_kv=1 << 17, topk=TOPK) -> SelectTopkOp:
    return SelectTopkOp(empty(s_q, s_kv, dtype=FP32), topk, int32(s_q), int32(s_q), int32(s_q, topk))


def lightning(h, *formats, **options) -> LightningTopkOp:
    a = index(h, *formats, **options)
    required = *a[:3], TOPK, a.ks, a.ke, 1 << 28, int32(len(a.q), TOPK)
    return LightningTopkOp(*required, a.q_scale, a.k_scale, a.block_table, a.cu_seqlens_q)


def slots(sequences=S_Q, page_size=64, ragged=False) -> PhysicalSlotsOp:
    required = int32(S_Q, TOPK), int32(sequences, S_KV // page_size), page_size, page_size, int32(S_Q, TOPK)
    return PhysicalSlotsOp(*required, int32(sequences + 1) if ragged else None)


def written_kv(name, width=512, tokens=S_Q) -> WriteKVOp:
    """Into a cache of the format ``name``, or of bf16."""
    turn = None if name == "nope" else empty(tokens, 32, dtype=FP32)
    cache, scales = empty(999, 64, width), (True, 1e-6)
    if name is not None:
        fmt = KV_FORMATS[name]
        width, cache = fmt.width, empty(999, 64, fmt.bytes, dtype=UINT8)
        scales = FP4_SCALES if fmt.bytes == 288 else scales
    pairing = None if turn is None else "interleaved"
    required = empty(tokens, width), int32(tokens), 1e-6, *scales, cache
    return WriteKVOp(*required, empty(512), turn, turn, pairing, name)


def written_index_k(d=None, tokens=S_Q) -> WriteIndexKOp:
    """Into a cache of 132 bytes per key, or of ``d`` bf16."""
    turn, norm = empty(tokens, 32, dtype=FP32), empty(d or 128)
    cache = empty(999, 64, d) if d else empty(999, 64, 132, dtype=UINT8)
    required = empty(tokens, d or 128), int32(tokens), 1e-6, True, True, 1e-6, cache
    return WriteIndexKOp(*required, norm, norm, turn, turn, "half")


def quantised_index_q(h, tokens=S_Q) -> QuantiseIndexQOp:
    turn, weights = empty(tokens, 32, dtype=FP32), empty(tokens, h, dtype=FP32)
    outputs = empty(tokens, h, 128, dtype=UINT8), weights
    return QuantiseIndexQOp(empty(tokens, h, 128), weights, True, True, 1e-6, *outputs, turn, turn, "half")


def merge(n, s_q=S_Q, h=128, d_v=512, dtype=BF16) -> MergeAttentionOp:
    lses = empty(n, s_q, h, dtype=FP32)
    outs, out = empty(n, s_q, h, d_v, dtype=dtype), empty(s_q, h, d_v, dtype=dtype)
    return MergeAttentionOp(outs, lses, out, lses[0])


CASES = [
    Case("index_logits", "32 heads", index(32)),
    Case("index_logits", "64 heads", index(64), quick=WITHOUT_89),
    Case("index_logits", "64 heads, paged", index(64, paged_rows=2)),
    Case("index_logits", "128 heads, paged", index(128, paged_rows=2), quick=(80, 90)),
    Case("index_logits", "64 heads, fp16", index(64, FP16)),
    Case("index_logits", "64 heads, fp32", index(64, FP32), quick=(86,)),
    Case("index_logits", "64 heads, fp8", index(64, E4M3), quick=ALL),
    Case("index_logits", "64 heads, fp8, paged", index(64, E4M3, paged_rows=2), quick=(80, 90)),
    Case("index_logits", "64 heads, fp8, paged, 1 query each", index(64, E4M3, paged_rows=S_Q)),
    Case("index_logits", "64 heads, fp8, ragged", index(64, E4M3, paged_rows=9, ragged=True), quick=(80, 90)),
    Case("index_logits", "64 heads, bf16 x fp8, paged", index(64, BF16, E4M3, paged_rows=2), quick=(80, 90)),
    Case("index_logits", "64 heads, fp32 x fp8, paged", index(64, FP32, E4M3, paged_rows=2)),
    Case("index_logits", "64 heads, mxfp4", index(64, UINT8), quick=(80, 90)),
    Case("index_logits", "8 heads, fp8, paged", index(8, E4M3, paged_rows=2)),
    Case("index_logits", "4 heads x 64", index(4, d=64)),
    Case("select_topk", "512 rows", select(), quick=(80, 90)),
    Case("select_topk", "1 long row", select(1, 1 << 20)),
    Case("lightning_topk", "64 heads, fp8, paged", lightning(64, E4M3, s_q=64, paged_rows=2)),
    Case("lightning_topk", "64 heads, 1 query", lightning(64, s_q=1, s_kv=1 << 20)),
    Case("physical_slots", "k 2048", slots(), quick=(80,)),
    Case("physical_slots", "k 2048, ragged", slots(99, ragged=True), quick=(80,)),
    Case("write_kv", "656 bytes", written_kv("v32"), quick=(80, 90)),
    Case("write_kv", "584 bytes", written_kv("v4")),
    Case("write_kv", "528 bytes", written_kv("v41")),
    Case("write_kv", "528 bytes, no RoPE", written_kv("nope")),
    Case("write_kv", "288 bytes", written_kv("v41_fp4")),
    Case("write_kv", "576 bf16", written_kv(None, 576)),
    Case("write_kv", "512 bf16", written_kv(None)),
    Case("write_index_k", "132 bytes", written_index_k(), quick=(80, 90)),
    Case("write_index_k", "128 bf16", written_index_k(128)),
    Case("quantise_index_q", "64 heads", quantised_index_q(64), quick=(80, 90)),
    *(
        Case("sparse_mla", f"{h} heads", mla(h), quick=WITHOUT_89 if h in (16, 128) else ())
        for h in (8, 16, 32, 64, 128)
    ),
    Case("sparse_mla", "64 heads, d_qk 512, 2 segments", mla(64, 512, extra=True)),
    Case("sparse_mla", "128 heads, d_qk 512, 2 segments", mla(128, 512, extra=True), quick=(80, 90, 100)),
    Case("sparse_mla", "40 heads, d_v 128", mla(40, d_v=128), quick=(86, 90)),
    Case("sparse_mla", "40 heads, d_qk 1024", mla(40, 1024), quick=(90,)),
    Case("sparse_mla", "64 heads, fp16", mla(64, dtype=FP16)),
    Case("sparse_mla", "64 heads, fp32", mla(64, dtype=FP32), quick=(86,)),
    *(
        Case("sparse_mla", f"{h} heads, 656 bytes", mla(h, packed="v32"), quick=ALL if h in (16, 128) else ())
        for h in (8, 16, 32, 64, 128)
    ),
    *(
        Case("sparse_mla", f"{h} heads, 584 bytes", mla(h, packed="v4"), quick=(80, 90) if h == 64 else ())
        for h in (8, 16, 32, 64, 128)
    ),
    Case("sparse_mla", "128 heads, 584 bytes, 2 segments", mla(128, packed="v4", extra=True)),
    *(
        Case("sparse_mla", f"{h} heads, {name}", mla(h, packed=name), quick=quick if h == 64 else ())
        for name, quick in (  # each way to decode on both; pages change addresses alone
            *(("v41", (80, 90)), ("v41_by_page", (90,)), ("nope", (80,))),
            *(("v41_fp4", (80,)), ("v41_fp4_by_page", (90,))),
        )
        for h in (16, 32, 64)
    ),
    Case("sparse_mla", "64 heads, pages apart", mla(64, page_size=64), quick=(90,)),
    # Few queries, whose keys are split.
    Case("sparse_mla", "16 heads, split", mla(16, s_q=4), quick=(80, 100)),
    Case("sparse_mla", "16 heads, 656 bytes, split", mla(16, packed="v32", s_q=4)),
    Case("sparse_gqa", "24 / 2 heads x 256, split", gqa(24, 2, 256, s_q=4), quick=(90,)),
    # The warp-specialised kernel, of so many queries that no keys are split, and so few that they are.
    *(Case("sparse_mla", f"128 heads, {s_q} queries", mla(128, s_q=s_q), HOPPER, HOPPER) for s_q in (540, 4)),
    *(
        Case(
            *("sparse_mla", f"128 heads, {s_q} queries, 656 bytes"),
            *(mla(128, s_q=s_q, packed="v32", page_size=64), HOPPER, HOPPER),
        )
        for s_q in (540, 4)
    ),
    Case("sparse_gqa", "8 / 8 heads x 64", gqa(8, 8, 64)),
    Case("sparse_gqa", "32 / 8 heads x 128", gqa(32, 8, 128)),
    Case("sparse_gqa", "24 / 2 heads x 256", gqa(24, 2, 256), quick=WITHOUT_89),
    Case("sparse_gqa", "24 / 2 heads x 256, own indices", gqa(24, 2, 256, per_head=True)),
    Case("sparse_gqa", "64 / 1 heads x 128", gqa(64, 1, 128), quick=(80, 90, 100)),
    Case("sparse_gqa", "32 / 8 heads x 128, fp16", gqa(32, 8, 128, FP16)),
    Case("sparse_gqa", "24 / 2 heads x 256, fp32", gqa(24, 2, 256, FP32), quick=(90,)),
    Case("merge_attention", "d_v 512", merge(4), quick=(80, 90)),
    Case("merge_attention", "d_v 128", merge(4, h=32, d_v=128)),
]


class Product(NamedTuple):
    """[m, k] x [k, n], of elements of ``bits``."""

    m: int
    n: int
    k: int


def _attention(h: int, n: int, d_qk: int, d_v: int, keys_on_m: bool = False) -> list[Product]:
    return [Product(n, h, d_qk) if keys_on_m else Product(h, n, d_qk), Product(h, d_v, n)]


# kernel -> its constants -> the products of one round of its main loop
PRODUCTS: dict[str, Any] = {
    "_index_logits_kernel": lambda c: [Product(c["BLOCK_N"], c["QUERIES"] * c["BLOCK_H"], c["BLOCK_D"])],
    "_sparse_mla_kernel": lambda c: _attention(
        *(c["BLOCK_H"], c["BLOCK_N"], c["BLOCK_V"] + (c["BLOCK_ROPE"] if c["D_ROPE"] else 0), c["BLOCK_V"]),
        c["KEYS_ON_M"],
    ),
    # Two tiles of 64 keys, by two consumers.
    "_sparse_mla_hopper_kernel": lambda c: _attention(64, 128, 576, 512),
    "_sparse_gqa_kernel": lambda c: _attention(c["BLOCK_H"], c["BLOCK_N"], c["BLOCK_D"], c["BLOCK_V"]),
}
