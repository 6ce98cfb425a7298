"""What a call costs the host on a GPU: Python's time, and how much it launches. No GPU is needed.

Triton's driver is replaced by one whose launches do nothing, and tensors lie on the CPU. What remains is
checks, choices and Triton's own work before each launch. A captured CUDA graph pays none of it.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import triton
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

import sparse_attn
from aot.launch import Driver, pretend
from bench.command import parser, table
from bench.timing import append_json, interleaved, machine
from sparse_attn import ops
from sparse_attn.kernels import configs

MULTIPROCESSORS = 132
FREE = {"empty", "empty_strided", "new_empty"}  # of torch's ops that are no views: nothing is launched


class IdleDriver(Driver):
    """Loads and launches nothing."""

    class utils:
        @staticmethod
        def load_binary(name, kernel, shared, device) -> tuple[int, ...]:
            return 1, 1, 32, 0, 1024  # module, function, registers, spills, threads

        @staticmethod
        def get_device_properties(device) -> dict[str, int]:
            return {"max_shared_mem": 232448, "warpSize": 32, "max_num_regs": 65536}

    @staticmethod
    def launcher_cls(src, metadata) -> Callable[..., None]:
        return lambda *args: None


@contextmanager
def idle_gpu(arch: int) -> Iterator[None]:
    """backend="triton" takes CPU tensors, as if they lay on a GPU of this architecture."""
    with (
        pretend(IdleDriver(arch)),
        mock.patch.object(configs, "multiprocessors", lambda device: MULTIPROCESSORS),
        mock.patch.object(ops, "_interpreting", lambda device: True),
    ):
        yield


class Launches(TorchDispatchMode):
    """Counts kernels: Triton's, and torch's ops that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and function.overloadpacket.__name__ not in FREE:
            self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def launches(call: Callable[[], object]) -> list[str]:
    """What ``call`` launches, in order."""
    run, counted = JITFunction.run, Launches()

    def noting(kernel, *args, **options):
        counted.names.append(kernel.__name__)
        return run(kernel, *args, **options)

    with mock.patch.object(JITFunction, "run", noting), counted:
        call()
    return counted.names


def measure(functions: dict[str, Callable[[], object]], rounds: int) -> list[dict[str, Any]]:
    """A line of each call: seconds, and what it launches."""
    timings = interleaved(functions, rounds)
    return [
        {"call": name, "launches": launches(call), **dataclasses.asdict(timings[name])}
        for name, call in functions.items()
    ]


def calls(queries: int = 32, heads: int = 128, context: int = 65_536) -> dict[str, Callable[[], object]]:
    """A decode step of DeepSeek-V3.2's sizes, op by op."""
    pages, on = context // 64, {"backend": "triton"}

    def bf16(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    def int32(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    q, kv, packed = bf16(queries, heads, 576), bf16(context, 576), torch.zeros(pages, 64, 656).byte()
    indices, slots = int32(queries, 2048), torch.zeros(queries, dtype=torch.int64)
    index_q, weights = bf16(queries, 64, 128), torch.zeros(queries, 64)
    index_k, packed_k, ranges = bf16(pages, 64, 128), torch.zeros(pages, 64, 132).byte(), int32(2, queries)
    block_table = int32(queries, pages)
    scoring = {"topk": 2048, "ks": ranges[0], "ke": ranges[1], "block_table": block_table, **on}
    row, key = bf16(queries, 576), bf16(queries, 128)
    return {
        "sparse_mla": lambda: sparse_attn.sparse_mla(q, kv, indices, **on),
        "sparse_mla, 656 bytes": lambda: sparse_attn.sparse_mla(q, packed, indices, **on),
        "lightning_topk": lambda: sparse_attn.lightning_topk(index_q, index_k, weights, **scoring),
        "lightning_topk, 132 bytes": lambda: sparse_attn.lightning_topk(
            index_q, packed_k, weights, **scoring
        ),
        "physical_slots": lambda: sparse_attn.physical_slots(indices, block_table, 64, **on),
        "write_kv": lambda: sparse_attn.write_kv(row, packed, slots, **on),
        "write_index_k": lambda: sparse_attn.write_index_k(key, packed_k, slots, **on),
    }


def main(arguments: list[str] | None = None) -> None:
    command = parser(__doc__, rounds=100)
    command.add_argument("--arch", type=int, default=90, help="architecture to pretend (default 90)")
    options = command.parse_args(arguments)
    torch.set_num_threads(1)
    with idle_gpu(options.arch):
        lines = measure(calls(), options.rounds)
    # Noise only adds, so the least time counts.
    rows = [(x["call"], f"{x['low'] * 1e6:.0f}", ", ".join(x["launches"])) for x in lines]
    title = f"sm_{options.arch}, Triton {triton.__version__}, one thread"
    Console(width=150).print(table(["call", "us of Python", "launches"], rows, title=title))
    about = {"arch": options.arch, "triton": triton.__version__, "machine": machine()}
    append_json(options.json, "host cost", [{**about, **line} for line in lines])


if __name__ == "__main__":
    main()
