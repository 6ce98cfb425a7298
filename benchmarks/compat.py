"""How much time a call through sparse_attn.compat adds to the function and the op below it: Python overhead.

The calls are so small (one query, few heads, few tokens) that they take hardly more than their overhead.
"""

import argparse

import torch

from bench.timing import describe, interleaved
from sparse_attn import formats, index_logits, ops, sparse_mla
from sparse_attn.compat import deep_gemm, flash_mla
from sparse_attn.ops.attention import SparseMLAOp


def cases():
    """name -> {"facade" | "function" | "op": function}, whose results are equal."""
    cache = formats.pack_v32_kv(torch.randn(4, 64, 1, 576))
    q, indices = torch.randn(1, 1, 8, 576).bfloat16(), torch.randint(256, (1, 1, 16)).int()
    metadata, _ = flash_mla.get_mla_metadata()
    options = dict.fromkeys(("block_table", "cache_seqlens"))
    options |= {
        "head_dim_v": 512,
        "tile_scheduler_metadata": metadata,
        "is_fp8_kvcache": True,
        "indices": indices,
    }
    rows, slots, pages = q[0], indices[0], cache[:, :, 0]
    out, lse, max_logits = torch.empty(1, 8, 512).bfloat16(), torch.empty(1, 8), torch.empty(1, 8)
    a = SparseMLAOp(rows, pages, slots, 512, 576**-0.5, out, lse, max_logits, kv_format="v32")
    yield (
        "flash_mla_with_kvcache, fp8",
        {
            "facade": lambda: flash_mla.flash_mla_with_kvcache(q, cache, **options)[0][0],
            "function": lambda: sparse_mla(rows, cache, slots, return_lse=True)[0],
            "op": lambda: (ops.call("sparse_mla", a, "auto"), out)[1],
        },
    )

    kv = torch.randn(256, 1, 576).bfloat16()
    yield (
        "flash_mla_sparse_fwd",
        {
            "facade": lambda: flash_mla.flash_mla_sparse_fwd(rows, kv, indices, 0.1)[0],
            "function": lambda: sparse_mla(rows, kv[:, 0], slots, softmax_scale=0.1, return_lse=True)[0],
        },
    )

    keys = formats.pack_index_k(torch.randn(4, 64, 128))
    queries = torch.randn(1, 1, 8, 128).to(torch.float8_e4m3fn)
    weights, lengths, table = torch.randn(1, 8), torch.full((1, 1), 64).int(), torch.arange(4).int()[None]
    schedule = deep_gemm.get_paged_mqa_logits_metadata(lengths, 64, deep_gemm.get_num_sms())
    zero = torch.zeros(1).int()
    paged = keys[:, :, None], weights, lengths, table, schedule, 256
    yield (
        "fp8_paged_mqa_logits",
        {
            "facade": lambda: deep_gemm.fp8_paged_mqa_logits(queries, *paged),
            "function": lambda: index_logits(queries[0], keys, weights, zero, lengths[0], block_table=table),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument(
        "--limit", type=float, help="fail if a facade costs more microseconds over its function"
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    worst = 0.0
    with torch.inference_mode():
        print(describe())
        print(f"{'microseconds per call':30} {'facade':>8} {'function':>9} {'op':>8} {'facade adds':>12}")
        for name, functions in cases():
            results = [function() for function in functions.values()]
            if not all(torch.equal(results[0], other) for other in results):
                raise AssertionError(f"{name}: the results differ")
            timings = interleaved(functions, arguments.rounds)
            times = {form: 1e6 * timing.low for form, timing in timings.items()}  # noise only adds
            added = times["facade"] - times["function"]
            worst = max(worst, added)
            op = f"{times['op']:8.1f}" if "op" in times else f"{'':8}"
            print(f"{name:30} {times['facade']:8.1f} {times['function']:9.1f} {op} {added:12.1f}")
    if arguments.limit is not None and worst > arguments.limit:
        raise SystemExit(f"a facade costs {worst:.1f} microseconds, more than {arguments.limit}")


if __name__ == "__main__":
    main()
