"""Sparse MLA attention (128 heads, 576 / 512, k = 2048) against dense attention over the whole context."""

from sparse_attn.bench.run import main

if __name__ == "__main__":
    main("attention")
