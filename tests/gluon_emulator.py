"""Runs the source of a warp-specialised Gluon kernel in NumPy, as unkindly as sm_90 may.

    module = load_module(source, **names)   # with this file in place of Gluon
    with seed(3):
        module["launcher"](...)

Partitions are threads of which one runs at a time. At every operation on shared memory or on a barrier a
seeded choice says who goes on: a partition, or an effect that is under way. An asynchronous copy ruins its
target when it is issued and lands later, in any order; wgmma reads its operands between issue and wait, and
has no result before the wait. Shared memory begins as NaN; a load or store that misses every element of its
tensor, a second store to an element, and a standstill are errors.

A wrong order is an error even where it did no harm in this run. Every access is stamped, and whoever meets
it must know of it: by program order, or through barriers (vector clocks). wgmma must also know of a fence
between a write and its own read: by whoever stored, or, after a copy, by whoever waited for it. An ``arrive``
stands for the whole partition: the compiler puts a barrier of its threads before it, and a test of the kernel
looks for that in what it compiles to.

Layouts have no meaning here; they are the compiler's to check.
"""

import ast
import contextlib
import dataclasses
import itertools
import random
import threading
import types
from collections.abc import Callable

import numpy as np
import torch


class KernelError(AssertionError):
    """What the kernel did wrong."""


# Values. Arrays of NumPy; bf16 is fp32 that has been rounded.

BF16, E4M3 = "bfloat16", "float8e4nv"
TORCH = {torch.bfloat16: BF16, torch.float32: np.float32, torch.int32: np.int32, torch.uint8: np.uint8}
DTYPES = {dtype: torch_dtype for torch_dtype, dtype in TORCH.items()}


class Tensor(np.ndarray):
    def to(self, dtype, bitcast=False) -> "Tensor":
        if bitcast:
            assert (self.dtype, dtype) == (np.uint8, E4M3)  # of which a tensor knows its fp32 alone
            codes = torch.from_numpy(np.ascontiguousarray(self)).view(torch.float8_e4m3fn)
            return codes.float().numpy().view(Tensor)
        if dtype == BF16:
            rounded = torch.from_numpy(np.ascontiguousarray(self, np.float32)).bfloat16().float()
            return rounded.numpy().reshape(self.shape).view(Tensor)
        return self.astype(dtype)

    # Triton's values never change: `x += y` makes a new one.
    __iadd__, __imul__, __ior__ = np.ndarray.__add__, np.ndarray.__mul__, np.ndarray.__or__


def tensor(value, dtype=None) -> Tensor:
    return np.array(value, dtype).view(Tensor)


@dataclasses.dataclass
class Memory:
    """The storage of a tensor argument."""

    flat: torch.Tensor
    exists: np.ndarray  # which of its elements belong to the tensor
    stored: np.ndarray
    views: dict = dataclasses.field(default_factory=dict)  # by type, the same bytes as elements of it

    def of(self, dtype) -> "Memory":
        """The same bytes as elements of another type, not a narrower one."""
        if dtype not in self.views:
            ratio = DTYPES[dtype].itemsize // self.flat.element_size()
            length = len(self.flat) // ratio
            exists = self.exists[: length * ratio].reshape(length, ratio).all(1)
            parts = self.flat[: length * ratio].view(DTYPES[dtype]), exists, np.zeros(length, bool)
            fields = dict(zip(("flat", "exists", "stored"), parts, strict=True))
            self.views[dtype] = dataclasses.replace(self, **fields, views={})
        return self.views[dtype]

    def places(self, offset, mask) -> tuple[np.ndarray, np.ndarray]:
        offset, mask = np.broadcast_arrays(offset, True if mask is None else mask)
        chosen = np.asarray(offset[mask], np.int64)
        inside = (chosen >= 0) & (chosen < len(self.exists))
        if not inside.all() or not self.exists[chosen].all():
            raise KernelError("an address belongs to no element of the tensor")
        return chosen, mask


@dataclasses.dataclass
class Pointer:
    memory: Memory
    offset: np.ndarray | int = 0

    def __add__(self, offset) -> "Pointer":
        return Pointer(self.memory, self.offset + offset)

    def __getitem__(self, key) -> "Pointer":
        return Pointer(self.memory, self.offset[key])

    def to(self, dtype) -> "Pointer":
        """The same address, of wider elements; it must be that of one. As a number it stays what it is."""
        if dtype == np.int64:
            return self
        ratio = DTYPES[dtype].itemsize // self.memory.flat.element_size()
        if ratio == 0 or self.offset % ratio:
            raise KernelError("a pointer to wider elements is not aligned")
        return Pointer(self.memory.of(dtype), self.offset // ratio)


def pointer(t: torch.Tensor) -> Pointer:
    flat = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    exists = torch.zeros(len(flat), dtype=torch.bool)
    exists.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(True)
    return Pointer(Memory(flat, exists.numpy(), np.zeros(len(flat), bool)), t.storage_offset())


def load(pointer, mask=None, other=0):
    places, mask = pointer.memory.places(pointer.offset, mask)
    values = pointer.memory.flat[torch.from_numpy(places)]
    dtype = TORCH[values.dtype]
    result = np.full(mask.shape, other, np.float32 if dtype == BF16 else dtype)
    result[mask] = values.float().numpy() if dtype == BF16 else values.numpy()
    return result.view(Tensor)


def store(pointer, value, mask=None):
    places, mask = pointer.memory.places(pointer.offset, mask)
    if len(np.unique(places)) < len(places) or pointer.memory.stored[places].any():
        raise KernelError("an element is stored twice")
    pointer.memory.stored[places] = True
    values = torch.from_numpy(np.broadcast_to(value, mask.shape)[mask])
    pointer.memory.flat[torch.from_numpy(places)] = values.to(pointer.memory.flat.dtype)


# Time. A partition owns three lines of it: its program, its copies, its wgmmas.

PARTITIONS, PROGRAM, COPY, MMA = 4, 0, 1, 2


class Partition(threading.Thread):
    def __init__(self, machine: "Machine", number: int, function, parent: "Partition | None"):
        super().__init__(daemon=True)
        self.machine, self.number, self.function = machine, number, function
        none = np.zeros(3 * PARTITIONS, np.int64)
        self.known = parent.known.copy() if parent else none  # on each line, up to when
        self.fenced = parent.fenced.copy() if parent else none.copy()  # of that, what wgmma may read
        self.issued = {COPY: 0, MMA: 0}
        self.committed: list[int] = []  # number of the last copy of each group
        self.go, self.ready, self.error = threading.Semaphore(0), lambda: True, None
        self.weight = machine.random.choice([1, 10, 100])
        self.start()

    def run(self):
        self.go.acquire()
        try:
            self.machine.here.partition = self
            with np.errstate(all="ignore"):  # a GPU divides by zero in silence
                self.function()
        except BaseException as error:
            self.error = error
        self.function = None
        self.machine.back.release()

    def yields(self, until=lambda: True):
        """Let others go on, at least until the condition holds."""
        self.ready = until
        self.machine.back.release()
        self.go.acquire()
        if self.machine.stopped:
            raise SystemExit
        self.known[self.line(PROGRAM)] += 1

    def line(self, kind: int) -> int:
        return 3 * self.number + kind

    def issue(self, kind: int, run) -> int:
        """Start a copy or a wgmma; it happens some time before it is waited for."""
        self.issued[kind] += 1
        self.machine.effects.append(Effect(self, kind, self.issued[kind], run, in_order=kind == MMA))
        return self.issued[kind]

    def wait_for(self, kind: int, number: int):
        self.yields(lambda: not any(e.number <= number for e in self.machine.under_way(self, kind)))
        self.known[self.line(kind)] = max(self.known[self.line(kind)], number)

    def learns(self, known, fenced):
        np.maximum(self.known, known, out=self.known)
        np.maximum(self.fenced, fenced, out=self.fenced)


@dataclasses.dataclass(eq=False)
class Effect:
    partition: Partition
    kind: int
    number: float
    run: Callable[[], None]
    in_order: bool  # after those of the same kind with a lower number


class Machine:
    """One program of the grid."""

    here = threading.local()

    def __init__(self, kernel, program: tuple[int, int], programs: tuple[int, int]):
        self.random = RANDOM
        self.program, self.programs = program, programs
        self.back, self.stopped = threading.Semaphore(0), False
        self.effects: list[Effect] = []
        self.effects_weight = self.random.choice([1, 10, 100])
        self.partitions: list[Partition] = []
        self.add(kernel, None)
        try:
            while self.partitions_alive():
                self.step()
        finally:
            self.stopped = True
            for partition in self.partitions_alive():
                partition.go.release()

    def add(self, function, parent) -> Partition:
        partition = Partition(self, len(self.partitions), function, parent)
        self.partitions.append(partition)
        return partition

    def partitions_alive(self):
        return [p for p in self.partitions if p.function]

    def under_way(self, partition, kind):
        return [e for e in self.effects if e.partition is partition and e.kind == kind]

    def may_happen(self, effect) -> bool:
        others = self.under_way(effect.partition, effect.kind)
        return not effect.in_order or all(effect.number <= e.number for e in others)

    def step(self):
        choices = [p for p in self.partitions_alive() if p.ready()]
        choices += [e for e in self.effects if self.may_happen(e)]
        if not choices:
            raise KernelError("standstill: every partition waits")
        weights = [c.weight if isinstance(c, Partition) else self.effects_weight for c in choices]
        choice = self.random.choices(choices, weights)[0]
        if isinstance(choice, Effect):
            self.effects.remove(choice)
            choice.run()
            return
        choice.go.release()
        self.back.acquire()
        if choice.error:
            raise choice.error


def current() -> Partition:
    return Machine.here.partition


RANDOM = random.Random(0)


@contextlib.contextmanager
def seed(number: int):
    global RANDOM
    RANDOM = random.Random(number)
    yield


# Shared memory.


class Shared:
    """A view of an allocation: its values, and the stamps of what was done to each of its rows."""

    def __init__(self, values, stamps):
        self.values, self.stamps = values, stamps
        self.writer, self.written, *self.read = stamps

    def index(self, i) -> "Shared":
        i = range(len(self.values))[i]
        return Shared(self.values[i], [stamp[i, ...] for stamp in self.stamps])

    def slice(self, start, length, dim) -> "Shared":
        assert dim == self.values.ndim - 1 and start + length <= self.values.shape[dim]
        return Shared(self.values[..., start : start + length], self.stamps)

    def permute(self, order) -> "Shared":
        return Shared(self.values.transpose(order), self.stamps)

    def reads(self, partition, kind, number):
        """Stamp a read; complain unless the reader knows the last write."""
        if (partition.known[self.writer] < self.written).any():
            raise KernelError("a read is not ordered after the write before it")
        if kind == MMA and (partition.fenced[self.writer] < self.written).any():
            raise KernelError("wgmma reads what no fence has made visible to it")
        self.read[partition.line(kind)][...] = number

    def writes(self, partition, kind, number):
        if (partition.known[self.writer] < self.written).any():
            raise KernelError("a write is not ordered after the write before it")
        if any((partition.known[line] < read).any() for line, read in enumerate(self.read)):
            raise KernelError("a write is not ordered after the reads before it")
        self.writer[...], self.written[...] = partition.line(kind), number
        for line in self.read:  # who knows of this write knows of them
            line[...] = 0

    def load(self, layout) -> Tensor:
        partition = current()
        partition.yields()
        self.reads(partition, PROGRAM, partition.known[partition.line(PROGRAM)])
        return tensor(self.values)

    def store(self, value):
        partition = current()
        partition.yields()
        assert value.shape == self.values.shape
        self.writes(partition, PROGRAM, partition.known[partition.line(PROGRAM)])
        self.values[...] = value


def allocate_shared_memory(dtype, shape, layout) -> Shared:
    values = np.full(shape, np.nan, np.float32) if dtype in (BF16, np.float32) else np.full(shape, -77, dtype)
    return Shared(values, [np.zeros(shape[:-1], np.int64) for _ in range(2 + 3 * PARTITIONS)])


# Asynchronous copies.


def async_load(smem: Shared, pointer: Pointer, mask=None):
    partition = current()
    partition.yields()
    target = smem.values
    mask = None if mask is None else np.broadcast_to(mask, target.shape)
    landed = load(Pointer(pointer.memory, np.broadcast_to(pointer.offset, target.shape)), mask)

    def land():
        target[...] = landed

    smem.writes(partition, COPY, partition.issue(COPY, land))
    target[...] = np.nan


def commit_group():
    current().committed.append(current().issued[COPY])


def wait_group(num_outstanding):
    partition = current()
    done = partition.committed[: len(partition.committed) - num_outstanding]
    partition.wait_for(COPY, max(done, default=0))


def copies_arrive(barrier, increment_count):
    assert increment_count is False
    partition = current()
    partition.yields()
    number, known = partition.issued[COPY], np.zeros_like(partition.known)
    known[partition.line(COPY)] = number  # of what the threads did themselves this arrival says nothing

    def arrive():
        barrier.arrives(128, known, np.zeros_like(known))

    partition.machine.effects.append(Effect(partition, COPY, number + 0.5, arrive, in_order=True))


# Barriers.


class Barrier:
    def __getattr__(self, name):
        raise KernelError("the barrier was not initialised")

    def init(self, count):
        self.count = self.pending = count
        self.completed = 0  # phases
        self.arrived = [np.zeros(3 * PARTITIONS, np.int64) for _ in range(2)]
        self.released = [np.zeros(3 * PARTITIONS, np.int64) for _ in range(2)]

    def arrives(self, count, known, fenced):
        if count > self.pending:
            raise KernelError("more arrivals than the barrier counts")
        self.pending -= count
        self.arrived = [np.maximum(a, b) for a, b in zip(self.arrived, (known, fenced), strict=True)]
        if self.pending == 0:
            self.pending, self.released, self.completed = self.count, self.arrived, self.completed + 1


def barrier_arrive(barrier, count=1):
    partition = current()
    partition.yields()
    barrier.arrives(count, partition.known, partition.fenced)


def barrier_wait(barrier, phase):
    partition = current()
    partition.yields(lambda: barrier.completed % 2 != phase)
    partition.learns(*barrier.released)


def allocate_mbarrier(batch=None):
    if batch is None:
        return Barrier()
    barriers = [Barrier() for _ in range(batch)]
    return types.SimpleNamespace(index=lambda i: barriers[range(batch)[i]])


def fence_async_shared():
    """For what the partition stored itself, and for the copies that it knows of."""
    partition = current()
    partition.yields()
    for line in (partition.line(PROGRAM), *range(COPY, 3 * PARTITIONS, 3)):
        partition.fenced[line] = partition.known[line]


# wgmma.


@dataclasses.dataclass
class Accumulator:
    """The result of a wgmma that nobody has waited for: it has no value, hence no arithmetic."""

    number: int
    value: np.ndarray | None = None


def warpgroup_mma(a, b: Shared, acc, is_async=False):
    assert is_async
    partition = current()
    partition.yields()
    result = Accumulator(partition.issued[MMA] + 1)

    def multiply():
        left, right = (torch.from_numpy(np.asarray(x.values if isinstance(x, Shared) else x)) for x in (a, b))
        result.value = (left @ right).numpy() + (acc.value if isinstance(acc, Accumulator) else acc)

    number = partition.issue(MMA, multiply)
    for operand in (a, b):
        if isinstance(operand, Shared):
            operand.reads(partition, MMA, number)
    return result


def warpgroup_mma_wait(num_outstanding, deps):
    partition = current()
    number = partition.issued[MMA] - num_outstanding
    partition.wait_for(MMA, number)
    done = [d.value.view(Tensor) if d.number <= number else d for d in deps]
    return done[0] if len(done) == 1 else done


def refuse_bools(value):
    """Within a tuple that goes to a partition, a bool becomes a value at run time: `if` no longer decides."""
    if isinstance(value, bool):
        raise TypeError("a bool within an argument of a partition; pass None or a number in its place")
    if isinstance(value, tuple):
        for part in value:
            refuse_bools(part)


def warp_specialize(functions_and_args, worker_num_warps, worker_num_regs):
    for _, args in functions_and_args:
        for arg in args:
            if isinstance(arg, tuple):
                refuse_bools(arg)
    parent = current()
    machine = parent.machine
    parts = [machine.add(lambda f=f, a=a: f(*a), parent) for f, a in functions_and_args]
    parent.yields(lambda: not any(part.function for part in parts))


# The names that a kernel uses.


def constexpr(value):
    if not isinstance(value, int | float):
        return value
    return type("constexpr", (type(value),), {"value": property(lambda self: value)})(value)


class Jit:
    def __init__(self, function, **options):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)

    def __getitem__(self, grid):
        def launch(*args, **options):
            args = [pointer(a) if isinstance(a, torch.Tensor) else a for a in args]
            for program in itertools.product(*map(range, grid)):
                Machine(lambda: self.function(*args), program, grid)

        return launch


def jit(function=None, **options):
    return Jit(function) if function else Jit


LAYOUTS = (
    "BlockedLayout SliceLayout DotOperandLayout NVMMADistributedLayout NVMMASharedLayout SwizzledSharedLayout"
)
ASSEMBLY = {  # what a kernel may have in lines of it
    "mov.b32 {$0, $1}, $2;": lambda word: (
        (word & 0xFFFF).to(np.uint16),
        (word >> 16 & 0xFFFF).to(np.uint16),
    ),
    "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }": (
        lambda pointer, ok: pointer.memory.places(pointer.offset, ok != 0)[1]
    ),
}
GL = types.SimpleNamespace(
    **{name: lambda *args: args for name in LAYOUTS.split()},
    **{name: getattr(np, name) for name in ("int8", "int32", "int64", "float32")},
    **{name: getattr(np, name) for name in ("uint8", "uint16", "uint32")},
    bfloat16=BF16,
    float8e4nv=E4M3,
    pointer_type=lambda dtype: dtype,
    cast=lambda value, dtype: tensor(value, dtype),
    join=lambda a, b: np.stack([a, b], -1).view(Tensor),
    inline_asm_elementwise=lambda asm, constraints, args, dtype, is_pure, pack: ASSEMBLY[asm](*args),
    constexpr=constexpr,
    shared_memory_descriptor=Shared,
    allocate_shared_memory=allocate_shared_memory,
    warp_specialize=warp_specialize,
    program_id=lambda axis: tensor(current().machine.program[axis], np.int32),
    num_programs=lambda axis: tensor(current().machine.programs[axis], np.int32),
    static_range=range,
    arange=lambda start, end, layout: tensor(np.arange(start, end, dtype=np.int32)),
    zeros=lambda shape, dtype, layout: tensor(np.zeros(shape, dtype)),
    full=lambda shape, value, dtype, layout: tensor(np.full(shape, value, dtype)),
    convert_layout=lambda value, layout, assert_trivial=False: value,
    load=load,
    store=store,
    barrier=lambda: None,  # the threads of a partition are one here
    where=lambda condition, a, b: tensor(np.where(condition, np.float32(a), np.float32(b))),
    maximum=lambda a, b: tensor(np.fmax(a, b)),  # of a number and NaN, the number
    minimum=lambda a, b: tensor(np.fmin(a, b)),
    max=lambda x, axis: tensor(np.fmax.reduce(x, axis)),
    sum=lambda x, axis: tensor(np.sum(x, axis)),
    exp2=lambda x: tensor(np.exp2(x)),
    log2=lambda x: tensor(np.log2(x)),
)
NAMES = {
    "triton": types.SimpleNamespace(__version__="3.9.0"),
    "gl": GL,
    "gluon": types.SimpleNamespace(jit=jit, aggregate=dataclasses.dataclass),
    "async_copy": types.SimpleNamespace(
        async_load=async_load, commit_group=commit_group, wait_group=wait_group, mbarrier_arrive=copies_arrive
    ),
    "mbarrier": types.SimpleNamespace(
        allocate_mbarrier=allocate_mbarrier,
        init=lambda barrier, count: barrier.init(count),
        arrive=barrier_arrive,
        wait=barrier_wait,
    ),
    "fence_async_shared": fence_async_shared,
    "warpgroup_mma": warpgroup_mma,
    "warpgroup_mma_wait": warpgroup_mma_wait,
}


def load_module(source: str | ast.Module, **names) -> dict:
    """Execute the source of a kernel's module, with NAMES in place of its imports of Triton.

    What it imports from modules beside it, which use Triton too, is in ``names``.
    """
    tree = ast.parse(source) if isinstance(source, str) else source
    imports = (s for s in tree.body if isinstance(s, (ast.Import, ast.ImportFrom)))
    theirs = [s for s in imports if "triton" in ast.unparse(s) or getattr(s, "level", 0)]
    body = [s for s in tree.body if s not in theirs]
    module = dict(NAMES, **names, __name__="emulated")
    exec(compile(ast.Module(body, []), "emulated kernel", "exec"), module)
    return module
