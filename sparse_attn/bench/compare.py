"""One table an operation: ours and its peers over several sizes, checked before they are timed."""

import argparse
import dataclasses
from collections.abc import Callable, Iterable

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from .timing import append_json, describe, interleaved, machine


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: ``functions`` by name, ours first; ``check`` raises if ours is wrong."""

    label: str
    functions: dict[str, Callable[[], object]]
    check: Callable[[], None]


def main(title: str, cases: Callable[[bool], Iterable[Case]]) -> None:
    """Command line of a benchmark script. ``cases(quick)`` gives the rows."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--quick", action="store_true", help="small sizes, seconds")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default 7)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures, one JSON object a line")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    console = Console()
    lines = []
    with torch.inference_mode():
        for case in track(list(cases(options.quick)), title, console=console, transient=True):
            case.check()
            timings = interleaved(case.functions, options.rounds)
            lines.append({"case": case.label, **{n: dataclasses.asdict(t) for n, t in timings.items()}})
    _print(console, title, lines)
    if options.json:
        append_json(options.json, title, lines)


def _print(console: Console, title: str, lines: list[dict]) -> None:
    table = Table(
        title=f"{title} (ms, median; in brackets the ratio to ours)",
        caption=describe(machine()),
    )
    ours, *peers = (name for name in lines[0] if name != "case")
    table.add_column("case", no_wrap=True)
    for name in (ours, *peers):
        table.add_column(name, justify="right")
    for line in lines:
        base = line[ours]["median"]
        cells = [
            f"{line[p]['median'] * 1e3:.3f} ({line[p]['median'] / base:.1f}x)" if p in line else ""
            for p in peers
        ]
        table.add_row(line["case"], f"{base * 1e3:.3f}", *cells)
    console.print(table)
