"""What the scripts share: their options, the device they run on, and tables of numbers."""

import argparse
import dataclasses
import datetime
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sparse_attn.doctor import usable_gpus

from .limits import Limits, measure_limits
from .timing import CPU, Clock, clock_of, describe


def parser(doc: str, rounds: int | None = None) -> argparse.ArgumentParser:
    """A parser that explains itself by ``doc``; with --json, and with --rounds where there is a default."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    if rounds is not None:
        made.add_argument("--rounds", type=int, default=rounds, help=f"interleaved rounds (default {rounds})")
    made.add_argument("--json", metavar="FILE", help="append the figures, one JSON object per line")
    return made


def choose_device(name: str | None) -> torch.device:
    """The device of this name, made current; None: a GPU that the kernels run on, else the CPU."""
    known = [*usable_gpus(), CPU]
    device = next((device for device in known if name in (None, device.type, str(device))), None)
    if device is None:
        sys.exit(
            f"device: expected {' or '.join(map(str, known))}, got {name}. With torch {torch.__version__} "
            "the kernels run on no other device here: `sparse-attn doctor` says why."
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events and graphs are those of the current device
    return device


def start(console: Console, device: torch.device) -> tuple[Clock, Limits, dict[str, Any]]:
    """Measure and print what a device can do: its clock, its limits, and what each line of a record holds."""
    clock = clock_of(device)
    limits = measure_limits(device, clock)
    console.print(f"[dim]{describe(device)}[/dim]", highlight=False)
    console.print(f"[dim]Measured here: {limits}[/dim]", highlight=False)
    script, *arguments = sys.argv
    about = {
        "device": str(device),
        "date": f"{datetime.date.today():%Y-%m-%d}",
        "command": " ".join([f"python benchmarks/{Path(script).name}", *arguments]),
        "limits": dataclasses.asdict(limits),
    }
    return clock, limits, about


def table(headings: Iterable[str], rows: Iterable[Iterable[str]], words: int = 1, **options) -> Table:
    """A table whose first ``words`` columns hold words, the others numbers; ``options`` are rich's."""
    made = Table(**options)
    for place, heading in enumerate(headings):
        made.add_column(heading, justify="left" if place < words else "right")
    for cells in rows:
        made.add_row(*cells)
    return made
