"""What pip accepts, what is pinned, what README says was run: they agree."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README, PYPROJECT, PINNED = (
    (ROOT / name).read_text() for name in ("README.md", "pyproject.toml", "constraints.txt")
)
spec = importlib.util.spec_from_file_location("matrix", Path(__file__).with_name("matrix.py"))
matrix = importlib.util.module_from_spec(spec)
spec.loader.exec_module(matrix)
ROWS = matrix.rows(README)


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def column(name: str) -> list[str]:
    return [row[1 + matrix.PACKAGES.index(name)] for row in ROWS]


def test_every_python_that_is_promised_was_run():
    promised = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)
    assert sorted({row[0] for row in ROWS}, key=numbers) == promised
    assert f'requires-python = ">={promised[0]}"' in PYPROJECT
    assert f"# Python {promised[0]} to {promised[-1]}" in README


@pytest.mark.parametrize("name", ["torch", "triton", "numpy"])
def test_the_lower_bound_was_run(name):
    bound = numbers(re.search(rf'"{name}>=([\d.]+)', PYPROJECT)[1])
    oldest = min(map(numbers, column(name)))
    assert oldest[: len(bound)] == bound
    assert numbers(ROWS[0][1 + matrix.PACKAGES.index(name)]) == oldest  # all of the oldest together


@pytest.mark.parametrize("name", matrix.PACKAGES)
def test_what_is_pinned_was_run(name):
    pins = re.findall(rf"^{name}==([\d.]+)(?!.*<)", PINNED, re.MULTILINE)  # but for an older Python
    if name == "triton":
        pins = re.search(r"^triton>=([\d.]+),<=([\d.]+);", PINNED, re.MULTILINE).groups()
    assert pins and {*pins} <= {*column(name)}


def test_the_releases_of_transformers_that_are_accepted_were_run():
    source = (ROOT / "sparse_attn/integrations/transformers/__init__.py").read_text()
    accepted = re.search(r"^OLDEST, NEWEST = \((.*?)\), \((.*?)\)", source, re.MULTILINE).groups()
    oldest, newest = (bound.replace(", ", ".") for bound in accepted)
    run = sorted(numbers(version)[:2] for version in column("transformers"))
    assert (run[0], run[-1]) == (numbers(oldest), numbers(newest))
    assert f"({oldest} to {newest}:" in README


def test_every_row_passed():
    for row in ROWS:
        assert re.fullmatch(r"\d+ passed(, \d+ skipped)?, \d{4}-\d\d-\d\d", row[-1]), row
