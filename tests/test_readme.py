"""Every Python block of the README runs as a user would paste it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_blocks():
    assert len(BLOCKS) >= 3


def run_on_two_ranks(block, program):
    program.write_text(block)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, program], cwd=program.parent, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert len({line for line in run.stdout.splitlines() if "stores 896 KiB" in line}) == 2, run.stdout


@pytest.mark.parametrize("block", BLOCKS, ids=[str(n) for n in range(len(BLOCKS))])
def test_a_block_runs(block, tmp_path):
    if "sparse_attn.integrations.transformers" in block:
        pytest.importorskip("sparse_attn.integrations.transformers", exc_type=ImportError)
    if block.startswith("# for torchrun"):
        run_on_two_ranks(block, tmp_path / "program.py")
        return
    with torch.enable_grad():  # a user's default
        exec(compile(block, "README.md", "exec"), {})
