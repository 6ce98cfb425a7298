"""Indexer scores against the same formula written with one bf16 and one fp32 matrix product."""

import torch

import sparse_attn
from sparse_attn import reference
from sparse_attn.bench.compare import Case, main
from sparse_attn.testing import assert_close

HEADS, D = 64, 128


def cases(quick: bool):
    for s_q, s_kv in ((1, 8192), (1, 32768)) if quick else ((1, 8192), (1, 32768), (1, 131072), (16, 32768)):
        q = torch.randn(s_q, HEADS, D, dtype=torch.bfloat16)
        k = torch.randn(s_kv, D, dtype=torch.bfloat16)
        weights = torch.randn(s_q, HEADS)
        ks = torch.zeros(s_q, dtype=torch.int32)
        ke = ks + s_kv
        yield case(q, k, weights, ks, ke)


def case(q, k, weights, ks, ke) -> Case:
    def ours():
        return sparse_attn.index_logits(q, k, weights, ks, ke)

    def naive(dtype):
        scores = (q.to(dtype) @ k.to(dtype).mT).relu_()  # [s_q, heads, s_kv]
        return torch.einsum("th,ths->ts", weights, scores.float())

    def check():
        exact = reference.index_logits(q[:1].double(), k.double(), weights[:1].double(), ks[:1], ke[:1])
        assert_close(ours()[:1], exact)

    peers = {
        "torch bf16, [s_q, h, s_kv]": lambda: naive(torch.bfloat16),
        "torch fp32": lambda: naive(torch.float32),
    }
    label = f"{q.shape[0]} queries, {k.shape[0]:,} keys"
    return Case(label.replace("1 queries", "1 query"), {"index_logits": ours, **peers}, check)


if __name__ == "__main__":
    main("index_logits, 64 heads x 128", cases)
