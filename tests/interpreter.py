"""A pytest plugin for Triton's interpreter: makes it right for bf16 and watchful of memory.

    cd tests && TRITON_INTERPRET=1 python -m pytest -p interpreter interpreted

It repairs what is wrong up to Triton 3.9: `tl.dot` multiplies the bit patterns of bf16 and e4m3 operands,
fp32 -> bf16 truncates, e4m3 has no NaN, `~` of an unsigned value fails, and `tl.map_elementwise` is missing.
It also checks every load and store: each address must be that of an element of a tensor argument, and neither
two programs nor two lanes of one store may write the same address.
"""

import functools
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
    _repair_types()
    tl.map_elementwise = lambda function, *tensors, pack=1: function(*tensors)
    _guard_memory()
    _patch_language_once()
    _remember_types()


def _repair_types() -> None:
    dot, cast, convert = Builder.create_dot, Builder.cast_impl, Builder.create_fp_to_fp

    def as_torch(x: TensorHandle) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(x.data))

    def fp32(x: TensorHandle) -> np.ndarray:
        if x.dtype.scalar == tl.bfloat16:
            return (x.data.astype(np.uint32) << 16).view(np.float32)
        return as_torch(x).view(torch.float8_e4m3fn).float().numpy()

    def create_dot(self, a, b, d, *args):
        if a.dtype.scalar not in (tl.bfloat16, tl.float8e4nv):
            return dot(self, a, b, d, *args)
        return TensorHandle(np.matmul(fp32(a), fp32(b)) + d.data, d.dtype.scalar)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float8e4nv:  # its NaN
            return cast(self, TensorHandle(fp32(src), tl.float32), dst_type)
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cast(self, src, dst_type)
        rounded = as_torch(src).bfloat16()  # to nearest, ties to even
        bits = rounded.view(torch.int16).numpy().view(np.uint16)
        return TensorHandle(bits.reshape(src.data.shape), tl.bfloat16)

    def create_fp_to_fp(self, src, dst_type, *args):
        if src.dtype.scalar != tl.float8e4nv:
            return convert(self, src, dst_type, *args)
        return cast_impl(self, TensorHandle(fp32(src), tl.float32), dst_type)

    def get_all_ones_value(self, dtype):
        bits = np.full([1], ~0, np.int64).astype(interpreter._get_np_dtype(dtype))
        return TensorHandle(bits, dtype.scalar)

    Builder.create_dot, Builder.cast_impl, Builder.create_fp_to_fp = create_dot, cast_impl, create_fp_to_fp
    Builder.get_all_ones_value = get_all_ones_value


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


def _patch_language_once() -> None:
    """Each call of a jit function patches triton.language anew, which takes longest: once is enough."""
    patch, patched = interpreter._patch_lang, set()

    def patch_lang(fn):
        languages = {value.__name__ for value in fn.__globals__.values() if value is tl or value is tl.core}
        if not languages <= patched:
            patch(fn)
            patched.update(languages)
            tl.tensor.__index__ = lambda self: self.handle.data.item()  # NumPy 2.4 takes no int() of it
        return interpreter._LangPatchScope()  # nothing to restore after the launch

    interpreter._patch_lang = patch_lang


def _remember_types() -> None:
    """Every operation describes its types anew: once for each is enough, and a tenth faster."""
    get_np_dtype, describe = functools.cache(interpreter._get_np_dtype), tl.block_type.__init__
    pointers, known = np.dtype(np.uint64), {}

    def np_dtype(dtype):
        return pointers if dtype.scalar.is_ptr() else get_np_dtype(dtype.scalar)

    def block_type(self, element_ty, shape):
        key = str(element_ty), *(getattr(size, "value", size) for size in shape)
        if key not in known:
            describe(self, element_ty, shape)
            known[key] = vars(self).copy()
        vars(self).update(known[key], element_ty=element_ty)

    interpreter._get_np_dtype, tl.block_type.__init__ = np_dtype, block_type
