"""Run the tests on every stack of README's table, and write what they said into it.

    make matrix                        all rows; minutes and several gigabytes each
    make matrix ARGS="3.12 2.14.1"     the rows in which all of these words stand

A row's environment is kept in .matrix, and needs its Python on PATH (``python3.12``).
"""

import itertools
import re
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PACKAGES = ("torch", "triton", "numpy", "transformers")
HEADER = "| Python | torch | Triton | NumPy | transformers | tests |"


def rows(text: str) -> list[list[str]]:
    """The cells of each row: Python, the version of each package, what the last run said."""
    below = text[text.index(HEADER) :].splitlines()[2:]
    table = itertools.takewhile(lambda line: line.startswith("|"), below)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def environment(python: str, versions: list[str]) -> Path:
    """The folder of the row's programs, with this checkout installed."""
    folder = ROOT / ".matrix" / "-".join([python, *versions])
    if not folder.exists():
        interpreter = shutil.which(f"python{python}")
        if interpreter is None or subprocess.run([interpreter, "-m", "venv", folder]).returncode:
            raise SystemExit(f"python{python}: expected it on PATH, with its venv module")
    pins = [f"{name}=={version}" for name, version in zip(PACKAGES, versions, strict=True)]
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, *pins, "-e", f"{ROOT}[demo,test]"], check=True)
    return folder / "bin"


def run(programs: Path) -> str:
    """pytest's last line, such as ``2 failed, 2700 passed, 3 skipped``."""
    command = [programs / "pytest", "-n", "auto", "-q"]
    command += ["--ignore=tests/test_versions.py"]  # it reads what is to be written here
    log = programs.parent / "tests.log"
    with log.open("w") as out:
        subprocess.run(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    found = re.search(r"^=* ?((?:\d+ \w+(?:, )?)+) in [\d.]+s", log.read_text().splitlines()[-1])
    if found is None:
        raise SystemExit(f"pytest did not end: see {log}")
    return ", ".join(part for part in found[1].split(", ") if not part.endswith(("warnings", "warning")))


def main(words: list[str]) -> int:
    failed = 0
    chosen = [row for row in rows(README.read_text()) if set(words) <= set(row)]
    if not chosen:
        raise SystemExit(f"{' '.join(words)}: expected words that stand in one row of README's table")
    for row in chosen:
        python, *versions, _ = row
        said = run(environment(python, versions))
        print(*row[:-1], said, flush=True)
        failed += "passed" not in said or "failed" in said or "error" in said
        text = README.read_text()
        start = f"| {' | '.join(row[:-1])} |"
        line = next(line for line in text.splitlines() if line.startswith(start))
        README.write_text(text.replace(line, f"{start} {said}, {date.today()} |"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
