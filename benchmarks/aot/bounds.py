"""Limits of the architectures, and how many cycles a round of a kernel's main loop must take at least.

Good for rejecting a design and for noticing that a kernel got worse; never for publishing a speed. Latency,
bank conflicts, waits between warps and the clock are left out: of two kernels that these figures put within a
factor of two of each other, either may be the faster.
"""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from math import ceil
from typing import NamedTuple

from .cases import Product
from .sass import Instruction, bytes_per_lane

Executed = Sequence[tuple[Instruction, int]]  # the instructions of a round, and how many warps execute each


class Architecture(NamedTuple):
    block_shared: int  # bytes of shared memory that one block can have
    shared: int  # bytes per SM
    warps: int  # resident per SM
    blocks: int  # resident per SM
    macs: int  # bf16 multiply-adds per cycle of an SM's tensor cores, accumulated in fp32
    fmas: int  # fp32 multiply-adds per cycle of an SM


KIB = 1024
# NVIDIA's CUDA programming guide (compute capabilities) and architecture white papers. The tensor cores are
# those of professional cards: GeForce cards of sm_86, 89 and 120 do half.
ARCHITECTURES = {
    80: Architecture(163 * KIB, 164 * KIB, 64, 32, 1024, 64),
    86: Architecture(99 * KIB, 100 * KIB, 48, 16, 512, 128),
    89: Architecture(99 * KIB, 100 * KIB, 48, 24, 512, 128),
    90: Architecture(227 * KIB, 228 * KIB, 64, 32, 2048, 128),
    100: Architecture(227 * KIB, 228 * KIB, 64, 32, 4096, 128),
    120: Architecture(99 * KIB, 100 * KIB, 48, 24, 512, 128),
}
REGISTERS = 65536  # per SM
TENSOR_MEMORY_COLUMNS = 512  # per SM; a kernel that needs more compiles, but to a trap
RESERVED_SHARED = KIB  # taken by the system from every block
SHARED_BYTES_A_CYCLE = 128
# An SM's share of 5.5 TB/s, as measured by others on an H100 (132 SMs at 1.755 GHz), and assumed for all.
L2_BYTES_A_CYCLE = 5.5e12 / 132 / 1.755e9

TENSOR_CORES = ("HMMA", "HGMMA", "QMMA", "QGMMA", "IMMA", "IGMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA")
FP32 = ("FFMA", "FFMA2")


def blocks_per_sm(arch: int, warps: int, registers: int, shared: int, columns: int) -> dict[str, int]:
    """How many blocks of a kernel fit on an SM as far as each resource goes; the least is the answer."""
    limit = ARCHITECTURES[arch]
    by = {
        "regs": REGISTERS // (ceil(registers / 8) * 8 * 32 * warps),
        "shared": limit.shared // (shared + RESERVED_SHARED) if shared <= limit.block_shared else 0,
        "warps": min(limit.blocks, limit.warps // warps),
    }
    return by | ({"TMEM": TENSOR_MEMORY_COLUMNS // columns} if columns else {})


def cycles(arch: int, executed: Executed, products: Sequence[Product]) -> dict[str, float]:
    """The least cycles of an SM for one round, by what they are spent on."""
    loads = [(bytes_per_lane(i), warps) for i, warps in executed if i.name in ("LDG", "LDGSTS")]
    # Narrower loads fetch what lanes share: indices, scales.
    widest = max((width for width, _ in loads), default=0)
    loaded = sum(32 * warps * width for width, warps in loads if width == widest)
    return {
        "tensor": multiply_adds(executed, products) / _rate(arch, executed),
        "shared": _shared_bytes(executed, products) / SHARED_BYTES_A_CYCLE,
        "issue": sum(warps for _, warps in executed) / 4,  # an SM has four schedulers
        "L2": loaded / L2_BYTES_A_CYCLE,
    }


def matrix_names(executed: Executed) -> tuple[str, ...]:
    """The opcodes of a round's matrix products: those of the tensor cores, or fp32 ones if it has none."""
    tensor = tuple(name for name in TENSOR_CORES if any(i.name == name for i, _ in executed))
    return tensor or FP32


def multiply_adds(executed: Executed, products: Sequence[Product]) -> float:
    """Multiply-adds that a round executes; the products need ``sum(m * n * k)``, more is waste."""
    names = matrix_names(executed) if products else ()
    share = _of_tensor_memory(executed, products)
    return sum(_multiply_adds(i, warps, share) for i, warps in executed if i.name in names)


def _of_tensor_memory(executed: Executed, products: Sequence[Product]) -> Sequence[Product]:
    """The products that Blackwell's own instructions compute, found by the number of these instructions.

    Triton computes products of fewer than 64 rows with mma.sync, in the same loop.
    """
    found = Counter(i.name for i, _ in executed if i.name in TENSOR_CORES and i.name.startswith("UTC"))
    subsets = (some for size in range(1, len(products)) for some in combinations(products, size))
    return next((some for some in subsets if _steps(some, *found) == found.total()), products)


def _steps(products: Sequence[Product], *names: str) -> int:
    """How many Blackwell instructions of the largest shape: the real shape is hidden in a descriptor."""
    k_a_step = 16 if "UTCHMMA" in names else 32
    return sum(ceil(m / 128) * ceil(n / 256) * ceil(k / k_a_step) for m, n, k in products)


def _multiply_adds(i: Instruction, warps: int, products: Sequence[Product]) -> float:
    shape = i.opcode.split(".")[1] if "." in i.opcode else ""
    if i.name in FP32:
        return 32 * warps * (2 if i.name == "FFMA2" else 1)
    if "GMMA" in i.name:  # HGMMA.64x256x16, of four warps together
        m, n, k = map(int, shape.split("x"))
        return m * n * k * warps / 4
    if i.name.startswith("UTC"):  # of the whole block
        return sum(m * n * k for m, n, k in products) / _steps(products, i.name)
    digits = re.fullmatch(r"16(8|16)(\d+)", shape)  # HMMA.16816 is 16 x 8 x 16
    if digits is None:
        raise ValueError(f"{i.opcode}: unknown shape")
    return 16 * int(digits[1]) * int(digits[2]) * warps


def _rate(arch: int, executed: Executed) -> int:
    names = matrix_names(executed)
    if names == FP32:
        return ARCHITECTURES[arch].fmas
    wide = {"HMMA", "HGMMA", "UTCHMMA"}.intersection(names)
    return ARCHITECTURES[arch].macs * (1 if wide else 2)  # 8-bit operands: twice as fast


def _shared_bytes(executed: Executed, products: Sequence[Product]) -> int:
    moved = 0
    for i, warps in executed:
        if i.name in ("LDS", "LDSM", "LDSMT", "STS", "STSM", "LDGSTS"):
            moved += 32 * warps * bytes_per_lane(i)
        elif "GMMA" in i.name:  # [64, 32 bytes] unless it is in registers, and [n, 32 bytes]
            n = int(i.opcode.split(".")[1].split("x")[1])
            moved += 32 * (n + (0 if re.match(r"R\d+, R\d+, gdesc", i.operands) else 64)) * warps // 4
    if any(name.startswith("UTC") for name in matrix_names(executed)):  # each operand once
        width = 2 if "UTCHMMA" in matrix_names(executed) else 1
        moved += width * sum((m + n) * k for m, n, k in _of_tensor_memory(executed, products))
    return moved
