"""Exact selection against torch.topk (unordered in ties) and a stable sort (exact)."""

import torch

import sparse_attn
from sparse_attn import reference
from sparse_attn.bench.compare import Case, main
from sparse_attn.testing import adversarial_logits

TOPK = 2048


def cases(quick: bool):
    for s_kv in (8192, 32768) if quick else (8192, 32768, 131072, 1048576):
        for kind in ("gaussian", "relu_plateau"):
            yield case(f"{s_kv:,} logits, {kind}", adversarial_logits(kind, 1, s_kv))


def case(label: str, logits: torch.Tensor) -> Case:
    ks = torch.zeros(1, dtype=torch.int32)
    ke = ks + logits.shape[1]

    def ours():
        return sparse_attn.select_topk(logits, TOPK, ks, ke)

    def check():
        assert torch.equal(ours(), reference.select_topk(logits, TOPK, ks, ke))

    peers = {
        "torch.topk, unsorted": lambda: logits.topk(TOPK, sorted=False),
        "stable sort": lambda: logits.sort(descending=True, stable=True).indices[:, :TOPK].sort(),
    }
    return Case(label, {"select_topk": ours, **peers}, check)


if __name__ == "__main__":
    main("select_topk, k = 2048", cases)
