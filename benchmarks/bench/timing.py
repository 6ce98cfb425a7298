"""Interleaved timing, peak memory, and what machine it was."""

import contextlib
import ctypes
import dataclasses
import functools
import gc
import json
import os
import platform
import statistics
import subprocess
import time
import weakref
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

from sparse_attn import __version__
from sparse_attn.doctor import cpu_flags, processor
from sparse_attn.ops.backends import native

CPU = torch.device("cpu")
SAMPLE_SECONDS = 5e-3  # shorter calls are repeated within one sample


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call, over the rounds of one run."""

    median: float
    low: float
    high: float
    p25: float
    p75: float

    @classmethod
    def of(cls, samples: list[float]) -> "Timing":
        several = len(samples) > 1
        p25, median, p75 = statistics.quantiles(samples, n=4, method="inclusive") if several else 3 * samples
        return cls(median, min(samples), max(samples), p25, p75)


Clock = Callable[[Callable[[], object], int], float]  # (function, number of calls) -> mean seconds per call


def cpu_clock(function: Callable[[], object], calls: int) -> float:
    """For functions that run on the CPU: nothing is synchronised."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def thread_clock(function: Callable[[], object], calls: int) -> float:
    """For functions that run on this thread alone: time that other processes take is not counted."""
    start = time.thread_time()
    for _ in range(calls):
        function()
    return (time.thread_time() - start) / calls


def eager(function: Callable[[], object]) -> Callable[[], object]:
    """Mark a function that copies from or to the host, which no CUDA graph can hold."""
    function.eager = True
    return function


class CudaClock:
    """For functions that run on a CUDA device, by its own events.

    Each function is captured in a CUDA graph once and replayed, so that Python's launches take no part.
    Before each replay the GPU reads twice as much memory as its L2 cache holds: writing instead would leave
    dirty lines, whose write-back falls into the measurement. Functions marked as :func:`eager` are called as
    they are, while the GPU sleeps and the launches queue up behind it. Some 2 us of a time are the events'.
    """

    SLEEP_CYCLES = 2_000_000  # about a millisecond

    def __init__(self, device: torch.device | str = "cuda"):
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.ones(2 * cache_bytes // 4, device=device)
        self.graphs: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # of functions

    def __call__(self, function: Callable[[], object], calls: int) -> float:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        captured = not getattr(function, "eager", False)
        run = self._graph(function).replay if captured else function
        for start, end in events:
            self.flush.sum()
            if not captured:
                torch.cuda._sleep(self.SLEEP_CYCLES)  # not public, but torch's own tests use it
            start.record()
            run()
            end.record()
        torch.cuda.synchronize(self.flush.device)
        return sum(start.elapsed_time(end) for start, end in events) * 1e-3 / calls

    def _graph(self, function: Callable[[], object]) -> torch.cuda.CUDAGraph:
        if function not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                function()
            self.graphs[function] = graph
        return self.graphs[function]


def clock_of(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else cpu_clock


def now(device: torch.device) -> float:
    """The time in seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def interleaved(
    functions: dict[str, Callable[[], object]],
    rounds: int = 5,
    clock: Clock = cpu_clock,
) -> dict[str, Timing]:
    """Time each function once per round, in turn, so that changes of the machine's speed affect all.

    Every function runs once before, unmeasured.
    """
    calls = {}
    for name, function in functions.items():
        function()
        calls[name] = max(1, round(SAMPLE_SECONDS / max(clock(function, 1), 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            samples[name].append(clock(function, calls[name]))
    return {name: Timing.of(s) for name, s in samples.items()}


def peak_memory(function: Callable[[], object]) -> int | None:
    """Bytes by which the resident memory peaked above its start while ``function`` ran; None off Linux."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    gc.collect()
    return_free_memory()  # memory that is free but resident could be reused and not be counted
    clear.write_text("5")  # resets the high-water mark
    before = _kibibytes(status.read_text(), "VmRSS")
    result = function()
    peak = _kibibytes(status.read_text(), "VmHWM")
    del result
    return max(0, peak - before) * 1024


@contextlib.contextmanager
def threads(count: int):
    """Set the number of torch's threads within the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def return_free_memory() -> None:
    """Hand the C allocator's reserve back to the system: resident memory is then memory in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim:
        trim(0)


def _kibibytes(status: str, field: str) -> int:
    return int(status.split(f"{field}:")[1].split()[0])


def machine() -> dict[str, str | int]:
    """What a figure depends on: processor, instruction set, threads, versions, GPU if there is one."""
    return {
        "processor": processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_instructions": ", ".join(f for f in ("avx512_bf16", "amx_bf16") if f in cpu_flags()) or "none",
        "cpu_kernels": _cpu_kernels(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "sparse_attn": __version__,
        **_gpu(),
    }


@functools.cache  # of one process
def _gpu() -> dict[str, str | int]:
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    smi = [
        "nvidia-smi",
        "--query-gpu=driver_version,power.limit,clocks.max.sm,clocks.max.mem",
        "--format=csv",
    ]
    try:
        said = subprocess.run(smi, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        said = f"nvidia-smi: {error}"
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda or "none",
        "nvidia_smi": said,
    }


def _cpu_kernels() -> str:
    name = native.instruction_set()
    if name is None:
        return "torch"
    return name if native.has_openmp() else f"{name}, built without OpenMP: one thread"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def describe(device: torch.device = CPU) -> str:
    """What figures of a device depend on, in a line."""
    here, name = machine(), device_name(device)
    if device.type == "cuda":
        return f"{name}, torch {here['torch']}, Triton {here['triton']}"
    threads = f"{here['threads']} thread{'s' if here['threads'] != 1 else ''}"
    return (
        f"{name} (bf16: {here['bf16_instructions']}), {threads}, "
        f"CPU kernels: {here['cpu_kernels']}, torch {here['torch']}"
    )


def append_json(path: str | None, benchmark: str, rows: list[dict]) -> None:
    """Add each row of figures to a file, if one is given: a JSON object per line, with the machine."""
    if path is None:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        for row in rows:
            file.write(json.dumps({"benchmark": benchmark, **row, "machine": machine()}) + "\n")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
