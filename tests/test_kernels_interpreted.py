"""Runs the kernels in Triton's interpreter, on the CPU: it must be chosen before Triton is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


OTHERS = ("interpreted", "--ignore=interpreted/test_kernels.py", "test_writers.py")
EVERY = (*OTHERS, "test_index.py", "test_sparse_attention.py", "test_conformance.py")
EVERY += ("test_batch_invariance.py",)
PARTS = {
    "attention kernels": ("interpreted/test_kernels.py", "-k", "mla or gqa"),
    "other kernels": ("interpreted/test_kernels.py", "-k", "not (mla or gqa)"),
    "writers, top-k, layers": OTHERS,
    "indexer": ("test_index.py", "test_batch_invariance.py"),
    "attention, facades": ("test_sparse_attention.py", "test_conformance.py"),
}
SLOW_PARTS = {
    "attention kernels": ("interpreted/test_kernels.py", "-m", "slow", "-k", "mla or gqa"),
    "other kernels": ("interpreted/test_kernels.py", "-m", "slow", "-k", "not (mla or gqa)"),
    "all else": (*EVERY, "-m", "slow"),
}


@pytest.mark.parametrize("arguments", PARTS.values(), ids=PARTS)
def test_in_the_interpreter(arguments):
    run_in_the_interpreter(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", SLOW_PARTS.values(), ids=SLOW_PARTS)
def test_more_in_the_interpreter(arguments):
    run_in_the_interpreter(*arguments)


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
