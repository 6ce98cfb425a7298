"""Which launch configuration a device gets: each kernel has a table keyed by architecture (90 is sm_90)."""

import functools
from typing import TypeVar

import torch
import triton

MIN_KEYS = 128  # a split's least work: below it the partial results cost as much memory traffic as the gather
T = TypeVar("T")


@functools.cache
def architecture(device: torch.device) -> int:
    """10 * major + minor of a GPU's compute capability; Triton's interpreter, on the CPU, poses as sm_80."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def for_device(table: dict[int, T], device: torch.device) -> T:
    """The entry of the device's architecture, or of the nearest older one."""
    arch = architecture(device)
    older = [a for a in table if a <= arch]
    if not older:
        raise RuntimeError(f"the kernels need sm_{min(table)} or newer, {device} is sm_{arch}")
    return table[max(older)]


def has_native_fp8(device: torch.device) -> bool:
    """Whether the device converts e4m3 itself."""
    return architecture(device) >= 89


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many the GPU has; Triton's interpreter poses as an A100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 108


def split_count(programs: int, tiles: int, block_n: int, device: torch.device, blocks: int = 1) -> int:
    """How many programs share the ``tiles``, of ``block_n`` keys, of each of ``programs``.

    So many that each multiprocessor has ``blocks``. It depends on shapes and the device alone, never on data:
    captured graphs stay valid and results repeat.
    """
    most = tiles // triton.cdiv(MIN_KEYS, block_n)
    splits = max(1, min(blocks * multiprocessors(device) // programs, most))
    return triton.cdiv(tiles, triton.cdiv(tiles, splits)) if splits > 1 else 1  # none of them is idle


def refuse_fp64(*tensors: torch.Tensor | None) -> str | None:
    """Why kernels cannot run such tensors, or None: none computes in fp64."""
    if any(t is not None and t.dtype == torch.float64 for t in tensors):
        return "dtype: the triton backend takes bfloat16, float16 or float32, got float64"
    return None
