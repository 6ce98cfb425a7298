"""Indexer scores against the same formula written with one bf16 and one fp32 matrix product."""

from sparse_attn.bench.run import main

if __name__ == "__main__":
    main("indexer")
