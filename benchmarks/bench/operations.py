"""Every operation: a function that gives its cases for sizes and a device. A new operation is a line here."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from . import attention, index, layer, writers
from .case import Cases, Sizes, measure, show
from .limits import Limits
from .timing import Clock, cpu_clock

OPERATIONS: dict[str, Callable[[Sizes, torch.device], Cases]] = {
    "indexer": index.indexer,
    "top-k": index.top_k,
    "attention": attention.attention,
    "gqa": attention.gqa,
    "merge": attention.merge,
    "writers": writers.writers,
    "memory": attention.memory,
    "layer": layer.layer,
}


def run(
    console: Console,
    names: Iterable[str],
    sizes: Sizes,
    device: torch.device,
    rounds: int,
    clock: Clock = cpu_clock,
    limits: Limits | None = None,
) -> list[dict[str, Any]]:
    """A line for each case of the operations, checked and timed; prints a table for each operation."""
    torch.manual_seed(0)
    lines = []
    for name in names:
        with torch.inference_mode(), Progress(console=Console(stderr=True), transient=True) as progress:
            cases = list(OPERATIONS[name](sizes, device))
            task = progress.add_task(name, total=len(cases))
            part = []
            for context, data, build in cases:
                progress.update(task, description=f"{name}: {context:,}, {data}")
                part.append({"operation": name, **measure(context, data, build, rounds, clock, limits)})
                progress.advance(task)
        show(console, name, part)
        if name == "layer":
            part = [layer.fields(line) for line in part]
            for sentence in layer.words(part):
                console.print(f"[dim]{sentence}[/dim]", highlight=False)
        lines += part
    return lines
