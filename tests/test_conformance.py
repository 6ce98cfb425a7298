"""The conformance suite: this library passes it on every backend, and each of its checks can fail."""

import functools
import os
import sys
from types import ModuleType

import pytest

from sparse_attn.compat import deep_gemm, flash_mla
from sparse_attn.testing import conformance
from sparse_attn.testing import flash_mla as flash_mla_checks

MODULES = {"flash_mla": flash_mla, "deep_gemm": deep_gemm}
CHECKS = [(library, check) for library in MODULES for check in conformance.checks(library)]
VARIANTS = [(library, variant) for library in MODULES for variant in conformance.VARIANTS[library]]


@pytest.fixture
def on_backend(backend, monkeypatch):
    """The facades choose by device; within a test they run on one backend."""
    called = (flash_mla, "sparse_mla"), (flash_mla, "physical_slots"), (deep_gemm, "index_logits")
    for module, name in called:
        function = getattr(module, name)
        monkeypatch.setattr(module, name, functools.partial(function, backend=backend))
    if os.environ.get("TRITON_INTERPRET") == "1":  # slow, and small sizes test the same
        for name, size in {"H_Q": 5, "TOPK": 40}.items():
            monkeypatch.setattr(flash_mla_checks, name, size)
    return backend


@pytest.mark.parametrize("library, check", CHECKS, ids=lambda x: getattr(x, "__name__", x))
def test_it_conforms(on_backend, device, library, check):
    said = conformance.failure(check, MODULES[library], device)
    assert said is None, said


@pytest.mark.parametrize("library, variant", VARIANTS, ids=lambda x: getattr(x, "name", x))
def test_a_wrong_variant_is_caught(library, variant):
    check = {check.__name__: check for check in conformance.checks(library)}[variant.check]
    said = conformance.failure(check, variant.of(MODULES[library]))
    assert said is not None
    assert said.startswith(("AssertionError", "NotImplementedError")), said  # not an error of the wrapper


def test_every_check_can_fail():
    assert len(VARIANTS) >= 100
    shown = {(library, variant.check) for library, variant in VARIANTS}
    assert shown == {(library, check.__name__) for library, check in CHECKS}


def test_upstream_is_asked_for_less():
    for library in MODULES:
        theirs, all_of_them = (conformance.checks(library, upstream) for upstream in (True, False))
        assert set(theirs) < set(all_of_them)


def test_the_command_says_what_fails(monkeypatch, capsys):
    ours = ["--deep-gemm", "sparse_attn.compat.deep_gemm"]
    assert conformance.main([*ours, "--device", "cpu", "--prove"]) == 0
    said = capsys.readouterr().out
    assert "FAIL" not in said and "MISSED" not in said and said.endswith("all passed\n")

    wrong = next(variant for library, variant in VARIANTS if variant.name == "the end is seen too")
    module = ModuleType("a_port")
    vars(module).update(vars(wrong.of(deep_gemm)))
    monkeypatch.setitem(sys.modules, "a_port", module)
    assert conformance.main(["--deep-gemm", "a_port", "--device", "cpu", "--upstream"]) == 1
    said = capsys.readouterr().out
    assert "FAIL  mqa cleans what a query does not see" in said and "AssertionError: -inf: wrong in" in said
    assert "pass  mqa sums weighted relus" in said and "mqa takes any size" not in said


def test_the_command_wants_a_module(capsys):
    with pytest.raises(SystemExit):
        conformance.main(["--device", "cpu"])
    assert "expected --flash-mla MODULE, --deep-gemm MODULE or both" in capsys.readouterr().err
