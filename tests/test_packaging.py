"""What a user installs: the wheel, the sdist and the editable checkout, each in a fresh environment."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "setup.py").exists():
    pytest.skip("needs a source checkout", allow_module_level=True)

CODE = ("sparse_attn", "kernels")
BESIDE_CODE = ("tests", "benchmarks", "examples")
FILES = (
    *("setup.py", "pyproject.toml", "MANIFEST.in", "constraints.txt", "Makefile", ".clang-format"),
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"),
)
IGNORED = shutil.ignore_patterns("__pycache__", "*.py[cod]", "*.so", "*.o", "build")

# Prints where the package came from, and what the name `kernels` alone finds.
WHERE = """
import importlib.util, sparse_attn, sparse_attn.kernels
print(sparse_attn.__file__)
print(sparse_attn.kernels.__file__)
print(sparse_attn.__version__)
print(getattr(importlib.util.find_spec("kernels"), "origin", None))
"""


LIBRARY = "sparse_attn/_native.so"


def run(*command, cwd, **variables):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_"))} | variables
    command = [str(part) for part in command]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def build(what, source, out, **variables):
    """The path of the wheel or sdist, built without the network."""
    command = (sys.executable, "-m", "build", "--no-isolation", f"--{what}", "--outdir", out, source)
    run(*command, cwd=out, **variables)
    return next(out.glob("*.whl" if what == "wheel" else "*.tar.gz"))


def files_below(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def wheel_files(wheel):
    return {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout, so that building leaves nothing in it and finds nothing stale."""
    copy = tmp_path_factory.mktemp("source code")
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    for name in (*CODE, *BESIDE_CODE):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, copy / name, ignore=IGNORED)
    keep_library(copy)
    return copy


def keep_library(checkout):
    """The library is compiled anew only if its sources differ: setup.py names it by their digest."""
    (checkout / "build").mkdir()
    for library in (ROOT / "build").glob("native-*.so"):
        shutil.copy(library, checkout / "build")


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


def environment(folder, *install):
    """A virtual environment that holds only this package; its dependencies are those of the running one.

    A .pth file names the running site-packages. Python does not read the .pth files of a folder added that
    way, so an editable install over there stays invisible, and this environment's own packages come first.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    own = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    parents = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (own / "dependencies.pth").write_text("\n".join(parents))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    offline = ("--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed", "--no-compile")
    run(*pip, "install", *offline, *install, cwd=folder)
    return python, own


def test_wheel_holds_every_source_file(source, wheel):
    expected = {f"sparse_attn/{name}" for name in files_below(source / "sparse_attn")}
    expected |= {f"sparse_attn/kernels/{name}" for name in files_below(source / "kernels")}
    assert {"sparse_attn/py.typed", "sparse_attn/kernels/__init__.py"} <= expected
    packaged = {name for name in wheel_files(wheel) if ".dist-info/" not in name}
    assert packaged - {LIBRARY} == expected  # so no top-level `kernels`, and no tests
    folders = {folder for name in packaged for folder in Path(name).parts[:-1]}
    assert not folders & {"bench", "aot", "demo", *BESIDE_CODE}
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    if shutil.which("c++"):
        assert LIBRARY in packaged


def test_sdist_holds_the_checkout_and_builds_the_same_wheel(source, wheel, tmp_path):
    (tmp_path / "sdist").mkdir()
    run("tar", "-xf", build("sdist", source, tmp_path), cwd=tmp_path / "sdist")
    unpacked = next((tmp_path / "sdist").iterdir())
    expected = {f"{name}/{file}" for name in (*CODE, *BESIDE_CODE) for file in files_below(source / name)}
    assert {"benchmarks/bench/case.py", "benchmarks/aot/cases.py", "examples/demo.py"} <= expected
    assert expected | set(FILES) <= files_below(unpacked)

    keep_library(unpacked)
    again = build("wheel", unpacked, tmp_path)
    assert again.name == wheel.name
    assert wheel_files(again) == wheel_files(wheel)
    for name in wheel_files(wheel):
        assert zipfile.ZipFile(again).read(name) == zipfile.ZipFile(wheel).read(name), name


def test_installed_wheel_works_away_from_the_checkout(source, wheel, tmp_path):
    python, own = environment(tmp_path / "venv", wheel)
    package, kernels, version, stray = run(python, "-c", WHERE, cwd=tmp_path).splitlines()
    assert Path(package) == own / "sparse_attn" / "__init__.py"
    assert Path(kernels) == own / "sparse_attn" / "kernels" / "__init__.py"
    assert f"-{version}-" in wheel.name
    assert Path(stray) not in {at / "kernels" / "__init__.py" for at in (own, source, ROOT)}  # others may be
    assert "sparse_attn.cli" in (python.parent / "sparse-attn").read_text()


def test_editable_install_maps_the_kernels_folder(source, tmp_path):
    python, _ = environment(tmp_path / "venv", "--editable", source)
    package, kernels, _, stray = run(python, "-c", WHERE, cwd=tmp_path).splitlines()
    assert Path(package) == source / "sparse_attn" / "__init__.py"
    assert Path(kernels) == source / "kernels" / "__init__.py"
    assert Path(stray) not in {at / "kernels" / "__init__.py" for at in (source, ROOT)}


SELECT = """
import warnings, torch, sparse_attn
logits, ks, ke = torch.tensor([[1.0, 3.0, 2.0]]), *torch.tensor([[0], [3]], dtype=torch.int32)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        print(sparse_attn.select_topk(logits, 2, ks, ke).tolist())
print(*(str(w.message) for w in caught if "sparse_attn" in str(w.message)), sep="\\n")
"""


def test_without_a_compiler_everything_installs_and_runs_on_torch(source, tmp_path):
    (tmp_path / "wheel").mkdir()
    wheel = build("wheel", source, tmp_path / "wheel", CXX="false")  # a compiler that only fails
    assert LIBRARY not in wheel_files(wheel)
    python, _ = environment(tmp_path / "venv", wheel)
    first, second, *warned = run(python, "-c", SELECT, cwd=tmp_path).splitlines()
    assert first == second == "[[1, 2]]"
    assert len(warned) == 1 and "was not built" in warned[0] and "compiler" in warned[0]


def test_importing_the_folder_as_kernels_says_what_to_do(source):
    attempt = "try:\n import kernels\nexcept ImportError as error:\n print(error)\nelse:\n print('imported')"
    message = run(sys.executable, "-c", attempt, cwd=source)
    assert "sparse_attn.kernels" in message and "pip install -e ." in message and "'kernels'" in message
