"""How much faster all threads are than one, for one query and for several: attention, indexer + top-k, GQA.

One query is split by heads (in the indexer by keys); of several, each thread takes some. Results are equal.
"""

import argparse
import os

import torch
from rich.console import Console
from rich.table import Table

from bench.timing import append_json, interleaved, machine
from sparse_attn import lightning_topk, sparse_gqa, sparse_mla

TOPK = 2048
OPERATIONS = ("attention", "indexer + top-k", "GQA")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: the number of cores")
    parser.add_argument("--rounds", type=int, default=11, help="interleaved rounds (default 11)")
    parser.add_argument("--json", metavar="FILE", help="also append the figures, one JSON object per line")
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        rows = [measure(n, options.context, options.threads, options.rounds) for n in options.queries]
    show(rows, options.context, options.threads)
    if options.json:
        append_json(options.json, "cpu_threads", rows)


def measure(queries: int, context: int, threads: int, rounds: int) -> dict:
    """Seconds of each operation with one thread and with all, in the same rounds."""
    q, kv, index_q, index_k = (
        torch.randn(shape, dtype=torch.bfloat16)
        for shape in ((queries, 128, 576), (context, 576), (queries, 64, 128), (context, 128))
    )
    grouped, k, v = (
        torch.randn(shape, dtype=torch.bfloat16)
        for shape in ((queries, 32, 128), (context, 8, 128), (context, 8, 128))
    )
    weights, ks = torch.randn(queries, 64), torch.zeros(queries, dtype=torch.int32)
    picked = [torch.randperm(context)[:TOPK].sort().values.int() for _ in range(queries)]
    indices = torch.stack(picked)
    calls = {
        "attention": lambda: sparse_mla(q, kv, indices),
        "indexer + top-k": lambda: lightning_topk(index_q, index_k, weights, TOPK, ks, ks + context),
        "GQA": lambda: sparse_gqa(grouped, k, v, indices),
    }

    def with_threads(count: int, name: str):
        def call() -> None:
            torch.set_num_threads(count)
            calls[name]()

        return call

    both = {(name, count): with_threads(count, name) for name in OPERATIONS for count in (1, threads)}
    timings = interleaved(both, rounds)
    row = {"queries": queries, "context": context, "all_threads": threads}
    for name in OPERATIONS:
        one, many = (timings[name, count].median for count in (1, threads))
        row[name] = {"one_thread": one, "all_threads": many, "times": one / many}
    return row


def show(rows: list[dict], context: int, threads: int) -> None:
    table = Table(
        title=f"{threads} threads against one, ms (medians of interleaved rounds)",
        caption=f"{machine()['processor']}, {machine()['cpu_kernels']}; {context:,} tokens, k = {TOPK}, "
        f"bf16; OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'unset')}",
    )
    table.add_column("queries", justify="right")
    for name in OPERATIONS:
        table.add_column(name, justify="right")
    for row in rows:
        cells = (row[name] for name in OPERATIONS)
        table.add_row(
            str(row["queries"]),
            *(
                f"{1e3 * c['one_thread']:.2f} / {1e3 * c['all_threads']:.2f}  {c['times']:.2f}x"
                for c in cells
            ),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
