"""Tests of this folder run kernels in Triton's interpreter; tests/test_kernels_interpreted.py starts them."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
