"""Which launch configuration a device gets: each kernel has a table keyed by architecture (90 is sm_90)."""

import functools
from typing import TypeVar

import torch

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
