"""What share of this core's multiply-add peak the C++ kernels reach: attention, indexer, top-k.

The peak is a loop of multiply-adds in registers, run in the same rounds as the kernels, on one
thread, for each instruction set of the machine: bf16 dots where the set has them, else fp32 FMA.
"""

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from bench.timing import append_json, machine
from sparse_attn import native, reference
from sparse_attn.testing import assert_close

HEADS, D_QK, D_V, TOPK, SCALE = 128, 576, 512, 2048, 192**-0.5
INDEX_HEADS, INDEX_D = 64, 128
ATTEND_OPS = 2 * HEADS * TOPK * (D_QK + D_V)
INDEX_OPS = 2 * INDEX_HEADS * INDEX_D  # a key
PEAK_SECONDS = 5e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--context", type=int, default=32768, help="keys that the indexer scores")
    parser.add_argument("--rounds", type=int, default=11, help="interleaved rounds (default 11)")
    parser.add_argument("--json", metavar="FILE", help="also append the figures, one JSON object a line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        rows = measure(options.context, options.rounds)
    show(rows, options.context)
    if options.json:
        append_json(options.json, "cpu_limits", rows)


def measure(context: int, rounds: int) -> list[dict]:
    q, kv = torch.randn(1, HEADS, D_QK).bfloat16(), torch.randn(context, D_QK).bfloat16()
    indices = torch.randperm(context)[None, :TOPK].sort().values.int()
    out, lse = torch.empty(1, HEADS, D_V, dtype=q.dtype), torch.empty(1, HEADS)
    index_q, index_k = (
        torch.randn(1, INDEX_HEADS, INDEX_D).bfloat16(),
        torch.randn(context, INDEX_D).bfloat16(),
    )
    weights, ranges = torch.randn(1, INDEX_HEADS), torch.tensor([[0], [context]], dtype=torch.int32)
    logits, picked = torch.empty(1, context), torch.empty(1, TOPK, dtype=torch.int32)
    calls = {
        "attend": lambda: native.sparse_mla(q, kv, indices, D_V, SCALE, *[None] * 5, out, lse, None),
        "index": lambda: native.index_logits(index_q, index_k, weights, *ranges, None, None, None, logits),
        "select": lambda: native.select_topk(logits, TOPK, *ranges, picked),
    }
    exact_out, *_ = reference.sparse_mla(q.double(), kv.double(), indices, D_V, SCALE)
    exact_logits = reference.index_logits(index_q.double(), index_k.double(), weights.double(), *ranges)
    isas = native.instruction_sets()
    seconds = {isa: {name: [] for name in ("peak", *calls)} for isa in isas}
    for round_ in range(rounds + 1):
        for isa in isas:
            with native.use(isa):
                if round_ == 0:
                    check(calls, (out, logits, picked), exact_out, exact_logits, ranges)
                    continue
                seconds[isa]["peak"].append(seconds_an_operation())
                for name, call in calls.items():
                    call()  # so that what fits a cache is there: the selected rows, the row of logits
                    seconds[isa][name].append(thread_seconds(call))
    medians = {isa: {n: statistics.median(t) for n, t in times.items()} for isa, times in seconds.items()}
    return [
        {
            "instruction_set": isa,
            "peak_gflops": 1e-9 / t["peak"],
            "attend_ms": 1e3 * t["attend"],
            "attend_share": ATTEND_OPS * t["peak"] / t["attend"],
            "index_ms": 1e3 * t["index"],
            "index_share": INDEX_OPS * context * t["peak"] / t["index"],
            "select_us": 1e6 * t["select"],
            "select_of_index": t["select"] / t["index"],
        }
        for isa, t in medians.items()
    ]


def thread_seconds(call) -> float:
    """Time that this thread had a core: neighbours who take it away do not count."""
    start = time.thread_time()
    call()
    return time.thread_time() - start


def seconds_an_operation() -> float:
    kind = "bf16" if native.peak("bf16", 1) else "fp32"
    rounds = 1000
    while True:
        start = time.thread_time()
        operations = native.peak(kind, rounds)
        taken = time.thread_time() - start
        if taken > PEAK_SECONDS:
            return taken / operations
        rounds *= 4


def check(calls, results, exact_out, exact_logits, ranges) -> None:
    for call in calls.values():
        call()
    out, logits, picked = results
    assert_close(out, exact_out)
    assert_close(logits, exact_logits)
    assert torch.equal(picked, reference.select_topk(logits, TOPK, *ranges))


def show(rows: list[dict], context: int) -> None:
    table = Table(
        title="Share of the multiply-add peak of one core (medians of interleaved rounds)",
        caption=f"{machine()['processor']}; one query, 128 heads, {TOPK} rows; 64 x 128, {context:,} keys",
    )
    for name in (
        "instruction set",
        "peak GFLOP/s",
        "attend ms",
        "of peak",
        "indexer ms",
        "of peak",
        "top-k us",
    ):
        table.add_column(name, justify="left" if name == "instruction set" else "right")
    table.add_column("of indexer", justify="right")
    for r in rows:
        table.add_row(
            *(r["instruction_set"], f"{r['peak_gflops']:.0f}"),
            *(f"{r['attend_ms']:.2f}", f"{r['attend_share']:.0%}", f"{r['index_ms']:.2f}"),
            *(f"{r['index_share']:.0%}", f"{r['select_us']:.0f}", f"{r['select_of_index']:.1%}"),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
