"""Peak memory of selecting and attending, beside the formula as it reads and dense attention."""

from sparse_attn.bench.run import main

if __name__ == "__main__":
    main("memory")
