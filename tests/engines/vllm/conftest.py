"""What all of these tests need before vLLM is imported."""

import os
import sys
from types import ModuleType

import pytest

# vLLM's CUDA platform loads a library that builds for the CPU lack; tests of it call nothing of that.
sys.modules.setdefault("vllm._C_stable_libtorch", ModuleType("vllm._C_stable_libtorch"))


@pytest.fixture(scope="session", autouse=True)
def _elsewhere(tmp_path_factory):
    """vLLM runs `python -m`, which in the root of a checkout takes kernels/ for another package."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(before)
