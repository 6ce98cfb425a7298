"""Sparse grouped-query attention (32 / 8 heads x 128, k = 2048) against dense attention in decode."""

import torch
import torch.nn.functional as F

import sparse_attn
from sparse_attn import reference
from sparse_attn.bench.compare import Case, main
from sparse_attn.testing import assert_close

H_Q, H_KV, D, TOPK = 32, 8, 128, 2048


def cases(quick: bool):
    for s_kv in (8192, 32768) if quick else (8192, 32768, 131072):
        yield case(s_kv)


def case(s_kv: int) -> Case:
    q = torch.randn(1, H_Q, D, dtype=torch.bfloat16)
    k, v = torch.randn(2, s_kv, H_KV, D, dtype=torch.bfloat16)
    indices = torch.randperm(s_kv)[None, :TOPK].sort().values.int()
    grouped = q[0].unflatten(0, (H_KV, -1))  # [h_kv, group, d]
    keys, values = (x.transpose(0, 1).contiguous() for x in (k, v))  # the layout that dense forms like best

    def ours():
        return sparse_attn.sparse_gqa(q, k, v, indices)

    def matmul():
        return (grouped @ keys.mT * D**-0.5).softmax(-1) @ values

    def check():
        exact, _ = reference.sparse_gqa(q.double(), k.double(), v.double(), indices, D**-0.5)
        assert_close(ours(), exact)

    peers = {
        "dense SDPA": lambda: F.scaled_dot_product_attention(grouped[None], keys[None], values[None]),
        "dense matmul": matmul,
    }
    return Case(f"1 query of {s_kv:,}", {"sparse_gqa": ours, **peers}, check)


if __name__ == "__main__":
    main("sparse_gqa, 32 / 8 heads x 128, 2048 of the context", cases)
