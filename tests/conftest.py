"""Fixtures of all tests.

A test that takes ``backend`` runs on every backend of this process: reference and cpu, and triton
on a CUDA device; with TRITON_INTERPRET=1 (set by the test that starts such a process) on triton
alone, in Triton's interpreter.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    BACKENDS = ["triton"]
else:
    BACKENDS = ["reference", "cpu"] + (["triton"] if torch.cuda.is_available() else [])


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def device(backend):
    return "cuda" if backend == "triton" and not INTERPRETED else "cpu"


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN (integers: their maximum), so that an output slot left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield
