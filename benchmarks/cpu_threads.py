"""How much faster all threads are than one, for one query and for several: attention, indexer + top-k, GQA.

One query is split by heads (in the indexer by keys); of several, each thread takes some. Results are equal.
"""

import os

import torch
from rich.console import Console

from bench.command import parser, table
from bench.tensors import normal
from bench.timing import append_json, interleaved, machine
from sparse_attn import lightning_topk, sparse_gqa, sparse_mla

TOPK = 2048
OPERATIONS = ("attention", "indexer + top-k", "GQA")


def main() -> None:
    command = parser(__doc__, rounds=11)
    command.add_argument("--queries", type=int, nargs="+", default=[1, 4, 16])
    command.add_argument("--context", type=int, default=32768)
    command.add_argument("--threads", type=int, default=os.cpu_count(), help="default: the number of cores")
    options = command.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        rows = [measure(n, options.context, options.threads, options.rounds) for n in options.queries]
    show(rows, options.context, options.threads)
    append_json(options.json, "cpu_threads", rows)


def measure(queries: int, context: int, threads: int, rounds: int) -> dict:
    """Seconds of each operation with one thread and with all, in the same rounds."""
    cpu = torch.device("cpu")
    q, kv = normal(cpu, queries, 128, 576), normal(cpu, context, 576)
    index = normal(cpu, queries, 64, 128), normal(cpu, context, 128), torch.randn(queries, 64)
    grouped, k, v = normal(cpu, queries, 32, 128), normal(cpu, context, 8, 128), normal(cpu, context, 8, 128)
    picked = [torch.randperm(context)[:TOPK].sort().values.int() for _ in range(queries)]
    indices = torch.stack(picked)
    calls = {
        "attention": lambda: sparse_mla(q, kv, indices),
        "indexer + top-k": lambda: lightning_topk(*index, TOPK),
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
    title = f"{threads} threads against one, ms (medians of interleaved rounds)"
    caption = f"{machine()['processor']}, {machine()['cpu_kernels']}; {context:,} tokens, k = {TOPK}, bf16; "
    caption += f"OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'unset')}"

    def cell(c: dict) -> str:
        return f"{1e3 * c['one_thread']:.2f} / {1e3 * c['all_threads']:.2f}  {c['times']:.2f}x"

    cells = [[str(row["queries"]), *(cell(row[name]) for name in OPERATIONS)] for row in rows]
    Console().print(table(("queries", *OPERATIONS), cells, words=0, title=title, caption=caption))


if __name__ == "__main__":
    main()
