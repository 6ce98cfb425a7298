"""Every operation: a function that gives its cases for sizes and a device. A new operation is a line here."""

import multiprocessing
from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from . import attention, index, layer, ragged, writers
from .case import Cases, Sizes, measure, show
from .limits import Limits
from .timing import Clock, cpu_clock

OPERATIONS: dict[str, Callable[[Sizes, torch.device], Cases]] = {
    "indexer": index.indexer,
    "top-k": index.top_k,
    "ragged": ragged.ragged,
    "attention": attention.attention,
    "formats": attention.formats,
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
    keep: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """A line for each case of the operations, checked and timed; prints a table for each operation.

    ``keep`` takes each line as soon as it is measured.
    """
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
                if keep:
                    keep(_finished(part[-1]))
                progress.advance(task)
                if device.type == "cuda":  # also what captured graphs held
                    torch.cuda.empty_cache()
        show(console, name, part)
        part = [_finished(line) for line in part]
        if name == "layer":
            for sentence in layer.words(part):
                console.print(f"[dim]{sentence}[/dim]", highlight=False)
        lines += part
    return lines


def _finished(line: dict[str, Any]) -> dict[str, Any]:
    return layer.fields(line) if line["operation"] == "layer" else line


def in_shares(function: Callable[..., None], arguments: tuple[Any, ...], jobs: int) -> None:
    """Call ``function(*arguments, i, jobs)`` for each i in a process of its own, and wait for all."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=function, args=(*arguments, i, jobs)) for i in range(jobs)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def compile_share(names: Iterable[str], sizes: Sizes, device: torch.device, share: int, shares: int) -> None:
    """Call what every ``shares``-th case would time, once, so that its kernels are in Triton's cache.

    Sequences that decode together get the shortest context: more of them than memory holds may run at a time.
    """
    several = tuple(batch for batch in sizes.batches if batch > 1)
    alone = sizes._replace(batches=(1,)), sizes._replace(batches=several, contexts=sizes.contexts[:1])
    cases = [case for name in names for part in alone for case in OPERATIONS[name](part, device)]
    with torch.inference_mode():
        for context, data, build in cases[share::shares]:
            measure(context, data, build, rounds=1, clock=lambda function, calls: 1.0)
