"""Exact selection against torch.topk (unordered in ties) and a stable sort (exact)."""

from sparse_attn.bench.run import main

if __name__ == "__main__":
    main("top-k")
