"""What this machine has, what each op runs on here and why, and whether the ops are right.

``sparse-attn doctor`` prints it; ``sparse-attn doctor --json`` for other programs.
"""

import functools
import importlib.util
import os
import platform
import shutil
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from . import native, ops
from . import reference as exact
from ._version import __version__
from .testing import assert_close, gqa_inputs, index_inputs, mla_inputs

Check = Callable[[str, torch.device], None]


def examine() -> dict[str, Any]:
    """Facts by name; ``problems`` holds a sentence for each thing that should be otherwise."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        native.available()
    problems = [str(warning.message) for warning in caught]
    if native.available() and not native.has_openmp():
        problems.append(
            "The CPU kernels were built without OpenMP and run on one thread; install a compiler with OpenMP "
            "and then sparse_attn again."
        )
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    found = {
        "sparse_attn": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "instruction_set": native.instruction_set(),
        "instruction_sets": native.instruction_sets(),
        "openmp": native.has_openmp(),
        "compiler": next(
            filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None
        ),
        "devices": [_device(device) for device in devices],
        "ops": {},
        "problems": problems,
    }
    for device in devices:
        backend = "triton" if device.type == "cuda" else "cpu"
        if backend == "triton" and found["triton"] is None:
            problems.append(f"Triton is not installed, so nothing runs on {device}: pip install triton")
            continue
        for name in ops.SCHEMAS:
            if backend == "cpu" and name in ops.TRITON_ONLY:
                continue
            found["ops"].setdefault(name, {})[str(device)] = _op(name, backend, device, problems)
    return found


def _version(package: str) -> str | None:
    return metadata.version(package) if importlib.util.find_spec(package) else None


def _compiler() -> str | None:
    found = map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))
    return next(filter(None, found), None)


def _device(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu: {platform.processor() or platform.machine()}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{device}: {torch.cuda.get_device_name(device)}, sm_{major}{minor}"


def _op(name: str, backend: str, device: torch.device, problems: list[str]) -> dict[str, Any]:
    """What runs it, and whether a small hostile case comes out right; None where there is no such case."""
    if backend == "triton":
        runs_on = "triton"
    else:
        runs_on = (
            f"C++ ({native.instruction_set()})" if native.available() and hasattr(native, name) else "torch"
        )
    check = CHECKS.get(name)
    if check is None:
        return {"runs_on": runs_on, "right": None}
    start = time.perf_counter()
    try:
        check(backend, device)
        right = True
    except Exception as error:  # whatever it is, the user is to read it
        right = False
        problems.append(f"{name} on {device} is wrong: {type(error).__name__}: {error}")
    return {"runs_on": runs_on, "right": right, "seconds": round(time.perf_counter() - start, 3)}


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


def _check_attention(name: str, backend: str, device: torch.device) -> None:
    if name == "sparse_mla":
        i = mla_inputs(3, 40, 20, 16, 576, dtype=torch.bfloat16)
        tensors, d_v, options = (i["q"], i["kv"], i["indices"]), (512,), (None,) * 5
    else:
        i = gqa_inputs(3, 40, 8, 2, 16, 64, 64, dtype=torch.bfloat16)
        tensors, d_v, options = (i["q"], i["k"], i["v"], i["indices"]), (), (None,) * 2
    out = torch.empty(3, i["q"].shape[1], d_v[0] if d_v else 64, dtype=torch.bfloat16, device=device)
    wide = tuple(x.double() if x.is_floating_point() else x for x in tensors)
    expected, *expected_logits = getattr(exact, name)(*wide, *d_v, 0.1, *options)
    logits = [torch.empty(out.shape[:2], device=device) for _ in expected_logits]
    _run(name, backend, device, (*tensors, *d_v, 0.1, *options), (out, *logits))
    assert_close(out.cpu(), expected)
    for actual, right in zip(logits, expected_logits, strict=True):  # lse, and of sparse_mla max_logits
        torch.testing.assert_close(actual.cpu().double(), right, rtol=1e-5, atol=1e-5)


CHECKS: dict[str, Check] = {
    **{n: functools.partial(_check_index, n) for n in ("index_logits", "select_topk", "lightning_topk")},
    **{n: functools.partial(_check_attention, n) for n in ("sparse_mla", "sparse_gqa")},
}


def show(found: dict[str, Any]) -> None:
    """Print what :func:`examine` found."""
    facts = {
        "versions": ", ".join(
            f"{name} {found[name] or 'not installed'}"
            for name in ("sparse_attn", "python", "torch", "triton", "transformers")
        ),
        "system": f"{found['system']}, {found['threads']} torch threads",
        "CPU kernels": f"{found['instruction_set'] or 'not in use'} "
        f"(built and supported: {', '.join(found['instruction_sets']) or 'none'}; "
        f"OpenMP: {'yes' if found['openmp'] else 'no'}; compiler: {found['compiler'] or 'none'})",
        "devices": "; ".join(found["devices"]),
    }
    for name, value in facts.items():
        print(f"{name:12} {value}")
    print()
    words = {True: "right", False: "WRONG", None: "not checked here"}
    for name, by_device in found["ops"].items():
        for device, op in by_device.items():
            print(f"{name:18} {device:8} {op['runs_on']:18} {words[op['right']]}")
    print()
    for problem in found["problems"]:
        print(f"Problem: {problem}")
    if not found["problems"]:
        print("No problems found.")
    if not any("cuda" in device for device in found["devices"]):
        print("There is no CUDA device here, so the Triton kernels were not tried.")
