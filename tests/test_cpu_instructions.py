"""The kernels' instructions can be counted, and few of them are not arithmetic."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="rich is in the demo extra")

spec = importlib.util.spec_from_file_location(
    "cpu_instructions", Path(__file__).parents[1] / "benchmarks" / "cpu_instructions.py"
)
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)

MOST = {"avx2": 3.5, "portable": 7.0}  # instructions per multiply-add: 1.3 times what GCC 12 needs


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    try:
        return benchmark.Driver(tmp_path_factory.mktemp("driver"))
    except OSError as error:
        pytest.skip(str(error))


@pytest.fixture
def instruction_set(driver):
    return "avx2" if "avx2" in driver.instruction_sets else "portable"


def test_counts_repeat_and_grow_with_the_work(driver, instruction_set):
    some, twice = (benchmark.operations(rows=256, keys=keys)["indexer"] for keys in (1024, 2048))
    count = driver.instructions(instruction_set, some)
    # The start of a process is counted too, and varies a little.
    assert driver.instructions(instruction_set, some) == pytest.approx(count, rel=1e-3)
    assert 1.9 < driver.instructions(instruction_set, twice) / count < 2


@pytest.mark.parametrize("name", ["MLA, 16 heads", "indexer"])
def test_few_instructions_are_not_arithmetic(driver, instruction_set, name):
    operation = benchmark.operations(rows=256, keys=1024)[name]
    found = benchmark.measure(driver, instruction_set, name, operation)["instructions_per_multiply_add"]
    assert 1 < found < MOST[instruction_set]
