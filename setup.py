"""The package mapping and the CPU library; everything declarative is in pyproject.toml.

The folder ``kernels/`` is installed as ``sparse_attn.kernels``, because the top-level name
``kernels`` belongs to another project on the package index.

``kernels/cpu/*.cpp`` become ``sparse_attn/_native.so``, a plain C library without Python or torch in
it. Each instruction set is compiled with its own flags and chosen at run time. Without a C++17
compiler the package installs all the same, and runs on torch.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FLAGS = ["-std=c++17", "-fPIC", "-ffp-contract=off"]
OPTIMISED = ["-O3", "-fvisibility=hidden", "-fno-exceptions"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
# Without it GCC loads all of a tile's operands first, and then lacks registers for its sums.
IN_ORDER = ["-fno-schedule-insns"]
ARM64 = {"isa_portable": IN_ORDER, "isa_neon_bf16": [*IN_ORDER, "-march=armv8.2-a+bf16"]}
# The flags of each architecture's units; isa_portable needs none and is a unit of all.
INSTRUCTION_SETS = {
    "x86_64": {
        "isa_avx512": AVX512,  # takes longest, so it is among the first to be compiled
        "isa_avx2": AVX2,
        "isa_avx512bf16": [*AVX512, "-mavx512bf16"],
        "isa_amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    },
    "aarch64": ARM64,
    "arm64": ARM64,  # the same architecture, by Apple's name
}
OPENMP = ["-fopenmp"]
SOURCES = Path("kernels", "cpu")


class BuildNative(build_ext):
    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".so"  # one library for every Python

    def build_extensions(self):
        super().build_extensions()
        self.extensions = [ext for ext in self.extensions if Path(self.get_ext_fullpath(ext.name)).exists()]

    def build_extension(self, ext):
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)
        try:
            shutil.copy(built_library(), library)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or error
            print(
                f"\nsparse_attn: the CPU library was not built, torch will do its work: {said}",
                file=sys.stderr,
            )


class PlatformWheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]  # the library depends on the platform, not on Python


def built_library():
    """The library, kept in ``build`` for as long as no source, flag or compiler changes."""
    compiler = find_compiler()
    version = f"{compiler} {run([*compiler, '--version']).stdout}"
    inputs = [Path("setup.py"), *sorted(SOURCES.iterdir())]
    digest = hashlib.sha256(b"".join([version.encode(), *(path.read_bytes() for path in inputs)]))
    library = Path("build", f"native-{digest.hexdigest()[:16]}.so")
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        build_library(library.with_suffix(".part"))
        library.with_suffix(".part").rename(library)
    return library


def build_library(target, options=OPTIMISED, link=("-shared",), more_sources=()):
    """Compile each unit with its instruction set's flags and link; what cannot be compiled is left out."""
    compiler = find_compiler()
    sets = INSTRUCTION_SETS.get(architecture(compiler), {})
    optional = [name for name in sets if name != "isa_portable"]
    units = [SOURCES / f"{name}.cpp" for name in ("isa_portable", *optional, "api", "workspace")]
    with tempfile.TemporaryDirectory() as folder:
        openmp = OPENMP if links_openmp(compiler, folder) else []  # without it one thread does the work

        def compile_unit(source):
            flags = [
                *FLAGS,
                *options,
                *sets.get(source.stem, ()),
                *(openmp if source.stem == "api" else ()),
            ]
            result = Path(folder, f"{source.stem}.o")
            command = [*compiler, *flags, "-I", SOURCES, "-c", source, "-o", result]
            if run(command, check=source.stem not in optional).returncode:
                print(f"sparse_attn: {compiler[0]} cannot compile {source.stem}, left out", file=sys.stderr)
            return result

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_unit, [*units, *map(Path, more_sources)]))
        run([*compiler, *options, *link, *filter(Path.exists, objects), *openmp, "-o", target])


def architecture(compiler):
    """The architecture that the compiler builds for; a cross compiler's is not this machine's."""
    return run([*compiler, "-dumpmachine"]).stdout.split("-")[0]


def links_openmp(compiler, folder):
    source = Path(folder, "openmp.cpp")
    source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() == 0; }\n")
    return run([*compiler, *OPENMP, source, "-o", Path(folder, "openmp")], check=False).returncode == 0


def find_compiler():
    wanted = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or ""
    for command in (shlex.split(wanted), ["c++"], ["g++"], ["clang++"]):
        if command and shutil.which(command[0]):
            return command
    raise OSError("no C++ compiler was found (set CXX, or install g++ or clang)")


def run(command, check=True):
    return subprocess.run([str(part) for part in command], check=check, capture_output=True, text=True)


if __name__ == "__main__":
    setup(
        packages=[
            *find_packages(include=["sparse_attn", "sparse_attn.*"]),
            "sparse_attn.kernels",
            *(f"sparse_attn.kernels.{name}" for name in find_packages("kernels")),
        ],
        package_dir={"sparse_attn.kernels": "kernels"},
        ext_modules=[Extension("sparse_attn._native", [str(p) for p in sorted(SOURCES.glob("*.cpp"))])],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
    )
