"""Tests of this folder run kernels in Triton's interpreter; tests/test_kernels_interpreted.py starts them."""

import os

import pytest
import torch


def pytest_runtest_setup(item):
    if os.environ.get("TRITON_INTERPRET") != "1" or not item.config.pluginmanager.hasplugin("interpreter"):
        pytest.skip("needs TRITON_INTERPRET=1 and -p interpreter")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
