"""A row for each kernel of each case on each architecture, and a budget that no kernel may exceed."""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton

from . import bounds, sass
from .bounds import ARCHITECTURES, Executed
from .cases import CASES, PRODUCTS, Case, Product
from .launch import Launch, compile_launches

PROCESSES = 2
SLACK = 1.02  # by how much a loop may outgrow its budget: a rewritten expression is no regression


@dataclasses.dataclass(frozen=True)
class Row:
    """One kernel that one case launches on one architecture. A "round" is one iteration of its main loop."""

    op: str
    case: str
    arch: int
    kernel: str
    constants: dict[str, Any]
    warps: int  # per block
    registers: int  # per thread
    shared: int  # bytes per block
    tensor_memory: int  # columns per block
    blocks: dict[str, int]  # that fit on an SM, by resource
    spills: int  # instructions that spill registers or fetch them back
    loop_spills: int  # those in loops
    instructions: int  # per round
    matrix: dict[str, int]  # matrix instructions per round, by opcode
    work: float | None  # multiply-adds executed over those needed: 1 is ideal; None without products
    loads: dict[str, int]  # loads from global memory per round, by opcode and bytes per lane
    ahead: int  # rounds whose asynchronous copies are still in flight while one computes
    cycles: dict[str, float]  # lower bounds for a round, see bounds.py

    @property
    def key(self) -> str:
        return f"{self.op} | {self.case} | sm_{self.arch} | {self.kernel}"

    @property
    def narrow(self) -> int:
        """Loads per round of less than 16 bytes per lane; gathers should have 16, indices cannot."""
        return sum(n for name, n in self.loads.items() if int(name.split()[1]) < 16)

    def impossible(self) -> list[str]:
        """Why a GPU could not launch it."""
        reasons = []
        limit = ARCHITECTURES[self.arch].block_shared
        if self.shared > limit:
            reasons.append(
                f"needs {self.shared} bytes of shared memory, sm_{self.arch} has {limit} per block"
            )
        if self.tensor_memory > bounds.TENSOR_MEMORY_COLUMNS:
            reasons.append(
                f"needs {self.tensor_memory} columns of tensor memory of {bounds.TENSOR_MEMORY_COLUMNS}"
            )
        return reasons


def rows(
    wanted: Callable[[Case, int], bool] = lambda case, arch: True,
    dump: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[Row]:
    """Compile and read every wanted case, in a few processes; calls ``progress`` as they finish."""
    jobs = [(n, arch, dump) for n, case in enumerate(CASES) for arch in case.archs if wanted(case, arch)]
    found: list[Row] = []
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool:
        for done, part in enumerate(pool.map(_rows_of, jobs), 1):
            found += part
            progress(done, len(jobs))
    return found


def _rows_of(job: tuple[int, int, Path | None]) -> list[Row]:
    number, arch, dump = job
    case, seen, found = CASES[number], Counter(), []
    for launch in compile_launches(case.op, arch, case.record):
        seen[launch.name] += 1
        name = launch.name if seen[launch.name] == 1 else f"{launch.name} ({seen[launch.name]})"
        row, text = read(case, arch, name, launch)
        found.append(row)
        if dump is not None:
            _dump(dump, row, text, launch)
    return found


def read(case: Case, arch: int, name: str, launch: Launch) -> tuple[Row, str]:
    """The row of a compiled kernel, and its SASS."""
    cubin, metadata = launch.kernel.asm["cubin"], launch.kernel.metadata
    text, registers = sass.disassemble(cubin), sass.registers(cubin)
    code = sass.parse(text)
    products = PRODUCTS[launch.name](launch.constants) if launch.name in PRODUCTS else []
    in_loops, executed = _main_loop(code, launch, products)
    needed = sum(m * n * k for m, n, k in products)
    columns = getattr(metadata, "tmem_size", None) or 0
    names = bounds.matrix_names(executed) if products else ()
    row = Row(
        op=case.op,
        case=case.label,
        arch=arch,
        kernel=name,
        constants={key: value for key, value in launch.constants.items() if key.isupper()},
        warps=launch.warps,
        registers=registers,
        shared=metadata.shared,
        tensor_memory=columns,
        blocks=bounds.blocks_per_sm(arch, launch.warps, registers, metadata.shared, columns),
        spills=sass.count(code.instructions, "LDL", "STL"),
        loop_spills=sass.count(in_loops, "LDL", "STL"),
        instructions=len(executed),
        matrix=dict(Counter(_with_shape(i.opcode) for i, _ in executed if i.name in names)),
        work=round(bounds.multiply_adds(executed, products) / needed, 3) if products else None,
        loads=dict(
            Counter(f"{i.name} {sass.bytes_per_lane(i)}" for i, _ in executed if i.name in ("LDG", "LDGSTS"))
        ),
        ahead=_ahead(executed),
        cycles={of: round(n) for of, n in bounds.cycles(arch, executed, products).items()},
    )
    return row, text


def _ahead(executed: Executed) -> int:
    """From the most groups of copies that a wait of the round leaves in flight."""
    groups = sum(i.name == "LDGDEPBAR" for i, _ in executed)
    waits = [re.search(r"0x[0-9a-f]+", i.operands) for i, _ in executed if i.opcode == "DEPBAR.LE"]
    return max((int(left[0], 16) for left in waits if left), default=0) // groups if groups else 0


def _main_loop(
    code: sass.Code, launch: Launch, products: list[Product]
) -> tuple[list[sass.Instruction], Executed]:
    """The instructions of all loops, and those of the main loop with the warps that execute them.

    The main loop has the most matrix instructions, or loads the most bytes if there are none. A
    warp-specialised kernel has one in each partition; the dispatching loop around them does not count.
    """
    loops = [(set(loop), [code.instructions[place] for place in loop]) for loop in sass.loops(code)]
    every = [(i, launch.warps) for i in code.instructions]
    working = (*(bounds.matrix_names(every) if products else ()), "LDG", "LDGSTS")
    loops = [loop for loop in loops if sass.count(loop[1], *working)]
    inner = [mine for places, mine in loops if not any(other < places for other, _ in loops)]
    if partitions := _partitions(launch):
        if len(partitions) != len(inner):
            raise ValueError(
                f"{launch.name}: {len(partitions)} partitions, but {len(inner)} loops that do work"
            )
        executed = [(i, warps) for mine, warps in zip(inner, partitions, strict=True) for i in mine]
        return [i for mine in inner for i in mine], executed
    in_loops = [code.instructions[place] for place in sorted(set().union(*(places for places, _ in loops)))]
    if not inner:
        return in_loops, []
    most = max(inner, key=lambda mine: (sass.count(mine, *working[:-2]), _loaded(mine), len(mine)))
    return in_loops, [(i, launch.warps) for i in most]


def _loaded(instructions: Iterable[sass.Instruction]) -> int:
    return sum(sass.bytes_per_lane(i) for i in instructions if i.name in ("LDG", "LDGSTS"))


def _partitions(launch: Launch) -> list[int]:
    """Warps of each partition of a warp-specialised kernel, the default one first; else empty."""
    ttgir = launch.kernel.asm["ttgir"]
    if "ttg.warp_specialize" not in ttgir:
        return []
    default = re.search(r'"ttg.num-warps" = (\d+)', ttgir)
    return [int(default[1]), *map(int, re.findall(r"\bpartition\d+\(.*?\) num_warps\((\d+)\)", ttgir))]


def _with_shape(opcode: str) -> str:
    return ".".join(part for n, part in enumerate(opcode.split(".")) if n == 0 or part[0].isdigit())


def _dump(folder: Path, row: Row, text: str, launch: Launch) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^\w.]+", "-", f"{row.op} {row.case} sm_{row.arch} {row.kernel}").strip("-")
    (folder / f"{stem}.sass").write_text(text)
    for kind in ("cubin", "ptx", "ttgir"):
        content = launch.kernel.asm[kind]
        (folder / f"{stem}.{kind}").write_bytes(content if isinstance(content, bytes) else content.encode())


# The budget: of each row, the figures that say whether it got worse.

RULES: dict[str, Callable[[Any, Any], bool]] = {  # figure -> is this worse than the budget
    "loop_spills": lambda now, budget: now > budget,
    "spills": lambda now, budget: now > budget,
    "instructions": lambda now, budget: now > budget * SLACK,
    "matrix": lambda now, budget: now != budget,
    "work": lambda now, budget: now > budget * SLACK,
    "narrow": lambda now, budget: now > budget,
    "blocks": lambda now, budget: now < budget,
    "ahead": lambda now, budget: now < budget,
}


def figures(row: Row) -> dict[str, Any]:
    return {
        "loop_spills": row.loop_spills,
        "spills": row.spills,
        "instructions": row.instructions,
        "matrix": " ".join(sorted({name.partition(".")[0] for name in row.matrix})),
        "work": row.work or 0,
        "narrow": row.narrow,
        "blocks": min(row.blocks.values()),
        "ahead": row.ahead,
    }


def worse(row: Row, budget: dict[str, dict[str, Any]]) -> list[str]:
    """Each figure of ``row`` that is worse than its budget, in words; or that ``row`` has no budget."""
    if row.key not in budget:
        return ["has no budget"]
    now, allowed = figures(row), budget[row.key]
    return [
        f"{name}: {now[name]}, budget {allowed[name]}"
        for name, rule in RULES.items()
        if rule(now[name], allowed[name])
    ]


def version() -> str:
    """Triton's version without the patch number: code, and so the budget, differs between versions."""
    return ".".join(triton.__version__.split(".")[:2])


def budget_file(folder: Path) -> Path:
    return folder / f"triton-{version()}.json"


def read_budget(path: Path) -> dict[str, dict[str, Any]]:
    return json.loads(path.read_text())


def write_budget(path: Path, found: Iterable[Row], keep: dict[str, dict[str, Any]]) -> None:
    """Write the rows of ``found``, and those of ``keep`` that they do not replace, one per line."""
    budget = keep | {row.key: figures(row) for row in found}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in budget.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
