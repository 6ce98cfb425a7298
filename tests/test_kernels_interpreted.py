"""Runs the kernels in Triton's interpreter, on the CPU: it must be chosen before Triton is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


# Few processes, as each imports torch, and of the same length.
PARTS = {
    "kernels": ["interpreted/test_kernels.py"],
    "indexer, batch invariance": ["test_index.py", "test_batch_invariance.py"],
    "all else": [
        *("interpreted", "--ignore=interpreted/test_kernels.py", "test_writers.py"),
        *("test_sparse_attention.py", "test_conformance.py"),
    ],
}


@pytest.mark.parametrize("marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
@pytest.mark.parametrize("files", PARTS.values(), ids=PARTS)
def test_in_the_interpreter(files, marked):
    run_in_the_interpreter(*files, "-m", marked)


def run_in_the_interpreter(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "interpreter", "--tb=short", "-q", *arguments],
        cwd=TESTS,  # so that `-p interpreter` finds tests/interpreter.py
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    # No test may fail, and none may be skipped.
    summary = done.stdout.rstrip().rsplit("\n", 1)[-1]
    if done.returncode != 0 or not re.fullmatch(r"\d+ passed(, \d+ (deselected|warnings?))* in .*", summary):
        pytest.fail(f"{summary}\n{done.stdout}\n{done.stderr}", pytrace=False)
