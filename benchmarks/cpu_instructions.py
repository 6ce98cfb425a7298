"""How many instructions the C++ kernels execute, for each instruction set that can be counted.

The count is for one call on one thread: a run of the driver (cpu_instructions.cpp) with the call minus a run
without it, by the processor's counter (perf stat) or else by valgrind, which has no AVX512. Those of ARM64
are counted elsewhere too, with a cross compiler and the emulator qemu. The count does not depend on what else
the machine does. It is also divided by the least number of multiply-add instructions
that the operation needs: 1 would be arithmetic alone. It says nothing about the time that memory takes.
"""

import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from rich.console import Console

from bench.command import parser, table
from bench.timing import append_json
from sparse_attn.ops.backends.native import LIBRARY

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "kernels" / "cpu"

# The counting command, and the pattern of a line on stderr that gives a count, or is printed per instruction.
COUNTERS = {
    "perf": (["perf", "stat", "-x,", "-e", "instructions:u"], rb"(\d+),"),
    "valgrind": (["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"], rb".*Collected : (\d+)"),
    "qemu": (
        ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", "-cpu", "max", "-singlestep", "-d", "exec,nochain"],
        rb"Trace ",
    ),
}
CROSS_COMPILER = "aarch64-linux-gnu-g++"
# No string instructions to clear and copy memory: valgrind counts each of their repetitions.
ENVIRONMENT = {**os.environ, "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-ERMS"}
# Multiply-adds per instruction: one per lane; with bf16 dots two per lane; with AMX 32 for each of 16 x 16
# results. On x86 portable has four lanes, but takes two instructions per multiply-add.
MULTIPLY_ADDS = {"amx": 8192, "avx512bf16": 32, "avx512": 16, "avx2": 8, "neon_bf16": 8, "portable": 4}


@dataclasses.dataclass(frozen=True)
class Operation:
    arguments: tuple[str | int, ...]  # the driver's: its name, then sizes
    units: int
    unit: str
    multiply_adds: int = 0


class Driver:
    """The driver and the kernels, built into a folder, run under the first counter that works here."""

    def __init__(self, folder: Path, arm64: bool = False):
        spec = importlib.util.spec_from_file_location("setup_of_sparse_attn", ROOT / "setup.py")
        setup = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(setup)
        self.path, source = folder / "driver", Path(__file__).with_suffix(".cpp")
        if arm64:
            self.counter = "qemu"
            if not (shutil.which(CROSS_COMPILER) and shutil.which("qemu-aarch64")):
                raise OSError(f"needs {CROSS_COMPILER} and qemu-aarch64")
            setup.SOURCES, setup.find_compiler = SOURCES, lambda: [CROSS_COMPILER]
            setup.build_library(self.path, link=(), more_sources=[source])
        else:
            self.counter = next(filter(works, ("perf", "valgrind")), None)
            if self.counter is None:
                raise OSError(
                    "needs perf with the event instructions:u, which few virtual machines have, or valgrind"
                )
            if not LIBRARY.exists():
                raise OSError("the C++ library was not built here")
            command = [*setup.find_compiler(), *setup.FLAGS, "-I", SOURCES, source, LIBRARY, "-o", self.path]
            setup.run([*command, f"-Wl,-rpath,{LIBRARY.parent}"])
        self.instruction_sets = run_counted(self.counter, [self.path])[0].split()

    def instructions(self, instruction_set: str, operation: Operation) -> int:
        """The instructions of one call."""
        name, *sizes = operation.arguments
        without, with_one = (
            run_counted(self.counter, [self.path, instruction_set, name, calls, *sizes])[1]
            for calls in (0, 1)
        )
        return with_one - without


def run_counted(counter: str, command: list) -> tuple[str, int]:
    """What a command prints, and how many instructions it takes."""
    prefix, pattern = COUNTERS[counter]
    command = [*prefix, *map(str, command)]
    # Read line by line: qemu's lines are gigabytes.
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        found = filter(None, map(re.compile(pattern).match, running.stderr))
        count = sum(int(match[1]) if match.re.groups else 1 for match in found)
        printed = running.stdout.read().decode()
    if running.returncode:
        raise subprocess.CalledProcessError(running.returncode, command)
    return printed, count


def works(counter: str) -> bool:
    try:
        return run_counted(counter, ["true"])[1] > 0
    except (OSError, subprocess.CalledProcessError):
        return False


def operations(rows: int, keys: int) -> dict[str, Operation]:
    """The operations for one query that selects ``rows`` of ``keys``."""

    def attend(heads: int, kv_heads: int, d_qk: int, d_v: int) -> Operation:
        arguments = ("attend", heads, kv_heads, d_qk, d_v, rows)
        return Operation(arguments, rows, "row", heads * rows * (d_qk + d_v))

    return {
        "MLA, 128 heads": attend(128, 1, 576, 512),
        "MLA, 16 heads": attend(16, 1, 576, 512),
        "GQA, 32/8 heads": attend(32, 8, 128, 128),
        "indexer": Operation(("index_logits", 64, 128, keys), keys, "key", 64 * 128 * keys),
        "top-k": Operation(("select_topk", keys, rows), keys, "logit"),
    }


def measure(driver: Driver, instruction_set: str, name: str, operation: Operation) -> dict:
    instructions = driver.instructions(instruction_set, operation)
    least = operation.multiply_adds / MULTIPLY_ADDS[instruction_set]
    return {
        "operation": name,
        "instruction_set": instruction_set,
        "counter": driver.counter,
        "instructions": instructions,
        "unit": operation.unit,
        "instructions_per_unit": instructions / operation.units,
        "instructions_per_multiply_add": instructions / least if least else None,
    }


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--quick", action="store_true", help="256 rows of 4,096 keys, not 2,048 of 32,768")
    command.add_argument(
        "--arm64", action="store_true", help="ARM64's, with a cross compiler and an emulator"
    )
    options = command.parse_args()
    sizes = {"rows": 256, "keys": 4096} if options.quick else {"rows": 2048, "keys": 32768}
    with tempfile.TemporaryDirectory() as folder:
        try:
            driver = Driver(Path(folder), options.arm64)
        except OSError as error:
            command.exit(1, f"{command.prog}: {error}\n")
        rows = [
            {**measure(driver, instruction_set, name, operation), **sizes}
            for name, operation in operations(**sizes).items()
            for instruction_set in driver.instruction_sets
        ]
    show(rows)
    append_json(options.json, "cpu_instructions", rows)


def show(rows: list[dict]) -> None:
    cells = []
    for r in rows:
        ratio, per_unit = (
            r["instructions_per_multiply_add"],
            f"{r['instructions_per_unit']:,.1f} per {r['unit']}",
        )
        cells.append([r["operation"], r["instruction_set"], f"{r['instructions']:,}", per_unit])
        cells[-1].append(f"{ratio:.2f}" if ratio else "-")
    caption = f"counted by {rows[0]['counter']}; one query, {rows[0]['rows']:,} rows; 64 x 128, "
    caption += f"{rows[0]['keys']:,} keys; bf16"
    headings = "operation", "set", "instructions", "per unit", "per multiply-add"
    title = "Instructions of one call, by instruction set"
    Console().print(table(headings, cells, words=2, title=title, caption=caption))


if __name__ == "__main__":
    main()
