"""Do a module's functions compute what those of FlashMLA or DeepGEMM do? ::

    python -m sparse_attn.testing.conformance --flash-mla flash_mla --deep-gemm deep_gemm --device cuda

Each argument names a module to import that has the library's functions; this library's own are
``sparse_attn.compat.flash_mla`` and ``sparse_attn.compat.deep_gemm``. Every check calls the module with
hostile inputs and compares with the fp64 reference; the exit status says whether all passed. ``--upstream``
leaves out the checks that ask for more than the library itself promises (other sizes, NaN in unused slots,
further formats). ``--prove`` first shows that each check can fail, on wrong variants of the module.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

import torch

from . import deep_gemm, flash_mla
from .wrong import deep_gemm as wrong_deep_gemm
from .wrong import flash_mla as wrong_flash_mla

Check = Callable[[ModuleType, str], None]
LIBRARIES = {"flash_mla": flash_mla, "deep_gemm": deep_gemm}
VARIANTS = {"flash_mla": wrong_flash_mla.VARIANTS, "deep_gemm": wrong_deep_gemm.VARIANTS}


def checks(library: str, upstream: bool = False) -> Sequence[Check]:
    """The checks of "flash_mla" or "deep_gemm"; with ``upstream`` those that the library itself passes."""
    module = LIBRARIES[library]
    return module.CHECKS if upstream else module.CHECKS + module.BEYOND


def failure(check: Check, module: ModuleType, device: str = "cpu") -> str | None:
    """What is wrong with ``module`` by one check, or None."""
    try:
        with torch.no_grad():
            check(module, device)
    except Exception as error:  # the module under test may fail in any way
        return f"{type(error).__name__}: {error}".strip()
    return None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sparse_attn.testing.conformance", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--flash-mla", metavar="MODULE", help="a module with FlashMLA's functions")
    parser.add_argument("--deep-gemm", metavar="MODULE", help="a module with DeepGEMM's functions")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--upstream", action="store_true", help="only what the library itself promises")
    parser.add_argument("--prove", action="store_true", help="show that each check can fail")
    arguments = parser.parse_args(argv)
    chosen = {name: getattr(arguments, name) for name in LIBRARIES if getattr(arguments, name)}
    if not chosen:
        parser.error("expected --flash-mla MODULE, --deep-gemm MODULE or both")
    failed = 0
    for library, name in chosen.items():
        module = importlib.import_module(name)
        print(f"{name} as {library} on {arguments.device}")
        if arguments.prove:
            failed += _prove(library, module, arguments.device)
        for check in checks(library, arguments.upstream):
            said = failure(check, module, arguments.device)
            failed += said is not None
            print(f"  {'pass' if said is None else 'FAIL'}  {_words(check.__name__)}")
            if said:
                print(f"        {check.__doc__}\n        {said.splitlines()[0]}")
    print(f"{failed} failed" if failed else "all passed")
    return 1 if failed else 0


def _prove(library: str, module: ModuleType, device: str) -> int:
    """How many of the wrong variants a check lets pass."""
    missed = 0
    by_name = {check.__name__: check for check in checks(library)}
    for variant in VARIANTS[library]:
        caught = failure(by_name[variant.check], variant.of(module), device)
        missed += caught is None
        print(f"  {'caught' if caught else 'MISSED'}  {variant.name}, by: {_words(variant.check)}")
    return missed


def _words(name: str) -> str:
    return name.replace("_", " ")


if __name__ == "__main__":
    sys.exit(main())
