"""Read a compiled kernel's machine code (SASS): instructions, loops, registers."""

import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import networkx
import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
LEAVES = ("EXIT", "RET", "BRX", "JMP", "JMX")  # without a predicate: does not go on to the next instruction


class Instruction(NamedTuple):
    predicate: str | None
    opcode: str  # with its suffixes: LDGSTS.E.BYPASS.128
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]


class Code(NamedTuple):
    instructions: list[Instruction]
    labels: dict[str, int]  # label -> the number of the instruction after it


def disassemble(cubin: bytes) -> str:
    return _tool("nvdisasm", "-c", cubin=cubin)


def registers(cubin: bytes) -> int:
    """Registers per thread, as the hardware allocates them at launch."""
    usage = re.search(r"REG:(\d+)", _tool("cuobjdump", "-res-usage", cubin=cubin))
    if usage is None:
        raise ValueError("cuobjdump gives no register count")
    return int(usage[1])


def _tool(name: str, *options: str, cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        done = subprocess.run([TOOLS / name, *options, path], capture_output=True, text=True, check=True)
    return done.stdout


def parse(text: str) -> Code:
    code = Code([], {})
    for line in text.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            code.labels[label[1]] = len(code.instructions)
        elif found := INSTRUCTION.match(line):
            code.instructions.append(Instruction(*found.groups()))
    return code


def loops(code: Code) -> list[list[int]]:
    """The natural loops, outer before inner, as the numbers of their instructions.

    A loop is every instruction that can reach a branch back to its header. Waits that the compiler moved
    to after the final EXIT belong to the loop that they return to.
    """
    starts, graph = _blocks(code)
    dominator = networkx.immediate_dominators(graph, 0)
    bodies: dict[int, set[int]] = {}
    for block, header in graph.edges:
        if _dominates(header, block, dominator):
            inside = graph.subgraph({*graph} - {header})
            reaching = networkx.ancestors(inside, block) if block in inside else ()
            bodies.setdefault(header, {header}).update({block, *reaching})
    ends = [*starts[1:], len(code.instructions)]
    return [
        [place for block in sorted(body) for place in range(starts[block], ends[block])]
        for _, body in sorted(bodies.items())
    ]


def _dominates(header: int, block: int, dominator: dict[int, int]) -> bool:
    """Whether every path to the block leads through the header; false for blocks that no path reaches."""
    while block in dominator and block not in (header, dominator[block]):
        block = dominator[block]
    return block == header and block in dominator


def _blocks(code: Code) -> tuple[list[int], networkx.DiGraph]:
    """Where each straight piece of code starts, and which pieces can follow which."""
    jumps = {}
    for place, instruction in enumerate(code.instructions):
        if instruction.name in ("BRA", "BRX", "JMP", "EXIT", "RET"):
            named = re.findall(r"\.L_\w+", instruction.operands)
            jumps[place] = [code.labels[name] for name in named if name in code.labels]
    leaders = {0, *(place + 1 for place in jumps)}.union(*jumps.values())
    starts = sorted(place for place in leaders if place < len(code.instructions))
    number = {start: block for block, start in enumerate(starts)}
    graph = networkx.DiGraph()
    graph.add_nodes_from(number.values())
    for block, end in enumerate([*starts[1:], len(code.instructions)]):
        targets = {*jumps.get(end - 1, ())}
        if _falls_through(code.instructions[end - 1]):
            targets.add(end)
        graph.add_edges_from((block, number[target]) for target in targets if target in number)
    return starts, graph


def _falls_through(last: Instruction) -> bool:
    if last.name == "BRA":  # the condition may stand before it, among its operands, or in its suffix
        return bool(last.predicate or re.match(r"!?U?P\d", last.operands) or ".DIV" in last.opcode)
    return last.name not in LEAVES or last.predicate is not None


def count(instructions: Iterable[Instruction], *names: str) -> int:
    return sum(instruction.name in names for instruction in instructions)


def bytes_per_lane(instruction: Instruction) -> int:
    """What one lane of a load, store or copy moves: 16 for LDG.E.128, 4 where no width is named."""
    parts = instruction.opcode.split(".")
    if instruction.name in ("LDSM", "STSM"):  # 8 x 8 matrices of 16 bits, each 4 bytes per lane
        return 4 * next((int(part) for part in parts if part in ("2", "4")), 1)
    for part in parts[1:]:
        if width := re.fullmatch(r"[US]?(8|16|32|64|128|256)", part):
            return int(width[1]) // 8
    return 4
