"""Operations: each is a record of its arguments, a ``torch.library`` op, and one implementation per backend.

A record is a NamedTuple: required inputs, what the op fills, then optional inputs with defaults. The schema
is made from it, and every implementation takes it. :mod:`.index`, :mod:`.attention` and :mod:`.writers` hold
the records beside their public functions. An op returns nothing, so one schema serves plain calls, ``out=``,
CUDA graphs and ``torch.compile``. Implementations are imported at their first call.
"""

import functools
import importlib
import os
import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from .backends import native
from .backends import torch as torch_backend
from .records import run_reference, schema

DISPATCH_KEYS = {"cpu": "CPU", "triton": "CUDA"}
BACKENDS = ("auto", "reference", *DISPATCH_KEYS)

RECORDS: dict[str, Any] = {}  # op -> its record
COMPOSED: dict[str, Callable[..., None]] = {}  # op -> what makes it of other ops, on a given backend
_OPS: dict[str, Callable[..., None]] = {}


def _namespace(package: str) -> str:
    """An identifier for a copy of this package, which torch.library and transformers have to tell apart.

    Loaders give copies names of their own, identifiers or not. Two names never become the same.
    """
    if package.isascii() and package.isidentifier():
        return package
    return "_" + re.sub("[^A-Za-z0-9]", lambda sign: f"_{ord(sign[0]):x}_", package)


NAMESPACE = _namespace(__name__.rpartition(".")[0])  # "sparse_attn", unless a loader called it otherwise


class Refused(TypeError, ValueError):
    """The backend that was asked for cannot do this. It is both, as the reason may be a dtype or a shape."""


Record = TypeVar("Record", bound=type)


def register(
    name: str,
    *,
    composed: Callable[..., None] | None = None,
) -> Callable[[Record], Record]:
    """Make a record the op ``name``.

    Args:
        composed: ``composed(a, backend)`` runs the op where a backend has no implementation of its own.
    """

    def define(record: Record) -> Record:
        RECORDS[name] = record
        if composed is not None:
            COMPOSED[name] = composed
        op = f"{NAMESPACE}::{name}"
        torch.library.define(op, schema(record), tags=torch.Tag.pt2_compliant_tag)
        torch.library.register_fake(op, lambda *args: _fake(name, record(*args)))
        for backend in DISPATCH_KEYS:
            run = functools.partial(_run_record, name, record, backend)
            torch.library.impl(op, DISPATCH_KEYS[backend], run)
        _OPS[name] = getattr(getattr(torch.ops, NAMESPACE), name).default
        return record

    return define


def _run_record(name: str, record: type, backend: str, *args: Any) -> None:
    implementation(name, backend)(record(*args))


def _fake(name: str, a: Any) -> None:
    """Outputs come from the caller, so there is nothing to make; what cannot run is refused while tracing."""
    if a[0].device.type == "cuda" and name not in COMPOSED:
        _check_triton(name, a)


def call(name: str, a: Any, backend: str) -> None:
    """Run op ``name`` on the record ``a``, whose first field is a tensor on the device to run on."""
    if backend == "reference":
        run_reference(name, a)
    elif backend == "triton" and a[0].device.type == "cpu":  # Triton's interpreter
        implementation(name, "triton")(a)
    else:
        _OPS[name](*a)


@functools.cache
def implementation(name: str, backend: str) -> Callable[[Any], None]:
    """What runs op ``name`` on ``backend`` ("cpu" or "triton"), a function of its record."""
    composed = functools.partial(COMPOSED[name], backend=backend) if name in COMPOSED else None
    if backend == "triton":
        return composed or functools.partial(_run_triton, name)
    serve = getattr(torch_backend, name, None) or composed or functools.partial(run_reference, name)
    in_cpp = getattr(native, name, None)
    if in_cpp is None:
        return serve

    def run(a: Any) -> None:
        a = native.without_gaps(a)
        (serve if native.refuses(name, a) else in_cpp)(a)

    return run


def _run_triton(name: str, a: Any) -> None:
    _check_triton(name, a)
    getattr(_kernel(name), name)(a)


def _check_triton(name: str, a: Any) -> None:
    if reason := _kernel(name).refuses(a):
        raise Refused(reason)


@functools.cache
def _kernel(name: str) -> Any:
    return importlib.import_module(f"..kernels.{name}", __name__)


def check_backend(backend: str, device: torch.device) -> None:
    """Raise ValueError unless ``backend`` can run tensors on ``device``."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "reference":
        return
    if backend == "auto" and device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"backend: 'auto' runs on cpu and cuda tensors, got tensors on {device}; "
            "backend='reference' runs on any device, slowly"
        )
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend: 'cpu' needs cpu tensors, got tensors on {device}")
    if backend == "triton" and device.type != "cuda" and not _interpreting(device):
        raise ValueError(
            f"backend: 'triton' needs cuda tensors, got tensors on {device} "
            "(cpu tensors need Triton's interpreter: set TRITON_INTERPRET=1 before triton is imported)"
        )


def _interpreting(device: torch.device) -> bool:
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
