"""The package under other names, as Hugging Face's `kernels` loads it, beside the plain one in a process."""

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import sparse_attn.kernels

# One as `kernels` makes them, and one that is no identifier.
IDS = "_sparse_attn_cpu_1a2b3c", "sparse-attn 1"
ABOUT = {"name": "sparse-attn", "version": 1, "license": "MIT", "python-depends": ["einops"]}


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """The installed package as local repositories; a checkout keeps the GPU kernels in a folder apart."""
    folders = []
    for number, name in enumerate(IDS):
        folders.append(tmp_path_factory.mktemp(f"repository{number}"))
        variant = folders[-1] / "build" / "torch-cpu"
        shutil.copytree(sparse_attn.__path__[0], variant)
        shutil.copytree(sparse_attn.kernels.__path__[0], variant / "kernels", dirs_exist_ok=True)
        about = {**ABOUT, "id": name, "backend": {"type": "cpu"}}
        (variant / "metadata.json").write_text(json.dumps(about))
    return folders


def compare(loader, repositories):
    script = Path(__file__).with_name("copies.py")
    command = [sys.executable, script, loader, *repositories]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=repositories[0], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_copies_under_other_names_agree_with_the_plain_package(repositories):
    assert compare("importlib", repositories).startswith("compared")


def test_kernels_loads_copies_that_agree_with_the_plain_package(repositories):
    # It is not in the extra of the tests: where transformers 5.20 to 5.22 find it, they turn functions into
    # modules; and it brings fifteen packages that check signatures, which nothing here calls.
    try:
        metadata.version("kernels")  # of the distribution; a module of that name may be our own folder
    except metadata.PackageNotFoundError:
        pytest.skip("Hugging Face's kernels is not installed: pip install --no-deps kernels is enough")
    assert compare("kernels", repositories).startswith("compared")
