"""What each GPU kernel becomes on each architecture, without a GPU, and whether any got worse.

Compiles every kernel for every class of shapes and reads the machine code back. Nothing runs: the cycles are
lower bounds for one round of the main loop (benchmarks/aot/bounds.py says what they leave out), not times.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections import Counter
from pathlib import Path

import triton
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from aot import report
from aot.bounds import ARCHITECTURES
from aot.report import Row

BUDGETS = Path(__file__).parent / "kernels_budget"
WIDTH = 160  # of the table where the terminal's is not known


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="only what the tests compile")
    parser.add_argument("--only", default="", metavar="TEXT", help='cases with this in "op, case"')
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows")
    parser.add_argument(
        "--dump", type=Path, metavar="DIR", help="also write cubin, SASS, PTX and TTGIR of each"
    )
    parser.add_argument("--update-budget", action="store_true", help="make these figures the new budget")
    options = parser.parse_args()

    def wanted(case, arch) -> bool:
        return (
            arch in options.arch
            and options.only in f"{case.op}, {case.label}"
            and (arch in case.quick or not options.quick)
        )

    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    start = time.perf_counter()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("compiling", total=None)
        rows = report.rows(
            wanted, options.dump, lambda done, of: progress.update(task, completed=done, total=of)
        )
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row.op}, {row.case}: {row.kernel}", []).append(row)
    for title, group in groups.items():
        show(console, title, group)
    console.print(
        f"{len(rows)} kernels, Triton {triton.__version__}, {time.perf_counter() - start:.0f} s. "
        "Compiled, not run: cycles are lower bounds for one round of the main loop, not times."
    )
    if options.json:
        lines = [{**dataclasses.asdict(row), "triton": triton.__version__} for row in rows]
        options.json.write_text(json.dumps(lines, indent=1) + "\n")
    everything = not (options.quick or options.only) and set(options.arch) == set(ARCHITECTURES)
    sys.exit(judge(console, rows, options.update_budget, everything))


COLUMNS = {  # heading -> least width, so that the tables align
    **{"sm": 3, "tile": 9, "warps": 5, "regs": 4, "spills": 9, "shared KiB": 10, "TMEM": 4},
    **{"blocks": 8, "ahead": 5},
    **{"matrix instructions": 36, "work": 4, "loads x bytes": 13, "round": 5},
    **{"tensor": 6, "shared": 6, "issue": 5, "L2": 5},
}


def show(console: Console, title: str, rows: list[Row]) -> None:
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for name, width in COLUMNS.items():
        table.add_column(name, justify="right", min_width=width, no_wrap=True)
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)


def cells(row: Row) -> list[str]:
    limit = ARCHITECTURES[row.arch].block_shared
    tile = " x ".join(str(row.constants[name]) for name in ("BLOCK_H", "BLOCK_N") if name in row.constants)
    spills = f"{row.loop_spills} / {row.spills}"
    shared = f"{row.shared / 1024:.0f} / {limit // 1024}"
    tightest = min(row.blocks, key=row.blocks.__getitem__)
    work = "" if row.work is None else f"{row.work:.2f}"
    bound = max(row.cycles.values())
    return [
        *(str(row.arch), tile, str(row.warps), str(row.registers)),
        f"[red]{spills}[/red]" if row.loop_spills else spills,
        f"[red]{shared}[/red]" if row.shared > limit else shared,
        str(row.tensor_memory or ""),
        f"{row.blocks[tightest]} {tightest}",
        str(row.ahead or ""),
        ", ".join(f"{n} {opcode}" for opcode, n in row.matrix.items()),
        f"[red]{work}[/red]" if row.work and row.work > 1.05 else work,
        " ".join(f"{n}x{width}" for width, n in widths(row).items()),
        str(row.instructions),
        *(f"[bold]{n}[/bold]" if n == bound else str(n) for n in row.cycles.values()),
    ]


def widths(row: Row) -> dict[int, int]:
    """Loads per round, by bytes per lane, widest first."""
    found = Counter()
    for name, n in row.loads.items():
        found[int(name.split()[1])] += n
    return dict(sorted(found.items(), reverse=True))


def judge(console: Console, rows: list[Row], update: bool, everything: bool) -> int:
    """Compare with the budget, or replace it; gives the exit status."""
    path = report.budget_file(BUDGETS)
    budget = report.read_budget(path) if path.exists() else {}
    wrong = [f"{row.key}: {reason}" for row in rows for reason in row.impossible()]
    if update:
        report.write_budget(path, rows, keep={} if everything else budget)
        console.print(f"The budget is {path}.")
    elif not budget:
        console.print(f"There is no budget for Triton {report.version()}; --update-budget makes one.")
    else:
        wrong += [f"{row.key}: {line}" for row in rows for line in report.worse(row, budget)]
        if everything:
            wrong += [
                f"{key}: in the budget, but no longer compiled"
                for key in budget.keys() - {r.key for r in rows}
            ]
    for line in wrong:
        console.print(f"[red]{line}[/red]", highlight=False)
    if wrong and not update:
        console.print(
            "If this is meant: make kernels-report ARGS=--update-budget, and commit the difference."
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    main()
