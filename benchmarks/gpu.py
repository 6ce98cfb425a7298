"""Test and time every operation on this machine's GPU, and write a dated record with the card's name.

Needs torch and Triton, and the package installed or on PYTHONPATH; no network. Results are checked against
fp64 before they are timed. Times are the GPU's own: captured graphs between events, the L2 cache flushed
before each call. Each line of the record is written as soon as it is measured. --dry-run does all of it on
the CPU with tiny sizes: those times mean nothing.
"""

import argparse
import datetime
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console

from bench import operations, timing
from bench.case import GPU, TINY
from bench.command import choose_device, start

ROOT = Path(__file__).parents[1]
RECORDS = Path(__file__).parent / "records"
NO_GPU = "make gpu needs a CUDA GPU, and torch {} finds none (ARGS=--dry-run walks through it on the CPU)."


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny sizes")
    parser.add_argument("--skip-tests", action="store_true", help="only time")
    parser.add_argument("--only", default="", metavar="TEXT", help=f"of {', '.join(operations.OPERATIONS)}")
    parser.add_argument("--contexts", type=int, nargs="+", help="instead of 8192 32768 131072")
    parser.add_argument("--batches", type=int, nargs="+", help="sequences that decode, instead of 1 32 128")
    parser.add_argument(
        "--jobs", type=int, default=min(16, os.cpu_count() or 1), help="processes that test and compile"
    )
    parser.add_argument("--rounds", type=int, default=10, help="interleaved rounds (default 10)")
    parser.add_argument(
        "--output", type=Path, help="folder of the record (default benchmarks/records; a dry run keeps none)"
    )
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        sys.exit(NO_GPU.format(torch.__version__))
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.output or (Path(scratch) if options.dry_run else RECORDS)
        sys.exit(0 if record(options, folder) else 1)


def record(options: argparse.Namespace, folder: Path) -> bool:
    """Test, time and write; gives whether everything was right."""
    now, console = datetime.datetime.now(), Console(record=True, width=200)
    if options.dry_run:
        torch.set_num_threads(1)
        device, card, sizes = timing.CPU, "dry run on a CPU", TINY
    else:
        device = choose_device("cuda")
        card, sizes = timing.device_name(device), GPU
    sizes = sizes._replace(
        contexts=tuple(options.contexts or sizes.contexts), batches=tuple(options.batches or sizes.batches)
    )
    console.print(f"{card}, {now:%Y-%m-%d %H:%M}", highlight=False)
    clock, limits, about = start(console, device)
    passed, tests = (True, "skipped") if options.skip_tests else run_tests(options.dry_run, options.jobs)
    console.print(f"tests: {tests}", highlight=False)
    names = [name for name in operations.OPERATIONS if options.only in name]
    names.sort(key=lambda name: name != "layer")  # first what says most: time on a GPU may be short
    if not options.dry_run:
        # Fills Triton's cache: one process would compile for minutes.
        operations.in_shares(operations.compile_share, (names, sizes, device), options.jobs)
    path = folder / f"{now:%Y-%m-%d-%H%M}-{re.sub(r'[^a-z0-9]+', '-', card.lower())}.jsonl"
    about |= {"dry_run": options.dry_run, "tests": tests}

    def keep(line: dict) -> None:
        timing.append_json(str(path), "gpu", [{**about, **line}])

    lines = operations.run(console, names, sizes, device, options.rounds, clock, limits, keep)
    path.with_suffix(".txt").write_text(console.export_text())
    print(f"{path} and .txt")
    return passed and bool(lines) and not any("not_timed" in line for line in lines)


def run_tests(dry_run: bool, jobs: int) -> tuple[bool, str]:
    """Whether pytest passed, and the last line that it printed. A dry run only collects some tests."""
    # Not `python -m pytest`: that puts the repository on sys.path, and `import kernels` then finds kernels/.
    command = [str(Path(sys.executable).with_name("pytest"))]
    command += ["--collect-only", "-q", "tests/test_index.py"] if dry_run else ["-m", "gpu", "-n", str(jobs)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    last = ""
    for line in process.stdout:
        if not dry_run:
            print(line, end="", flush=True)
        last = line.strip(" =\n") or last
    return process.wait() == 0, last


if __name__ == "__main__":
    main()
