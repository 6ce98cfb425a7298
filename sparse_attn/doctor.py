"""What this machine has, what each op runs on here and why, and whether the ops are right.

``sparse-attn doctor`` prints it; ``sparse-attn doctor --json`` for other programs.
"""

import functools
import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from . import formats, native, ops
from . import reference as exact
from ._version import __version__
from .bench.timing import cpu_flags, processor
from .testing import assert_close, gqa_inputs, index_inputs, mla_inputs, to_pages

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
        for name in ops.SCHEMAS:
            if device.type == "cuda" or name not in ops.TRITON_ONLY:
                found["ops"].setdefault(name, {})[str(device)] = _op(name, device, problems)
    if found["triton"]:
        for architecture in sorted({*map(_architecture, usable), *architectures}):
            found["kernels"][f"sm_{architecture}"] = configurations(architecture)
    return found


def configurations(architecture: int) -> dict[str, dict[str, Any]]:
    """Op -> name of a table in its kernel's file -> what that table gives ``architecture`` (90 is sm_90)."""
    found = {}
    for name in ops.SCHEMAS:
        if name in OPT_IN or importlib.util.find_spec(f"sparse_attn.kernels.{name}") is None:
            continue
        module = importlib.import_module(f"sparse_attn.kernels.{name}")
        tables = {key: table for key, table in vars(module).items() if key.startswith("CONFIGS")}
        entries = {key: _entry(table, architecture) for key, table in tables.items()}
        found[name] = {key: entry for key, entry in entries.items() if entry is not None}
    return found


def _entry(table: dict[int, Any], architecture: int) -> Any:
    """Of the nearest older architecture, as the launchers choose; None where there is none."""
    older = [a for a in table if a <= architecture]
    if not older:
        return None
    entry = table[max(older)]
    if isinstance(entry, dict):  # by heads a program
        return {str(heads): config._asdict() for heads, config in entry.items()}
    return entry._asdict()


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


def _run(name: str, backend: str, device: torch.device, inputs: tuple, outputs: tuple[Tensor, ...]) -> None:
    inputs = tuple(x.to(device) if isinstance(x, Tensor) else x for x in inputs)
    ops.call(name, backend, inputs, outputs)


def _check_index(name: str, backend: str, device: torch.device) -> None:
    i = index_inputs(4, 300, 16, 64, dtype=torch.float32)
    keys = i["q"], i["k"], i["weights"]
    ranges = i["ks"], i["ke"]
    logits = torch.empty(4, 300, device=device)
    _run("index_logits", backend, device, (*keys, *ranges, None, None, None), (logits,))
    if name == "index_logits":
        wide = tuple(x.double() for x in keys)
        return assert_close(logits.cpu(), exact.index_logits(*wide, *ranges))
    out = torch.empty(4, 32, dtype=torch.int32, device=device)
    if name == "select_topk":
        _run(name, backend, device, (logits, 32, *ranges), (out,))
    else:
        _run(name, backend, device, (*keys, 32, *ranges, None, None, None, 1 << 20), (out,))
    if not torch.equal(out.cpu(), exact.select_topk(logits.cpu(), 32, *ranges)):
        raise AssertionError("the selection differs from the reference's")


def _check_slots(backend: str, device: torch.device) -> None:
    _, table = to_pages(torch.zeros(40, 1), 16)
    indices = torch.tensor([[0, 39, -1, 47, 48, 2**31 - 1]], dtype=torch.int32)
    out = torch.empty(indices.shape, dtype=torch.int32, device=device)
    _run("physical_slots", backend, device, (indices, table, 16), (out,))
    if not torch.equal(out.cpu(), exact.physical_slots(indices, table, 16)):
        raise AssertionError("the slots differ from the reference's")


def _check_mla(backend: str, device: torch.device) -> None:
    i = mla_inputs(3, 40, 20, 16, 576, dtype=torch.bfloat16)
    for kv in (i["kv"], formats.pack_v32_kv(i["kv"].nan_to_num().float()[:, None])):
        _check_attention("sparse_mla", backend, device, (i["q"], kv, i["indices"], 512), 512)


def _check_gqa(backend: str, device: torch.device) -> None:
    i = gqa_inputs(3, 40, 8, 2, 16, 64, 64, dtype=torch.bfloat16)
    _check_attention("sparse_gqa", backend, device, (i["q"], i["k"], i["v"], i["indices"]), 64)


def _check_attention(name: str, backend: str, device: torch.device, inputs: tuple, d_v: int) -> None:
    q, options = inputs[0], (None,) * (5 if name == "sparse_mla" else 2)
    out = torch.empty(*q.shape[:2], d_v, dtype=q.dtype, device=device)
    wide = (x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
    expected, *expected_logits = getattr(exact, name)(*wide, 0.1, *options)
    logits = [torch.empty(q.shape[:2], device=device) for _ in expected_logits]
    _run(name, backend, device, (*inputs, 0.1, *options), (out, *logits))
    assert_close(out.cpu(), expected)
    for actual, right in zip(logits, expected_logits, strict=True):  # lse, and of sparse_mla max_logits
        torch.testing.assert_close(actual.cpu().double(), right, rtol=1e-5, atol=1e-5)


def _check_merge(backend: str, device: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    outs, lses = torch.randn(3, 4, 8, 64, generator=g), torch.randn(3, 4, 8, generator=g)
    lses[0] = float("-inf")  # an empty part, whose output nobody reads
    outs[0] = float("nan")
    lses[:, 1] = float("-inf")
    merged, lse = torch.empty(4, 8, 64, device=device), torch.empty(4, 8, device=device)
    _run("merge_attention", backend, device, (outs, lses), (merged, lse))
    expected, expected_lse = exact.merge_attention(outs.double(), lses.double())
    assert_close(merged.cpu(), expected)
    assert_close(lse.cpu(), expected_lse)


def _check_writer(name: str, width: int, pack: Callable[[Tensor], Tensor], backend: str, device) -> None:
    """Rows that are neither normalised nor turned must come out as the packer's bytes."""
    rows = torch.randn(8, width, generator=torch.Generator().manual_seed(0))
    slots = torch.tensor([3, 0, 1, 2, -1, 7, 6, 4], dtype=torch.int32)
    kept = slots >= 0
    values = torch.zeros(8, width)
    values[slots[kept].long()] = rows[kept]
    expected = pack(values.view(2, 4, width))
    cache = pack(torch.zeros(2, 4, width)).to(device)
    norm = (None, 1e-6) if name == "write_kv" else (None, None, 1e-6)
    hadamard = () if name == "write_kv" else (False,)
    options = (None, None, None, *hadamard, True, formats.FP8_MIN_SCALE)
    _run(name, backend, device, (rows, slots, *norm, *options), (cache,))
    if not torch.equal(cache.cpu(), expected):
        raise AssertionError("the bytes differ from the packer's")


def _check_index_q(backend: str, device: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    q, weights = torch.randn(3, 4, 128, generator=g), torch.randn(3, 4, generator=g)
    out = torch.empty(q.shape, dtype=torch.uint8, device=device)
    out_weights = torch.empty(3, 4, device=device)
    options = (None, None, None, False, True, formats.FP8_MIN_SCALE)
    _run("quantise_index_q", backend, device, (q, weights, *options), (out, out_weights))
    keys, scales = formats.index_k_views(formats.pack_index_k(q))
    if not torch.equal(out.cpu(), keys.view(torch.uint8)):
        raise AssertionError("the bytes differ from the packer's")
    torch.testing.assert_close(out_weights.cpu(), weights * scales)


CHECKS: dict[str, Check] = {
    **{n: functools.partial(_check_index, n) for n in ("index_logits", "select_topk", "lightning_topk")},
    "physical_slots": _check_slots,
    "write_kv": functools.partial(_check_writer, "write_kv", 576, formats.pack_v32_kv),
    "write_index_k": functools.partial(_check_writer, "write_index_k", 128, formats.pack_index_k),
    "quantise_index_q": _check_index_q,
    "sparse_mla": _check_mla,
    "sparse_gqa": _check_gqa,
    "merge_attention": _check_merge,
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
