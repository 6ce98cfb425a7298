"""What this machine has, what each op runs on here and why, and whether the ops are right.

``sparse-attn doctor`` prints it; ``sparse-attn doctor --json`` for other programs.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import time
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import ops
from ._version import __version__
from .integrations import vllm
from .ops.backends import native
from .testing.self_check import CHECKS

CPU_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "amx_tile", "amx_bf16")
# Instruction set of the CPU kernels -> the processor's features that it needs, the best set first.
NEEDED = {
    "amx": {"amx_bf16", "avx512_bf16", "avx512bw"},
    "avx512": {"avx512bw", "avx512dq", "avx512vl"},
    "avx2": {"avx2", "fma", "f16c"},
}
OLDEST_GPU = 80


def examine(architectures: tuple[int, ...] = ()) -> dict[str, Any]:
    """Facts by name; ``problems`` holds a sentence for each thing that should be otherwise.

    Args:
        architectures: GPUs that are not here, 90 for sm_90, for which the kernels' configurations are to be
            listed beside those of the CUDA devices.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        native.available()
    problems = [str(warning.message) for warning in caught]
    flags = cpu_flags()
    cuda = _gpus()
    gpus = {str(d): f"{torch.cuda.get_device_name(d)}, sm_{_architecture(d)}" for d in cuda}
    found = {
        "sparse_attn": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "vllm": _vllm(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cpu_features": [name for name in CPU_FEATURES if name in flags],
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "instruction_set": native.instruction_set(),
        "instruction_sets": native.instruction_sets(),
        "openmp": native.has_openmp(),
        "compiler": _compiler(),
        "cuda": torch.version.cuda,
        "devices": {"cpu": processor(), **gpus},
        "ops": {},
        "kernels": {},
        "problems": problems,
    }
    problems += _problems(found, flags, cuda)
    usable = usable_gpus()
    for device in (torch.device("cpu"), *usable):
        for name in ops.RECORDS:
            found["ops"].setdefault(name, {})[str(device)] = _op(name, device, problems)
    if found["triton"]:
        # Needs Triton. The folder is mapped by setup.py, which no type checker reads.
        from .kernels import configs  # pyright: ignore[reportMissingImports]

        kernels = [name for name in ops.RECORDS if name not in ops.COMPOSED]
        for architecture in sorted({*map(_architecture, usable), *architectures}):
            chosen = {name: configs.chosen(name, architecture) for name in kernels}
            found["kernels"][f"sm_{architecture}"] = chosen
    return found


def processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> set[str]:
    return set(_cpuinfo("flags").split())


def _cpuinfo(field: str) -> str:
    """Of the first processor; empty where the system does not say it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")


def _version(package: str) -> str | None:
    return metadata.version(package) if importlib.util.find_spec(package) else None


def _vllm() -> str | None:
    """The release that is installed, and whether it loads the plug-in of this package."""
    release = vllm.installed_vllm()
    if release is None:
        return None
    allowed = os.environ.get("VLLM_PLUGINS")
    named = any(entry.name == "sparse_attn" for entry in metadata.entry_points(group=vllm.ENTRY_POINTS))
    if not named:
        return f"{release}, which does not find the plug-in: sparse_attn is on the path but not installed"
    if allowed is not None and "sparse_attn" not in allowed.split(","):
        return f"{release}, which does not load the plug-in: VLLM_PLUGINS={allowed}"
    return vllm.refusal() or f"{release}, which finds the plug-in"


def _compiler() -> str | None:
    """The first line that the C++ compiler says of itself; it matters only when sparse_attn is installed."""
    path = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
    if path is None:
        return None
    said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout.splitlines()
    return f"{path}: {said[0]}" if said else path


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_gpus() -> list[torch.device]:
    """The CUDA devices that the Triton kernels run on."""
    return [device for device in _gpus() if _version("triton") and _architecture(device) >= OLDEST_GPU]


def _gpus() -> list[torch.device]:
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]


def _architecture(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _problems(found: dict[str, Any], flags: set[str], cuda: list[torch.device]) -> Iterator[str]:
    best = next((name for name, needed in NEEDED.items() if needed <= flags), None)
    if found["instruction_set"] and not found["openmp"]:
        yield (
            "The CPU kernels were built without OpenMP and run on one thread; install a compiler with OpenMP "
            "and then sparse_attn again."
        )
    if found["instruction_set"] and best and best not in found["instruction_sets"]:
        yield (
            f"This processor has {best}, but the CPU kernels do not run it: the compiler that built them did "
            "not know it, or the system forbids it. Install sparse_attn again with a newer compiler (GCC 13 "
            "or Clang 17 know all of them)."
        )
    if found["threads"] > found["cores"]:
        yield (
            f"torch uses {found['threads']} threads on {found['cores']} cores, so they wait for each other: "
            f"set OMP_NUM_THREADS={found['cores']}."
        )
    if not cuda and shutil.which("nvidia-smi"):
        remedy = "this torch was built without CUDA; install a CUDA build."
        if found["cuda"]:
            remedy = f"check that nvidia-smi lists one and that its driver supports CUDA {found['cuda']}."
        yield f"There is an NVIDIA driver, but torch finds no GPU: {remedy}"
    for device in cuda:
        if found["triton"] is None:
            yield f"Triton is not installed, so nothing runs on {device}: pip install triton"
        if _architecture(device) < OLDEST_GPU:
            words = found["devices"][str(device)]
            yield f"{device} ({words}) is older than sm_{OLDEST_GPU}, which the Triton kernels need."


def _op(name: str, device: torch.device, problems: list[str]) -> dict[str, Any]:
    """What runs it and why, and whether small hostile cases come out right."""
    runs_on, why = _implementation(name, device)
    start = time.perf_counter()
    try:
        CHECKS[name]("triton" if device.type == "cuda" else "cpu", device)
        right = True
    except Exception as error:  # whatever it is, the user is to read it
        right = False
        wrong = "is wrong" if isinstance(error, AssertionError) else "does not run"
        problems.append(f"{name} on {device} {wrong}: {type(error).__name__}: {error}")
    return {"runs_on": runs_on, "why": why, "right": right, "seconds": round(time.perf_counter() - start, 3)}


def _implementation(name: str, device: torch.device) -> tuple[str, str]:
    if device.type == "cuda":
        return "triton", "the only backend of CUDA tensors"
    if not hasattr(native, name):
        return "torch", "as it has no C++ form: there is little to compute"
    if not native.available():
        return "torch", "as the C++ kernels are not in use"
    best, used = native.instruction_sets()[0], native.instruction_set()
    slower = f"; {best} runs here too but is slower on this processor" if used != best else ""
    takes = "fp32" if name == "select_topk" else "bf16, fp16, fp32 and quantised caches"
    return f"C++ ({used})", f"for {takes}, the last dimension contiguous; torch for the rest{slower}"


def show(found: dict[str, Any]) -> None:
    """Print what :func:`examine` found."""
    built_for = f"CUDA {found['cuda']}" if found["cuda"] else "the CPU only"
    versions = ("sparse_attn", "python", "torch", "triton", "transformers")
    facts = {
        "versions": ", ".join(f"{name} {found[name] or 'not installed'}" for name in versions),
        "vLLM": found["vllm"] or "not installed",
        "system": f"{found['system']}, {found['threads']} torch threads on {found['cores']} cores",
        "processor": f"{found['processor']} ({' '.join(found['cpu_features']) or 'no feature of use'})",
        "CPU kernels": f"{found['instruction_set'] or 'not in use'} "
        f"(built and supported: {', '.join(found['instruction_sets']) or 'none'}; "
        f"OpenMP: {'yes' if found['openmp'] else 'no'})",
        "compiler": found["compiler"] or "none",
        "CUDA": "; ".join(f"{name}: {words}" for name, words in found["devices"].items() if name != "cpu")
        or f"no device; torch was built for {built_for}",
    }
    for name, value in facts.items():
        print(f"{name:12} {value}")
    print()
    verdicts = {True: "right", False: "WRONG"}
    reasons: dict[str, list[str]] = {}
    for name, by_device in found["ops"].items():
        for device, op in by_device.items():
            print(f"{name:18} {device:8} {op['runs_on']:18} {verdicts[op['right']]}")
            reasons.setdefault(f"{op['runs_on']}, {op['why']}.", []).append(name)
    print()
    for reason, names in reasons.items():
        print(f"{', '.join(dict.fromkeys(names))}: {reason}")
    for arch, kernels in found["kernels"].items():
        print(f"\nTriton kernels on {arch}, and heads per program where the configuration depends on them")
        for name, tables in kernels.items():
            for table, entry in tables.items():
                by_heads = entry if isinstance(next(iter(entry.values())), dict) else {"": entry}
                for heads, config in by_heads.items():
                    values = (f"{key} {value}" for key, value in config.items() if value is not False)
                    print(f"{name:18} {table:13} {heads:>3}  {', '.join(values)}")
            if not tables:
                print(f"{name:18} one configuration on every architecture")
    print()
    for problem in found["problems"]:
        print(f"Problem: {problem}")
    if not found["problems"]:
        print("No problems found.")
    if len(found["devices"]) == 1:
        print("There is no CUDA device here, so the Triton kernels were not tried.")
