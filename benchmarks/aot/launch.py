"""Compile what an operation's launcher would launch on a GPU, without that GPU."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from sparse_attn import ops
from sparse_attn.kernels import configs


class Launch(NamedTuple):
    name: str  # of the kernel
    kernel: Any  # triton.compiler.CompiledKernel
    constants: dict[str, Any]  # the values of its constexpr arguments

    @property
    def warps(self) -> int:
        """Warps per block, including those of every partition of a warp-specialised kernel."""
        return self.kernel.metadata.num_warps


class Driver:
    """Stands for a GPU of one architecture; the architecture is also its device number."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launches(op: str, arch: int, a: Any) -> list[Launch]:
    """Every kernel that ``op`` launches on sm_``arch`` for the record ``a``, in order.

    Tensors may be on the meta device: nothing runs, and launchers look at shapes and strides alone.
    """
    launches = []
    run = JITFunction.run

    def compile_only(function, *args, grid, warmup, **options):
        kernel = run(function, *args, grid=grid, warmup=True, **options)
        constants = {
            function.arg_names[path[0]]: value
            for path, value in kernel.src.constants.items()
            if len(path) == 1
        }
        launches.append(Launch(kernel.metadata.name, kernel, constants))
        return kernel

    with pretend(Driver(arch)), mock.patch.object(JITFunction, "run", compile_only):
        ops.implementation(op, "triton")(a)
    return launches


@contextlib.contextmanager
def pretend(driver: Driver) -> Iterator[None]:
    """Launchers and Triton see a GPU of the driver's architecture."""
    with (
        mock.patch.object(configs, "architecture", lambda device: driver.arch),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device: divmod(driver.arch, 10)),
        mock.patch.object(triton.runtime.driver, "_active", driver),
    ):
        yield
