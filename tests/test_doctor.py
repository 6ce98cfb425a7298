"""`sparse-attn doctor`: it tells the truth about this machine, and about ops that are broken."""

import json

import pytest

from sparse_attn import cli, doctor, native, ops


def test_every_op_is_listed_and_right(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["doctor"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and "No problems found." in said and "WRONG" not in said
    for name in ("index_logits", "select_topk", "lightning_topk", "sparse_mla", "sparse_gqa"):
        line = next(line for line in said.splitlines() if line.startswith(name + " "))
        assert line.endswith(" right")
        assert (native.instruction_set() or "torch") in line


def test_json(capsys):
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["instruction_set"] == native.instruction_set()
    assert found["ops"]["sparse_mla"]["cpu"]["right"] is True


@pytest.mark.parametrize("name", ["select_topk", "sparse_mla", "index_logits"])
def test_a_wrong_op_is_reported(name, monkeypatch, capsys):
    run = ops.call

    def wrong(called, backend, inputs, outputs):
        run(called, backend, inputs, outputs)
        if called == name:
            outputs[0].zero_()

    monkeypatch.setattr(ops, "call", wrong)
    with pytest.raises(SystemExit) as end:
        cli.main(["doctor"])
    said = capsys.readouterr().out
    assert end.value.code == 1
    assert f"Problem: {name} on cpu is wrong: AssertionError" in said


def test_a_missing_library_is_a_problem_and_torch_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_native.so")
    native._library.cache_clear()
    try:
        found = doctor.examine()
    finally:
        native._library.cache_clear()
    assert found["instruction_set"] is None
    assert found["ops"]["sparse_mla"]["cpu"] | {"seconds": 0} == {
        "runs_on": "torch",
        "right": True,
        "seconds": 0,
    }
    assert any("was not built" in problem and "C++17 compiler" in problem for problem in found["problems"])
