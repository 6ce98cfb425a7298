"""Every Python block of the README runs as a user would paste it."""

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_blocks():
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("block", BLOCKS, ids=[str(n) for n in range(len(BLOCKS))])
def test_a_block_runs(block):
    if "sparse_attn.integrations.transformers" in block:
        pytest.importorskip("sparse_attn.integrations.transformers", exc_type=ImportError)
    with torch.enable_grad():  # a user's default
        exec(compile(block, "README.md", "exec"), {})
