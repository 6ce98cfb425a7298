"""Time operations on the CPU beside what they are compared with: tables, JSON lines and plots.

Every case is checked against fp64 or an exact selection first; a wrong one is named and not timed.
"""

import argparse
import dataclasses
import datetime
import sys
from pathlib import Path

import torch
from rich.console import Console

from bench import operations
from bench.case import FULL, QUICK, Sizes
from bench.command import parser
from bench.limits import measure_limits
from bench.timing import append_json, describe, machine, threads

WIDTH = 120  # of the tables where the terminal's is not known


def main(arguments: list[str] | None = None) -> None:
    command = parser(__doc__, rounds=5)
    known = ", ".join(operations.OPERATIONS)
    command.add_argument("operations", nargs="*", metavar="operation", help=f"of {known}; default: all")
    command.add_argument("--quick", action="store_true", help="few sizes, less than two minutes")
    command.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    command.add_argument("--output", type=Path, metavar="FOLDER", help="where plots go; none without it")
    options = command.parse_args(arguments)
    if unknown := [name for name in options.operations if name not in operations.OPERATIONS]:
        command.error(f"operation: expected some of {known}, got {', '.join(unknown)}")
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    with threads(options.threads):
        sys.exit(0 if run(options, QUICK if options.quick else FULL, console) else 1)


def run(options: argparse.Namespace, sizes: Sizes, console: Console) -> bool:
    """Time, print, write and plot; gives whether every result was right."""
    limits, here = measure_limits(), machine()
    peak = limits.operations_per_second
    computing = f"{peak / 1e9:.0f} GFLOP/s in registers" if peak else "no peak without C++ kernels"
    console.print(f"[dim]{describe(here)}[/dim]", highlight=False)
    console.print(
        f"[dim]Measured here: {computing}, {limits.bytes_per_second / 1e9:.1f} GB/s from memory[/dim]",
        highlight=False,
    )
    names = options.operations or operations.OPERATIONS
    lines = operations.run(console, names, sizes, torch.device("cpu"), options.rounds, limits=limits)
    about = {
        "date": f"{datetime.date.today():%Y-%m-%d}",
        "command": " ".join(["python benchmarks/run.py", *sys.argv[1:]]),
        "rounds": options.rounds,
        "limits": dataclasses.asdict(limits),
    }
    append_json(options.json, "cpu", [{**about, **line} for line in lines])
    if options.output:
        from bench.plots import operation_plots

        for path in operation_plots(lines, here, options.output):
            console.print(f"[dim]{path}[/dim]", highlight=False)
    return not any("not_timed" in line for line in lines)


if __name__ == "__main__":
    main()
