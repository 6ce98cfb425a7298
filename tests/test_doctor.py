"""`sparse-attn doctor`: it tells the truth about this machine, and about ops that are broken."""

import json
import shutil
from unittest import mock

import pytest
import torch

from sparse_attn import cli, doctor, ops
from sparse_attn.ops import attention, index, writers
from sparse_attn.ops.backends import native
from sparse_attn.testing import self_check


def doctor_says(capsys, *options):
    """The command's exit status and what it prints."""
    with pytest.raises(SystemExit) as end:
        cli.main(["doctor", *options])
    return end.value.code, capsys.readouterr().out


def test_every_op_is_listed_and_right(capsys):
    status, said = doctor_says(capsys)
    assert status == 0 and "No problems found." in said and "WRONG" not in said
    for name in ops.RECORDS:
        line = next(line for line in said.splitlines() if line.startswith(name + " "))
        assert line.endswith(" right")
        expected = native.instruction_set() if hasattr(native, name) else None
        assert (expected or "torch") in line


def test_json(capsys):
    found = json.loads(doctor_says(capsys, "--json")[1])
    assert found["instruction_set"] == native.instruction_set()
    assert found["ops"]["sparse_mla"]["cpu"]["right"] is True


@pytest.mark.parametrize("name", sorted(self_check.CHECKS))
def test_a_wrong_op_is_reported(name, monkeypatch, capsys):
    def wrong(called, a, backend):
        ops.call(called, a, backend)
        if called == name:
            (a.cache if hasattr(a, "cache") else a.out).view(torch.uint8).bitwise_xor_(0x40)

    for family in (attention, index, writers):
        monkeypatch.setattr(family, "call", wrong)
    status, said = doctor_says(capsys)
    assert status == 1 and f"Problem: {name} on cpu is wrong: AssertionError" in said


def test_a_missing_library_is_a_problem_and_torch_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_native.so")
    native._library.cache_clear()
    try:
        found = doctor.examine()
    finally:
        native._library.cache_clear()
    assert found["instruction_set"] is None
    op = found["ops"]["sparse_mla"]["cpu"]
    assert (op["runs_on"], op["right"]) == ("torch", True) and "C++ kernels are not in use" in op["why"]
    assert any("was not built" in problem and "C++17 compiler" in problem for problem in found["problems"])


def test_a_library_of_other_sources_is_a_problem_in_one_line(monkeypatch, capsys):
    if not native.available():
        pytest.skip("the library was not built")
    monkeypatch.setitem(native._STRUCTURES, "Segment", native._SelectArgs)
    native._library.cache_clear()
    try:
        said, printed = doctor_says(capsys)  # Python prints this status before it exits with 1
    finally:
        native._library.cache_clear()
    assert said.startswith("Problem: sparse_attn: _native.so was built from other sources (Segment: ")
    assert "Install a C++17 compiler" in said and "\n" not in said and printed == ""


def test_an_op_that_raises_does_not_run(monkeypatch):
    def fail(*args):
        raise RuntimeError("no such instruction")

    for family in (attention, index, writers):
        monkeypatch.setattr(family, "call", fail)
    problems = doctor.examine()["problems"]
    assert "sparse_gqa on cpu does not run: RuntimeError: no such instruction" in problems


def test_what_is_wrong_with_the_machine_is_said(monkeypatch):
    monkeypatch.setattr(doctor, "_cores", lambda: 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(doctor, "cpu_flags", lambda: doctor.NEEDED["amx"] | doctor.NEEDED["avx2"])
    monkeypatch.setattr(native, "instruction_sets", lambda: ["avx2", "portable"])
    monkeypatch.setattr(native, "has_openmp", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None)
    monkeypatch.setattr(torch.version, "cuda", None)
    problems = "\n".join(doctor.examine()["problems"])
    for words in (
        *("8 threads on 1 cores", "OMP_NUM_THREADS=1", "has amx, but", "without OpenMP"),
        "this torch was built without CUDA",
    ):
        assert words in problems


def test_kernel_configurations_are_those_that_are_launched(capsys):
    pytest.importorskip("triton")
    from sparse_attn.kernels import configs

    for architecture in (80, 89, 90, 100, 120):
        table = configs.chosen("sparse_mla", architecture)["CONFIGS"]
        with mock.patch.object(configs, "architecture", lambda device, arch=architecture: arch):
            launched = configs.for_device(configs.SPARSE_MLA, torch.device("cuda"))
        assert table == {str(heads): config._asdict() for heads, config in launched.items()}
    said = doctor_says(capsys, "--arch", "90")[1]
    assert "Triton kernels on sm_90" in said and "warp-specialised" in said


def test_a_gpu_that_is_too_old_and_a_missing_triton(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    found = doctor.examine()
    assert found["devices"]["cuda:0"] == "an old card, sm_75"
    assert list(found["ops"]["sparse_mla"]) == ["cpu"] and found["kernels"] == {}
    problems = "\n".join(found["problems"])
    assert "cuda:0 (an old card, sm_75) is older than sm_80" in problems
    assert "Triton is not installed, so nothing runs on cuda:0" in problems
