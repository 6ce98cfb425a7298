"""A case of a benchmark, its sizes, how it is measured, and the table of all cases."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .limits import Limits, Work
from .timing import Clock, cpu_clock, interleaved, peak_memory

Functions = dict[str, Callable[[], object]]


class Case(NamedTuple):
    functions: Functions  # by name, ours first
    check: Callable[[], dict[str, Any] | None]  # raises if ours is wrong; may return figures for the record
    work: Work | None = None  # of the first function
    memory: bool = False  # whether peak memory is measured instead of time
    shares: dict[str, float] | None = None  # of the work that a function does; its time is divided by it


Cases = Iterator[tuple[int, str, Callable[[], Case]]]  # context, kind of data, and what makes the tensors


class Sizes(NamedTuple):
    """DeepSeek-V3.2's layer, its indexer and, for grouped queries, 32 / 8 heads of 128."""

    contexts: tuple[int, ...]
    batches: tuple[int, ...] = (1,)  # sequences that decode together
    prefill: tuple[int, int] = (512, 32768)  # tokens, context
    rows: tuple[int, ...] = (1,)  # rows of logits
    scores: tuple[str, ...] = ("gaussian", "clustered", "plateaus")  # whose top-k is taken
    real: bool = False  # whether a real model's scores are among them, where it is installed
    long: tuple[int, ...] = ()  # more contexts, for the indexer and top-k alone
    sequences: int = 64  # of a ragged batch
    queries: int = 1  # of one sequence, scored together in one further case of the indexer
    flex: int | None = None  # context for flex_attention; longer ones take seconds per call on a CPU
    page_size: int | None = 64  # of the indexer's keys; None: all keys of a sequence are one page
    dense_heads: int = 128  # how many heads the dense forms of a prefill are timed on
    topk: int = 2048
    heads: int = 128
    fewer_heads: tuple[int, ...] = ()  # as a process holds them where several share a layer
    index_heads: int = 64
    gqa_heads: tuple[int, int] = (32, 8)  # query, kv
    hidden: tuple[int, int] = (7168, 1536)  # hidden_size and q_lora_rank

    @property
    def middle(self) -> int:
        return self.contexts[len(self.contexts) // 2]


ON_CPU = {"page_size": None, "dense_heads": 4}
QUICK = Sizes((8192, 32768), prefill=(64, 8192), **ON_CPU)
FULL = Sizes((1024, 8192, 32768, 65536, 131072), real=True, long=(1 << 20,), queries=16, flex=8192, **ON_CPU)
GPU = Sizes(
    (8192, 32768, 131072),
    (1, 32, 128),
    prefill=(4096, 32768),
    rows=(1, 64, 4096),
    scores=("gaussian",),
    fewer_heads=(64, 16),
)
GPU_QUICK = GPU._replace(contexts=(8192, 32768), batches=(1, 32), rows=(1, 64), fewer_heads=())
SIZES = {"cpu": (FULL, QUICK), "cuda": (GPU, GPU_QUICK)}  # by type of device: all, and few
TINY = GPU._replace(
    **{"contexts": (128,), "batches": (2,), "prefill": (5, 128), "rows": (3,), "topk": 16, "heads": 4},
    **{"index_heads": 4, "gqa_heads": (4, 2), "hidden": (64, 32), "fewer_heads": (2,)},
    sequences=5,
)


def decodes(sizes: Sizes, data: str, build: Callable[..., Case], most: float = float("inf")) -> Cases:
    """Cases of one query per sequence; ``build`` takes the number of sequences and their context.

    Without those of more than ``most`` tokens in all.
    """
    for batch in sizes.batches:
        for context in sizes.contexts:
            if batch * context <= most:
                sequences = data if batch == 1 else f"{data}, {batch} sequences"
                yield context, sequences, partial(build, batch, context)


def measure(
    context: int,
    data: str,
    build: Callable[[], Case],
    rounds: int,
    clock: Clock = cpu_clock,
    limits: Limits | None = None,
) -> dict[str, Any]:
    """A line of the record. A wrong result is not timed; a peer that cannot run here is named.

    A failure does not end the run: time on the machine may be short.
    """
    line = {"context": context, "data": data, "seconds": {}, "peak_bytes": {}, "failed": {}}
    try:
        case = build()
        line |= case.check() or {}
    except Exception as error:
        return {**line, "not_timed": _words(error)}
    if case.work:
        line |= dataclasses.asdict(case.work)
        line |= {"limit_seconds": limits.seconds(case.work)} if limits else {}
    able = {}
    for name, function in case.functions.items():
        try:
            function()
            clock(function, 1)  # of a GPU: captures it
            able[name] = function
        except Exception as error:  # not built for this machine, or out of memory
            line["failed"][name] = _words(error)
    if case.memory:
        line["peak_bytes"] = {name: peak_memory(function) for name, function in able.items()}
    else:
        for name, timing in interleaved(able, rounds, clock=clock).items():
            share = (case.shares or {}).get(name, 1)
            line["seconds"][name] = {k: s / share for k, s in dataclasses.asdict(timing).items()}
    return line


def _words(error: Exception) -> str:
    kind = "wrong" if isinstance(error, AssertionError) else type(error).__name__
    return f"{kind}: {error}".splitlines()[0][:200]


def show(console: Console, operation: str, lines: list[dict[str, Any]]) -> None:
    """Ours in ms and as a share of the limit, the others in ms and as a multiple of ours; memory in MiB."""
    values = [line["peak_bytes"] or {n: t["median"] for n, t in line["seconds"].items()} for line in lines]
    names = list(dict.fromkeys(name for found in values for name in found))
    memory = any(line["peak_bytes"] for line in lines)
    title = f"{operation}, MiB above the inputs" if memory else f"{operation}, ms"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("context", justify="right", no_wrap=True)
    table.add_column("data")
    limited = not memory and any("limit_seconds" in line for line in lines)
    for name in names:
        table.add_column(escape(name), justify="right", style=None if name == names[0] else "green")
        if limited and name == names[0]:
            table.add_column("of limit", justify="right")
    for line, found in zip(lines, values, strict=True):
        if "not_timed" in line:
            continue
        ours = found.get(names[0])
        cells = [_cell(found.get(name), memory, None if name == names[0] else ours) for name in names]
        if limited:
            cells.insert(1, f"{line['limit_seconds'] / ours:.0%}" if ours else "")
        table.add_row(f"{line['context']:,}", line["data"], *cells)
    if names:
        console.print(table)
    for line in lines:
        about = f"{line['context']:,}, {line['data']}"
        if "not_timed" in line:
            console.print(f"[red]{about}: not timed: {line['not_timed']}[/red]", highlight=False)
        for name, reason in line["failed"].items():
            console.print(f"[dim]{about}, {name}: {reason}[/dim]", highlight=False)


def milliseconds(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def _cell(value: float | None, memory: bool, ours: float | None) -> str:
    if value is None:
        return "-"
    text = f"{value / 2**20:,.1f}" if memory else milliseconds(value)
    return f"{text} ({value / ours:.1f}x)" if ours else text
