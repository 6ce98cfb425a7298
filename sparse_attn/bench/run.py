"""Time operations beside what they are compared with: a table, JSON lines and plots.

Every case is checked against fp64 or an exact selection first; a wrong one is named and not timed.
"""

import argparse
import dataclasses
import datetime
import sys
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from . import layer
from .limits import Limits, Work, attention_work, index_work, measure_limits, select_work
from .operations import INDEX_D, INDEX_HEADS, OPERATIONS, Case
from .options import add_arguments
from .timing import append_json, describe, interleaved, machine, peak_memory

WIDTH = 120  # of the tables where the terminal's is not known
LAYER_CONTEXTS = (1024, 8192, 32768, 65536, 131072)


def main(name: str) -> None:
    """The command line of a script that times one operation."""
    parser = argparse.ArgumentParser(
        description=f"{name}: {(OPERATIONS[name].__doc__ or '').splitlines()[0]}"
    )
    add_arguments(parser)
    sys.exit(0 if run(parser.parse_args(), [name]) else 1)


def run(options: argparse.Namespace, names: list[str], console: Console | None = None) -> bool:
    """Time, print, write and plot; whether every result was right."""
    console = console or Console(width=None if sys.stdout.isatty() else WIDTH)
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        with torch.inference_mode():
            limits, here = measure_limits(), machine()
            console.print(f"[dim]{describe(here)}[/dim]", highlight=False)
            console.print(f"[dim]Measured here: {_words(limits)}[/dim]", highlight=False)
            lines = []
            for name in names:
                part = (
                    time_layer(console, limits, options.quick, options.rounds, options.threads)
                    if name == "layer"
                    else time_operation(console, name, limits, options.quick, options.rounds)
                )
                if name != "layer":
                    show(console, name, part)
                lines += part
        about = {
            "date": f"{datetime.date.today():%Y-%m-%d}",
            "command": " ".join(["sparse-attn", *_arguments()]),
            "rounds": options.rounds,
            "limits": dataclasses.asdict(limits),
        }
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            append_json(str(options.json), "cpu", [{**about, **line} for line in lines])
    finally:
        torch.set_num_threads(before)
    if options.output:
        from .plots import operation_plots

        for path in operation_plots(lines, here, options.output):
            console.print(f"[dim]{path}[/dim]", highlight=False)
    return not any("wrong" in line for line in lines)


def _arguments() -> list[str]:
    return sys.argv[1:] if Path(sys.argv[0]).name == "sparse-attn" else ["bench"]


def _words(limits: Limits) -> str:
    peak = limits.operations_per_second
    computing = f"{peak / 1e9:.0f} GFLOP/s in registers" if peak else "no peak without C++ kernels"
    return f"{computing}, {limits.bytes_per_second / 1e9:.1f} GB/s from memory"


def time_operation(
    console: Console, name: str, limits: Limits, quick: bool, rounds: int
) -> list[dict[str, Any]]:
    builders = list(OPERATIONS[name](quick))
    lines = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(name, total=len(builders))
        for build in builders:
            lines.append({"operation": name, **measure(build(), limits, rounds)})
            progress.advance(task)
    return lines


def measure(case: Case, limits: Limits, rounds: int) -> dict[str, Any]:
    """A line of the record. A peer that cannot run here is named, with its reason."""
    line = {"context": case.context, "data": case.data, **dataclasses.asdict(case.work)}
    line |= {"limit_seconds": limits.seconds(case.work), "seconds": {}, "peak_bytes": {}, "failed": {}}
    try:
        case.check()
    except AssertionError as error:
        return {**line, "wrong": str(error)}
    able = {}
    for name, function in case.functions.items():
        try:
            function()
            able[name] = function
        except Exception as error:  # not built for this machine, or no memory
            line["failed"][name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if case.memory:
        line["peak_bytes"] = {name: peak_memory(function) for name, function in able.items()}
    else:
        line["seconds"] = {n: dataclasses.asdict(t) for n, t in interleaved(able, rounds).items()}
    return line


def time_layer(
    console: Console, limits: Limits, quick: bool, rounds: int, threads: int
) -> list[dict[str, Any]]:
    sizes = {"contexts": LAYER_CONTEXTS}
    if quick:
        sizes = {"contexts": (8192, 32768), "prefill_tokens": 64, "prefill_context": 8192}
    results = layer.run(console, rounds=rounds, threads=threads, **sizes)
    lines = []
    for row in results["decode"]:
        work = _layer_work(1, row["context"])
        lines.append({"operation": "layer", "data": "decode", **_layer_line(row, work, limits)})
    row = results["prefill"]
    work = _layer_work(row["tokens"], row["context"])
    lines.append(
        {"operation": "layer", "data": f"prefill of {row['tokens']}", **_layer_line(row, work, limits)}
    )
    return lines


def _layer_work(tokens: int, context: int) -> Work:
    heads, d_qk, d_v, topk = 128, 576, 512, min(2048, context)
    attend = attention_work(tokens, topk, heads, d_qk, d_v, 2 * d_qk)
    return index_work(tokens, context, INDEX_HEADS, INDEX_D) + select_work(tokens, context, topk) + attend


def _layer_line(row: dict[str, Any], work: Work, limits: Limits) -> dict[str, Any]:
    return {**row, **dataclasses.asdict(work), "limit_seconds": limits.seconds(work)}


def show(console: Console, name: str, lines: list[dict[str, Any]]) -> None:
    """Ours in ms and its share of the limit, the others in ms and times ours; memory in MiB."""
    memory = any(line["peak_bytes"] for line in lines)
    names = list(dict.fromkeys(n for line in lines for n in (*line["seconds"], *line["peak_bytes"])))
    title = f"{name}, MiB above the inputs" if memory else f"{name}, ms"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("context", justify="right", no_wrap=True)
    table.add_column("data")
    for place, heading in enumerate(names):
        table.add_column(heading, justify="right", style="green" if place else None)
        if place == 0 and not memory:
            table.add_column("of limit", justify="right")
    for line in lines:
        cells = [f"{line['context']:,}", line["data"]]
        values = line["peak_bytes"] or {n: t["median"] for n, t in line["seconds"].items()}
        for place, heading in enumerate(names):
            cells.append(_cell(values.get(heading), values.get(names[0]), memory, place == 0))
            if place == 0 and not memory:
                cells.append(f"{line['limit_seconds'] / values[heading]:.0%}" if heading in values else "")
        table.add_row(*cells)
    if names:
        console.print(table)
    for line in lines:
        if "wrong" in line:
            console.print(f"[red]{line['context']:,}, {line['data']}: wrong: {line['wrong']}[/red]")
        for peer, reason in line["failed"].items():
            console.print(f"[dim]{line['context']:,}, {peer}: {reason}[/dim]", highlight=False)


def _cell(value: float | None, ours: float | None, memory: bool, first: bool) -> str:
    if value is None:
        return "-"
    text = f"{value / 2**20:,.1f}" if memory else f"{value * 1e3:.3g}"
    return text if first or not ours else f"{text} ({value / ours:.1f}x)"
