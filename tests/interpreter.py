"""A pytest plugin for Triton's interpreter: makes it right for bf16 and watchful of memory.

    cd tests && TRITON_INTERPRET=1 python -m pytest -p interpreter interpreted

It repairs what is wrong up to Triton 3.9: `tl.dot` multiplies the bit patterns of bf16 operands, and
fp32 -> bf16 truncates. It also checks every load and store: each address must be that of an element of a
tensor argument, and neither two programs nor two lanes of one store may write the same address.
"""

import traceback

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, TensorHandle
from triton.runtime.interpreter import InterpreterBuilder as Builder


class MemoryFault(AssertionError):
    pass


def pytest_configure() -> None:
    np.seterr(all="ignore")  # a GPU divides by zero in silence
    _repair_bf16()
    _guard_memory()


def _repair_bf16() -> None:
    dot, cast = Builder.create_dot, Builder.cast_impl

    def fp32(bits: np.ndarray) -> np.ndarray:
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def create_dot(self, a, b, d, *args):
        if a.dtype.scalar != tl.bfloat16:
            return dot(self, a, b, d, *args)
        return TensorHandle(np.matmul(fp32(a.data), fp32(b.data)) + d.data, d.dtype.scalar)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cast(self, src, dst_type)
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16()  # to nearest, ties to even
        bits = rounded.view(torch.int16).numpy().view(np.uint16)
        return TensorHandle(bits.reshape(src.data.shape), tl.bfloat16)

    Builder.create_dot, Builder.cast_impl = create_dot, cast_impl


class _Launch:
    """The elements that a launch may touch, and the program that wrote each."""

    def __init__(self, tensors: list[torch.Tensor]):
        self.addresses = np.unique(np.concatenate([_element_addresses(t) for t in tensors]))
        self.writer = np.full([len(self.addresses), 3], -1)

    def check(self, pointers: TensorHandle, mask: TensorHandle, *, store: bool) -> None:
        touched, mask = np.broadcast_arrays(pointers.data, mask.data)
        touched = touched[mask.astype(bool)].astype(np.int64)
        place = np.searchsorted(self.addresses, touched)
        outside = place == len(self.addresses)
        outside[~outside] = self.addresses[place[~outside]] != touched[~outside]
        if outside.any():
            _fault(f"{outside.sum()} of {outside.size} addresses belong to no element of any argument")
        program = np.array(interpreter.interpreter_builder.grid_idx)
        writer = self.writer[place]
        foreign = (writer >= 0).any(-1) & (writer != program).any(-1)
        if foreign.any():
            _fault(f"program {program} touches what program {writer[foreign][0]} wrote")
        if store:
            if len(np.unique(place)) < len(place):
                _fault("two lanes of one store write the same element")
            self.writer[place] = program


def _element_addresses(tensor: torch.Tensor) -> np.ndarray:
    addresses = np.array([tensor.data_ptr()] if tensor.numel() else [], np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if stride and len(addresses):
            addresses = (addresses[:, None] + np.arange(size) * (stride * tensor.element_size())).ravel()
    return addresses


def _fault(message: str) -> None:
    ours = [f for f in traceback.extract_stack() if "/triton/" not in f.filename and f.filename != __file__]
    raise MemoryFault(f"{message}: {ours[-1].line}")


def _guard_memory() -> None:
    load, store, atomic = Builder.create_masked_load, Builder.create_masked_store, Builder.create_atomic_rmw
    launch = None

    def create_masked_load(self, pointers, mask, *args):
        launch.check(pointers, mask, store=False)
        return load(self, pointers, mask, *args)

    def create_masked_store(self, pointers, value, mask, *args):
        launch.check(pointers, mask, store=True)
        return store(self, pointers, value, mask, *args)

    def create_atomic_rmw(self, op, pointers, value, mask, *args):
        launch.check(pointers, mask, store=False)
        return atomic(self, op, pointers, value, mask, *args)

    def to_host(self, args, kwargs):
        nonlocal launch
        launch = _Launch([a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)])
        return args, kwargs  # CPU tensors: the kernel works in place, and nothing is copied back

    Builder.create_masked_load, Builder.create_masked_store = create_masked_load, create_masked_store
    Builder.create_atomic_rmw = create_atomic_rmw
    GridExecutor._init_args_hst = to_host
    GridExecutor._restore_args_dev = lambda *args: None
