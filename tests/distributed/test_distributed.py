"""Several processes compute what one computes, and fail together."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run(*command) -> None:
    path = [HERE.parents[1] / "benchmarks", *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, path))}
    ran = subprocess.run(
        [sys.executable, *map(str, command)], cwd=HERE, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-6000:]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_ranks_give_what_one_process_gives(world):
    run("ranks.py", world)


def test_a_failure_of_one_rank_ends_the_call_on_all():
    run("failures.py")
