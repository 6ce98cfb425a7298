"""Time operations beside what they are compared with, on a GPU or the CPU: tables, JSON lines and plots.

Every case is checked against fp64 or an exact selection first; a wrong one is named and not timed.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from bench import operations
from bench.case import SIZES, Sizes
from bench.command import choose_device, parser, start
from bench.timing import append_json, describe, threads

WIDTH = 120  # of the tables where the terminal's is not known


def main(arguments: list[str] | None = None) -> None:
    command = parser(__doc__, rounds=5)
    known = ", ".join(operations.OPERATIONS)
    command.add_argument("operations", nargs="*", metavar="operation", help=f"of {known}; default: all")
    command.add_argument("--quick", action="store_true", help="few sizes, less than two minutes on a CPU")
    devices = "cpu, cuda or cuda:N (default: a GPU that the kernels run on, else the CPU)"
    command.add_argument("--device", help=devices)
    command.add_argument("--threads", type=int, default=1, help="torch threads on the CPU (default 1)")
    command.add_argument("--output", type=Path, metavar="FOLDER", help="where plots go; none without it")
    options = command.parse_args(arguments)
    if unknown := [name for name in options.operations if name not in operations.OPERATIONS]:
        command.error(f"operation: expected some of {known}, got {', '.join(unknown)}")
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    options.device = choose_device(options.device)
    full, quick = SIZES[options.device.type]
    with threads(options.threads):
        sys.exit(0 if run(options, quick if options.quick else full, console) else 1)


def run(options: argparse.Namespace, sizes: Sizes, console: Console) -> bool:
    """Time, print, write and plot; gives whether every result was right."""
    device, names = options.device, options.operations or operations.OPERATIONS
    clock, limits, about = start(console, device)
    lines = operations.run(console, names, sizes, device, options.rounds, clock, limits)
    about["rounds"] = options.rounds
    kind = "gpu" if device.type == "cuda" else "cpu"
    append_json(options.json, kind, [{**about, **line} for line in lines])
    if options.output:
        from bench.plots import operation_plots

        for path in operation_plots(lines, describe(device), options.output):
            console.print(f"[dim]{path}[/dim]", highlight=False)
    return not any("not_timed" in line for line in lines)


if __name__ == "__main__":
    main()
