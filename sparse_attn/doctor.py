"""What this machine has, what each op runs on here and why, and whether the ops are right.

``sparse-attn doctor`` prints it; ``sparse-attn doctor --json`` for other programs.
"""

import functools
import importlib.util
import os
import platform
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import formats, ops
from . import reference as exact
from ._version import __version__
from .ops import attention, index, writers
from .ops.backends import native
from .testing import (
    assert_close,
    assert_logits_close,
    gqa_inputs,
    index_inputs,
    mla_inputs,
    to_pages,
)

Check = Callable[[str, torch.device], None]

CPU_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "amx_tile", "amx_bf16")
# Instruction set of the CPU kernels -> the processor's features that it needs, the best set first.
NEEDED = {
    "amx": {"amx_bf16", "avx512_bf16", "avx512bw"},
    "avx512": {"avx512bw", "avx512dq", "avx512vl"},
    "avx2": {"avx2", "fma", "f16c"},
}
OLDEST_GPU = 80
OPT_IN = {"sparse_mla_hopper": 'sm_90 only, opt-in by variant="warp_specialized", has never run on a GPU'}


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
    cuda = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    found = {
        "sparse_attn": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
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
        "devices": {"cpu": processor(), **{str(device): _gpu(device) for device in cuda}},
        "ops": {},
        "kernels": {},
        "problems": problems,
    }
    problems += _cpu_problems(found, flags) + _cuda_problems(found, bool(cuda))
    usable = [device for device in cuda if found["triton"] and _architecture(device) >= OLDEST_GPU]
    for device in (torch.device("cpu"), *usable):
        for name in ops.RECORDS:
            if device.type == "cuda" or name not in OPT_IN:
                found["ops"].setdefault(name, {})[str(device)] = _op(name, device, problems)
    if found["triton"]:
        for architecture in sorted({*map(_architecture, usable), *architectures}):
            found["kernels"][f"sm_{architecture}"] = configurations(architecture)
    return found


def configurations(architecture: int) -> dict[str, dict[str, Any]]:
    """Op -> name of a table of kernels/configs.py -> what it gives ``architecture`` (90 is sm_90)."""
    from .kernels import configs  # needs Triton

    found: dict[str, dict[str, Any]] = {}
    for name in ops.RECORDS:
        if name in OPT_IN or name in ops.COMPOSED:
            continue
        tables = configs.TABLES.get(name, {})
        entries = {key: configs.nearest(table, architecture) for key, table in tables.items()}
        found[name] = {key: _entry(entry) for key, entry in entries.items() if entry is not None}
    return found


def _entry(entry: Any) -> dict[str, Any]:
    if isinstance(entry, dict):  # by heads per program
        return {str(heads): config._asdict() for heads, config in entry.items()}
    return entry._asdict()


def processor() -> str:
    for line in _cpuinfo().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_flags() -> set[str]:
    for line in _cpuinfo().splitlines():
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].split())
    return set()


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def _version(package: str) -> str | None:
    return metadata.version(package) if importlib.util.find_spec(package) else None


def _compiler() -> str | None:
    """The first line that the C++ compiler says of itself; it matters only when sparse_attn is installed."""
    path = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
    if path is None:
        return None
    said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout.splitlines()
    return f"{path}: {said[0]}" if said else path


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpu(device: torch.device) -> str:
    return f"{torch.cuda.get_device_name(device)}, sm_{_architecture(device)}"


def _architecture(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _cpu_problems(found: dict[str, Any], flags: set[str]) -> list[str]:
    problems = []
    if found["instruction_set"]:
        if not found["openmp"]:
            problems.append(
                "The CPU kernels were built without OpenMP and run on one thread; install a compiler with "
                "OpenMP and then sparse_attn again."
            )
        best = next((name for name, needed in NEEDED.items() if needed <= flags), None)
        if best and best not in found["instruction_sets"]:
            problems.append(
                f"This processor has {best}, but the CPU kernels do not run it: the compiler that built them "
                "did not know it, or the system forbids it. Install sparse_attn again with a newer compiler "
                "(GCC 13 or Clang 17 know all of them)."
            )
    if found["threads"] > found["cores"]:
        problems.append(
            f"torch uses {found['threads']} threads on {found['cores']} cores, so they wait for each other: "
            f"set OMP_NUM_THREADS={found['cores']}."
        )
    return problems


def _cuda_problems(found: dict[str, Any], present: bool) -> list[str]:
    problems = []
    if not present and shutil.which("nvidia-smi"):
        problems.append(
            "There is an NVIDIA driver, but torch finds no GPU: "
            + (
                f"check that nvidia-smi lists one and that its driver supports CUDA {found['cuda']}."
                if found["cuda"]
                else "this torch was built without CUDA; install a CUDA build."
            )
        )
    for name, words in found["devices"].items():
        if name == "cpu":
            continue
        if found["triton"] is None:
            problems.append(f"Triton is not installed, so nothing runs on {name}: pip install triton")
        if _architecture(torch.device(name)) < OLDEST_GPU:
            problems.append(f"{name} ({words}) is older than sm_{OLDEST_GPU}, which the Triton kernels need.")
    return problems


def _op(name: str, device: torch.device, problems: list[str]) -> dict[str, Any]:
    """What runs it and why, and whether small hostile cases come out right; None where that is not tried."""
    runs_on, why = _implementation(name, device)
    if name in OPT_IN:
        return {"runs_on": runs_on, "why": OPT_IN[name], "right": None}
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


def _on(device: torch.device, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.to(device) for name, x in inputs.items()}


def _check_index(name: str, backend: str, device: torch.device) -> None:
    inputs = index_inputs(4, 300, 16, 64)
    here = _on(device, inputs)
    ranges = here["ks"], here["ke"]
    logits = index.index_logits(**here, backend=backend)
    if name == "index_logits":
        return assert_logits_close(logits, **inputs)
    if name == "select_topk":
        chosen = index.select_topk(logits, 32, *ranges, backend=backend)
    else:
        chosen = index.lightning_topk(**here, topk=32, backend=backend)
    _equal(chosen, exact.select_topk(logits.cpu(), 32, inputs["ks"], inputs["ke"]), "the selection")


def _check_slots(backend: str, device: torch.device) -> None:
    _, table = to_pages(torch.zeros(40, 1), 16)
    indices = torch.tensor([[0, 39, -1, 47, 48, 2**31 - 1]], dtype=torch.int32)
    slots = index.physical_slots(indices.to(device), table.to(device), 16, backend=backend)
    _equal(slots, exact.physical_slots(indices, table, 16), "a slot")


def _check_mla(backend: str, device: torch.device) -> None:
    inputs = mla_inputs(3, 40, 20, 16, 576, dtype=torch.bfloat16)
    _check_attention(attention.sparse_mla, backend, device, inputs)
    packed = formats.pack_v32_kv(inputs["kv"].nan_to_num()[:, None])
    kv = formats.unpack(packed, torch.float64)[:, 0]
    _check_attention(attention.sparse_mla, backend, device, {**inputs, "kv": packed}, {"kv": kv})


def _check_gqa(backend: str, device: torch.device) -> None:
    inputs = gqa_inputs(3, 40, 8, 2, 16, 64, 64, dtype=torch.bfloat16)
    _check_attention(attention.sparse_gqa, backend, device, inputs)


def _check_attention(
    function: Callable,
    backend: str,
    device: torch.device,
    inputs: dict[str, Tensor],
    values: dict[str, Tensor] | None = None,  # what quantised inputs hold
) -> None:
    out, lse = function(**_on(device, inputs), return_lse=True, backend=backend)
    wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()} | (values or {})
    expected, expected_lse = function(**wide, return_lse=True, backend="reference")
    assert_close(out.cpu(), expected, 1.5)
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=1e-4, atol=1e-4)


def _check_merge(backend: str, device: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    outs, lses = torch.randn(3, 4, 8, 64, generator=g), torch.randn(3, 4, 8, generator=g)
    lses[0] = float("-inf")  # an empty part, whose output nobody reads
    outs[0] = float("nan")
    lses[:, 1] = float("-inf")
    merged, lse = attention.merge_attention(outs.to(device), lses.to(device), backend=backend)
    expected, expected_lse = exact.merge_attention(outs.double(), lses.double())
    assert_close(merged.cpu(), expected)
    assert_close(lse.cpu(), expected_lse)


SLOTS = torch.tensor([5, -1, 0, 31, 2**31 - 1])  # the second and the last do not exist


def _check_writer(name: str, backend: str, device: torch.device) -> None:
    pack = formats.pack_v32_kv if name == "write_kv" else formats.pack_index_k
    rows = torch.randn(5, 576 if name == "write_kv" else 128, generator=torch.Generator().manual_seed(0))
    cache = pack(torch.zeros(1, 32, rows.shape[1]))
    written, options = cache.to(device, copy=True), {} if name == "write_kv" else {"hadamard": False}
    getattr(writers, name)(rows.to(device), written, SLOTS.to(device), **options, backend=backend)
    expected, packed = formats.views(cache), formats.views(pack(rows[None]))
    for part, source in zip(expected, packed, strict=True):
        part[0, [5, 0, 31]] = source[0, [0, 2, 3]]
    _equal(written, cache, "a byte of the cache")


def _check_index_q(backend: str, device: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    q, weights = torch.randn(3, 4, 128, generator=g), torch.randn(3, 4, generator=g)
    packed, scaled = writers.quantise_index_q(
        q.to(device), weights.to(device), hadamard=False, backend=backend
    )
    keys, scales = formats.index_k_views(formats.pack_index_k(q))
    _equal(packed.view(torch.uint8), keys.view(torch.uint8), "a byte")
    torch.testing.assert_close(scaled.cpu(), weights * scales)


def _equal(actual: Tensor, expected: Tensor, what: str) -> None:
    if not torch.equal(actual.cpu(), expected):
        raise AssertionError(f"{what} differs from the reference's")


CHECKS: dict[str, Check] = {
    **{n: functools.partial(_check_index, n) for n in ("index_logits", "select_topk", "lightning_topk")},
    "physical_slots": _check_slots,
    "sparse_mla": _check_mla,
    "sparse_gqa": _check_gqa,
    "merge_attention": _check_merge,
    **{n: functools.partial(_check_writer, n) for n in ("write_kv", "write_index_k")},
    "quantise_index_q": _check_index_q,
}


def show(found: dict[str, Any]) -> None:
    """Print what :func:`examine` found."""
    built_for = f"CUDA {found['cuda']}" if found["cuda"] else "the CPU only"
    versions = ("sparse_attn", "python", "torch", "triton", "transformers")
    facts = {
        "versions": ", ".join(f"{name} {found[name] or 'not installed'}" for name in versions),
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
    verdicts = {True: "right", False: "WRONG", None: "not tried"}
    for name, by_device in found["ops"].items():
        for device, op in by_device.items():
            print(f"{name:18} {device:8} {op['runs_on']:18} {verdicts[op['right']]}")
    print()
    reasons: dict[str, list[str]] = {}
    for name, by_device in found["ops"].items():
        for op in by_device.values():
            reasons.setdefault(f"{op['runs_on']}, {op['why']}.", []).append(name)
    for reason, names in reasons.items():
        print(f"{', '.join(dict.fromkeys(names))}: {reason}")
    for architecture, kernels in found["kernels"].items():
        print(
            f"\nTriton kernels on {architecture}, and heads a program where the configuration depends on them"
        )
        for name, tables in kernels.items():
            for table, entry in tables.items():
                by_heads = entry if isinstance(next(iter(entry.values())), dict) else {"": entry}
                for heads, config in by_heads.items():
                    values = ", ".join(
                        f"{key} {value}" for key, value in config.items() if value is not False
                    )
                    print(f"{name:18} {table:13} {heads:>3}  {values}")
            if not tables:
                print(f"{name:18} one configuration on every architecture")
        for name, words in OPT_IN.items():
            print(f"{name:18} {words}")
    print()
    for problem in found["problems"]:
        print(f"Problem: {problem}")
    if not found["problems"]:
        print("No problems found.")
    if not any("cuda" in device for device in found["devices"]):
        print("There is no CUDA device here, so the Triton kernels were not tried.")
