"""What share of this core's multiply-add peak the C++ kernels reach: attention, indexer, top-k.

The peak is a loop of multiply-adds in registers, run in the same rounds as the kernels, on one
thread, for each instruction set of the machine: bf16 dots where the set has them, else fp32 FMA.
"""

import torch
from rich.console import Console

from bench.case import FULL
from bench.command import parser, table
from bench.limits import PEAK_ROUNDS
from bench.operations import OPERATIONS
from bench.timing import append_json, interleaved, machine, thread_clock, threads
from sparse_attn.ops.backends import native

KERNELS = {  # name in the record -> operation, and which of its functions
    "attend": ("attention", "attend"),
    "index": ("indexer", "index_logits"),
    "select": ("top-k", "select_topk"),
}


def main() -> None:
    command = parser(__doc__, rounds=11)
    command.add_argument("--context", type=int, default=32768, help="keys that the indexer scores")
    options = command.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode(), threads(1):
        rows = measure(options.context, options.rounds)
    show(rows, options.context)
    append_json(options.json, "cpu_limits", rows)


def measure(context: int, rounds: int) -> list[dict]:
    sizes, cpu = FULL._replace(contexts=(context,)), torch.device("cpu")
    cases = {name: next(OPERATIONS[operation](sizes, cpu))[2]() for name, (operation, _) in KERNELS.items()}
    operations, functions = {}, {}
    for isa in native.instruction_sets():
        with native.use(isa):
            for case in cases.values():
                case.check()
            kind = "bf16" if native.peak("bf16", 1) else "fp32"
            operations[isa] = native.peak(kind, PEAK_ROUNDS)
        functions[isa, "peak"] = using(isa, lambda kind=kind: native.peak(kind, PEAK_ROUNDS))
        for name, (_, function) in KERNELS.items():
            functions[isa, name] = using(isa, cases[name].functions[function])
    timings = interleaved(functions, rounds, clock=thread_clock)
    rows = []
    for isa, count in operations.items():
        seconds = {name: timings[isa, name].median for name in ("peak", *KERNELS)}
        peak = count / seconds["peak"]
        share = {name: cases[name].work.operations / peak / seconds[name] for name in ("attend", "index")}
        rows.append(
            {
                "instruction_set": isa,
                "peak_gflops": 1e-9 * peak,
                "attend_ms": 1e3 * seconds["attend"],
                "attend_share": share["attend"],
                "index_ms": 1e3 * seconds["index"],
                "index_share": share["index"],
                "select_us": 1e6 * seconds["select"],
                "select_of_index": seconds["select"] / seconds["index"],
            }
        )
    return rows


def using(isa: str, function):
    def call() -> None:
        with native.use(isa):
            function()

    return call


def show(rows: list[dict], context: int) -> None:
    headings = "instruction set", "peak GFLOP/s", "attend ms", "of peak", "indexer ms", "of peak", "top-k us"
    cells = [
        [
            *(r["instruction_set"], f"{r['peak_gflops']:.0f}"),
            *(f"{r['attend_ms']:.2f}", f"{r['attend_share']:.0%}", f"{r['index_ms']:.2f}"),
            *(f"{r['index_share']:.0%}", f"{r['select_us']:.0f}", f"{r['select_of_index']:.1%}"),
        ]
        for r in rows
    ]
    title = "Share of the multiply-add peak of one core (medians of interleaved rounds)"
    caption = f"{machine()['processor']}; one query, 128 heads, 2048 rows; 64 x 128, {context:,} keys"
    Console().print(table((*headings, "of indexer"), cells, title=title, caption=caption))


if __name__ == "__main__":
    main()
