"""How fast an operation could be here: what it must compute and read, divided by what the machine can do.

The model is the same for every implementation and counts only what the operation cannot do without:

- **operations**: two for each multiply-add of its matrix products; nothing for softmax, relu and comparisons;
- **bytes**: every input that it must read, once, and its output, once, even if a cache holds them already.

    index logits    2 * queries * heads * d              per key       keys, queries, logits
    top-k           0                                                  logits, indices
    attention       2 * queries * heads * (d_qk + d_v)   per token     selected rows per query, q, out

The limit is the longer of operations / peak and bytes / bandwidth. Both are measured in the run itself. On a
CPU the peak is of multiply-adds in registers, in the instruction set of the kernels, and the bandwidth the
best of four streams over memory too large for any cache. On a GPU the peak is of torch's product of two bf16
matrices of 8192 x 8192, and the bandwidth the better of a sum, and of a scaled copy, read and written. A
share above 1 means that the bytes were in a cache.
"""

import dataclasses

import torch

from sparse_attn.ops.backends import native

from .timing import Clock, interleaved, thread_clock

PEAK_ROUNDS = 200_000  # of multiply-adds in registers: so many that the call takes no share of the time
PEAK_TRIES = 5  # the best counts: something else may share the core
STREAM_BYTES = 256 << 20
PRODUCT_SIZE = 8192  # of the matrices that a GPU multiplies


@dataclasses.dataclass(frozen=True)
class Work:
    operations: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.operations + other.operations, self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Work":
        return Work(self.operations * times, self.bytes * times)


def index_work(s_q: int, s_kv: int, heads: int, d: int, itemsize: int = 2) -> Work:
    return Work(2 * s_q * s_kv * heads * d, itemsize * d * (s_kv + s_q * heads) + 4 * s_q * s_kv)


def select_work(s_q: int, s_kv: int, topk: int) -> Work:
    return Work(0, 4 * s_q * (s_kv + topk))


def attention_work(
    s_q: int, tokens: int, heads: int, d_qk: int, d_v: int, row_bytes: int, itemsize: int = 2
) -> Work:
    """Each query reads ``tokens`` rows of ``row_bytes``; with grouped heads a row holds all kv heads."""
    queries_and_out = itemsize * s_q * heads * (d_qk + d_v)
    return Work(2 * s_q * tokens * heads * (d_qk + d_v), s_q * tokens * row_bytes + queries_and_out)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What this machine can do: a CPU with the threads in use, or a GPU."""

    operations_per_second: float  # 0 where there are no C++ kernels to measure it with
    bytes_per_second: float

    def seconds(self, work: Work) -> float:
        """The least time that ``work`` can take."""
        computing = work.operations / self.operations_per_second if self.operations_per_second else 0.0
        return max(computing, work.bytes / self.bytes_per_second)

    def __str__(self) -> str:
        peak = self.operations_per_second
        computing = _rate(peak, "FLOP/s") if peak else "no peak without C++ kernels"
        return f"{computing}, {_rate(self.bytes_per_second, 'B/s')} from memory"


def _rate(per_second: float, unit: str) -> str:
    return f"{per_second / 1e12:.3g} T{unit}" if per_second >= 1e12 else f"{per_second / 1e9:.3g} G{unit}"


def measure_limits(device: torch.device, clock: Clock) -> Limits:
    """On a CPU the peak of one core times torch's threads, and the bandwidth of all of them together."""
    if device.type == "cuda":
        return gpu_limits(device, clock)
    return Limits(peak_of_a_core() * torch.get_num_threads(), bandwidth())


def gpu_limits(device: torch.device, clock: Clock) -> Limits:
    """A product of bf16 matrices; the better of a sum and a scaled copy of 1 GB."""
    size = PRODUCT_SIZE
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in "ab")
    source = a.repeat(8, 1)
    target = torch.empty_like(source)
    functions = {
        "product": lambda: a @ b,
        "sum": source.sum,
        "copy": lambda: torch.mul(source, 2.0, out=target),
    }
    product, read, copy = (timing.median for timing in interleaved(functions, 3, clock).values())
    return Limits(2 * size**3 / product, max(source.nbytes / read, 2 * source.nbytes / copy))


def peak_of_a_core() -> float:
    """Operations per second of multiply-adds in registers, the faster of fp32 and bf16; 0 if not measured."""
    return max(_peak("fp32"), _peak("bf16"))


def _peak(kind: str) -> float:
    operations = native.peak(kind, PEAK_ROUNDS)
    if not operations:
        return 0.0
    timing = interleaved({kind: lambda: native.peak(kind, PEAK_ROUNDS)}, PEAK_TRIES, clock=thread_clock)
    return operations / timing[kind].low


def bandwidth() -> float:
    """Bytes per second of the best pass that sums, compares, copies or scales ``STREAM_BYTES``."""
    source = torch.ones(STREAM_BYTES // 4)
    target = torch.empty_like(source)
    passes = {  # with one or two streams
        (1, "sum"): source.sum,
        (1, "max"): source.max,
        (2, "copy"): lambda: target.copy_(source),
        (2, "scale"): lambda: torch.mul(source, 2.0, out=target),
    }
    timings = interleaved(passes, rounds=3)
    return max(streams * STREAM_BYTES / timing.low for (streams, _), timing in timings.items())
