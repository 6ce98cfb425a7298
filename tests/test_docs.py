"""The guides: every Python block runs, page by page, every command exists, every link leads somewhere."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from sparse_attn import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def test_there_are_pages_and_no_block_escapes_the_tests():
    assert len(PAGES) >= 7
    for page in PAGES:
        assert {language for language, _ in BLOCK.findall(page.read_text())} <= {"python", "sh"}, page.name


@each_page
def test_python_blocks_run_in_order(page):
    namespace = {}
    with torch.enable_grad():  # a reader's default
        for number, (language, block) in enumerate(BLOCK.findall(page.read_text())):
            if language == "python":
                if "sparse_attn.kernels" in block:
                    pytest.importorskip("triton")
                if "from kernels import" in block:
                    pytest.importorskip("kernels", reason="Hugging Face's kernels is not installed")
                exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)


@each_page
def test_commands_exist(page):
    text = page.read_text()
    lines = [
        line for language, block in BLOCK.findall(text) if language == "sh" for line in block.splitlines()
    ]
    lines += re.findall(r"`((?:make|python|sparse-attn)\s[^`]+)`", BLOCK.sub("", text))
    for line in lines:
        program, first, *rest = shlex.split(line)
        if program == "make":
            assert re.search(rf"^{first}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        elif program == "python":
            assert (ROOT / first).exists(), line
        else:
            with pytest.raises(SystemExit) as end:  # the arguments are understood, then --help ends it
                cli.main([first, *rest, "--help"])
            assert end.value.code == 0, line


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("*.md")], ids=lambda page: page.stem)
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:sparse_attn|kernels|tests|benchmarks|examples)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path
