"""Fixtures of all tests.

A test that takes ``backend`` runs on reference; on cpu, once with each instruction set that the C++
library has for this machine and once with torch; and on triton if there is a CUDA device. In a process
with TRITON_INTERPRET=1 (test_kernels_interpreted.py starts it) the test runs on triton alone, in Triton's
interpreter.
"""

import os
import zlib
from collections import Counter

import hypothesis
import pytest
import torch

from sparse_attn.ops.backends import native

# The same few examples every time; `make fuzz` takes the other profile and a seed.
COMMON = {
    "deadline": None,
    "database": None,
    "print_blob": True,
    "suppress_health_check": [*hypothesis.HealthCheck],
}
hypothesis.settings.register_profile("slice", max_examples=20, derandomize=True, **COMMON)
hypothesis.settings.register_profile("fuzz", max_examples=300, **COMMON)
hypothesis.settings.load_profile("slice")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = [] if INTERPRETED else ["interpreted"]
if INTERPRETED:
    BACKENDS = ["triton"]
else:
    on_cpu = [f"cpu-{name}" for name in (*native.instruction_sets(), "torch")]
    BACKENDS = ["reference", *on_cpu] + (["triton"] if torch.cuda.is_available() else [])


def pytest_configure(config):
    if INTERPRETED and not config.pluginmanager.hasplugin("interpreter"):
        raise pytest.UsageError("the interpreter needs its plugin: run pytest -p interpreter in tests/")
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if workers > 1:  # they share the cores
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))


# Files whose tests share something that takes long to make, one whose every case takes long, those whose
# cases compile kernels of their own, and long tests of other files.
TOGETHER = {f"test_{name}.py" for name in ("cpu_instructions", "demo_model", "kernels_compile", "packaging")}
APART = "test_kernels_interpreted.py"
GPU = "test_gpu.py", "test_gpu_hopper.py"
LONG = "test_every_mutant_is_killed", "test_the_kernels_for_arm64_run_under_an_emulator"


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(config, items):
    # What takes long and cannot be divided comes first, so that all workers end together.
    def order(item):
        long = item.path.name in TOGETHER or item.name in LONG
        return 0 if item.path.name == APART else 1 if long else 2

    items.sort(key=order)
    if INTERPRETED:
        others = [i for i in items if i.path.parent.name != "interpreted" and "backend" not in i.fixturenames]
        config.hook.pytest_deselected(items=others)  # they do the same without the interpreter
        items[:] = [item for item in items if item not in others]
        # Every third case is fast, but where the tests say themselves what is slow.
        seen = Counter()
        for item in items:
            if item.path.name != "test_kernels.py":
                seen[item.function] += 1
                if seen[item.function] % 3 != 1:
                    item.add_marker(pytest.mark.slow)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, function = nodeid.partition("[")[0].split("::", 1)
            name = file.rpartition("/")[2]
            apart = name == APART or name in GPU
            return file if name in TOGETHER else nodeid if apart else f"{file}::{function}"

    config.option.loadscopereorder = False  # keeps the order above
    return Scheduler(config, log)


@pytest.fixture(params=BACKENDS)
def backend(request):
    name, _, runs_on = request.param.partition("-")
    if not runs_on:
        yield name
        return
    with native.use(None if runs_on == "torch" else runs_on):
        yield name


@pytest.fixture
def device(backend):
    return "cuda" if backend == "triton" and not INTERPRETED else "cpu"


@pytest.fixture(autouse=True)
def seed(request):
    """The same random values every time, others for each case; fuzzing has its own seeds."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN (integers: their maximum), so that an unwritten output slot is seen."""
    # A warning, no error: on a GPU torch has no deterministic form of some operations that tests use.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield
