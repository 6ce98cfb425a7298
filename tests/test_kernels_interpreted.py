"""Runs the kernels in Triton's interpreter, on the CPU: it must be chosen before Triton is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


@pytest.mark.parametrize(
    "tests",
    ["interpreted", "test_index.py", "test_sparse_attention.py", "test_writers.py", "test_conformance.py"],
)
def test_in_the_interpreter(tests):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "interpreter", "--tb=short", "-q", tests],
        cwd=TESTS,  # so that `-p interpreter` finds tests/interpreter.py
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    # No test may fail, and none may be skipped.
    summary = done.stdout.rstrip().rsplit("\n", 1)[-1]
    if done.returncode != 0 or not re.fullmatch(r"\d+ passed(, \d+ warnings?)? in .*", summary):
        pytest.fail(f"{summary}\n{done.stdout}\n{done.stderr}", pytrace=False)
