"""Sparse MLA attention (128 heads, 576 / 512, k = 2048) against dense attention over the whole context."""

import torch

import sparse_attn
from sparse_attn import reference
from sparse_attn.bench import dense
from sparse_attn.bench.compare import Case, main
from sparse_attn.testing import assert_close

HEADS, D_QK, D_V, TOPK = 128, 576, 512, 2048
SCALE = 192**-0.5


def cases(quick: bool):
    for s_kv in (8192, 32768) if quick else (8192, 32768, 131072):
        yield case(s_kv)


def case(s_kv: int) -> Case:
    q = torch.randn(1, HEADS, D_QK, dtype=torch.bfloat16)
    kv = torch.randn(s_kv, D_QK, dtype=torch.bfloat16)
    indices = torch.randperm(s_kv)[None, :TOPK].sort().values.int()

    def ours():
        return sparse_attn.sparse_mla(q, kv, indices, d_v=D_V, softmax_scale=SCALE)

    def naive():
        rows = kv[indices[0].long()]
        return (q[0] @ rows.mT * SCALE).softmax(-1) @ rows[:, :D_V]

    def check():
        exact, *_ = reference.sparse_mla(q.double(), kv.double(), indices, D_V, SCALE)
        assert_close(ours(), exact)

    peers = {
        "torch gather, bf16 logits": naive,
        "dense SDPA": lambda: dense.sdpa_folded(q[0], kv, SCALE),
        "dense GEMM": lambda: dense.gemm_chunked(q[0], kv, SCALE),
    }
    return Case(f"1 query of {s_kv:,}", {"sparse_mla": ours, **peers}, check)


if __name__ == "__main__":
    main("sparse_mla, 128 heads, 2048 of the context", cases)
