"""Sparse grouped-query attention (32 / 8 heads x 128, k = 2048) against dense attention in decode."""

from sparse_attn.bench.run import main

if __name__ == "__main__":
    main("gqa")
