"""The benchmarks measure what they say: dense forms are attention, timings and memory are real."""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sparse_attn
from sparse_attn import cli
from sparse_attn.ops.backends import native
from sparse_attn.reference import sparse_mla
from sparse_attn.testing import relative_error

pytest.importorskip("rich", reason="rich is in the demo extra")
pytest.importorskip("matplotlib", reason="matplotlib is in the demo extra")

from rich.console import Console

from bench import attention, case, dense, limits, operations, timing

ROOT = Path(__file__).parents[1]
SMALL = case.TINY._replace(contexts=(64, 128), batches=(1,), prefill=(20, 128), dense_heads=2)


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run = load(ROOT / "benchmarks" / "run.py")
demo = load(ROOT / "examples" / "demo.py")


@pytest.mark.parametrize("form", [dense.sdpa_folded, dense.gemm, dense.gemm_chunked, dense.own_kernel])
def test_dense_decode_forms_are_attention_over_everything(form):
    q, kv = torch.randn(2, 8, 72, dtype=torch.bfloat16), torch.randn(2, 300, 72, dtype=torch.bfloat16)
    everything = torch.arange(600, dtype=torch.int32).view(2, 300)
    exact, *_ = sparse_mla(q.double(), kv.flatten(0, 1).double(), everything, 64, 0.1)
    options = {"chunk": 128} if form is dense.gemm_chunked else {}
    assert relative_error(form(q, kv, 0.1, d_v=64, **options), exact) < 1e-2


@pytest.mark.parametrize("form", [dense.sdpa_causal, dense.mha_causal])
def test_dense_prefill_forms_are_causal_attention(form):
    q, k, v = (torch.randn(3, n, d) for n, d in ((10, 24), (50, 24), (50, 16)))
    scores = q.double() @ k.double().mT * 0.2
    scores.masked_fill_(torch.ones(10, 50).triu(41).bool(), float("-inf"))
    in_bf16 = form is dense.mha_causal and dense.gemm_dtype() == torch.bfloat16  # where that is faster
    error = relative_error(form(q, k, v, 0.2), scores.softmax(-1) @ v.double())
    assert error < (1e-2 if in_bf16 else 1e-5)


def test_timings_are_of_the_functions():
    times = timing.interleaved({"short": lambda: time.sleep(1e-3), "long": lambda: time.sleep(8e-3)}, 3)
    assert times["short"].low >= 1e-3 and times["long"].low >= 8e-3
    assert times["short"].median < times["long"].median
    assert all(t.low <= t.median <= t.high for t in times.values())


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_peak_memory_sees_what_was_freed_again():
    held = [torch.ones(1 << 18) for _ in range(64)]
    del held  # free, but perhaps still resident
    assert timing.peak_memory(lambda: torch.ones(64 << 18).sum()) > 60 << 20
    assert timing.peak_memory(lambda: [torch.ones(1 << 18) for _ in range(64)]) > 60 << 20
    assert timing.peak_memory(lambda: None) < 8 << 20


def test_the_layer_of_the_demo_on_a_small_layer(tmp_path):
    with open(tmp_path / "table.txt", "w") as file:
        results = demo.layer(Console(file=file, width=150), tmp_path, timing.CPU, SMALL, rounds=1)
    assert [row["context"] for row in results["decode"]] == [64, 128]
    for row in (*results["decode"], results["prefill"]):
        assert row["errors"]["attention"] < 1.5 * row["errors"]["bf16_rounding"]
        assert row["sparse"] > 0 and row["dense_sdpa"] > 0
        assert row["sparse"] == row["seconds"]["indexer + top-k + attend"]["median"]
    assert "layer, ms" in (tmp_path / "table.txt").read_text()
    assert results["prefill"]["tokens"] == 20 and results["decode"][0]["projections"] > 0
    assert (tmp_path / "layer_decode.png").read_bytes().startswith(b"\x89PNG")
    json.dumps(results)


def test_a_benchmark_script_runs(tmp_path):
    record = tmp_path / "record.jsonl"
    options = ["top-k", "--quick", "--device", "cpu", "--rounds", "1", "--json", str(record)]
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "torch.topk" in done.stdout
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert {line["data"] for line in lines} == {"gaussian", "clustered", "plateaus"}
    assert lines[0]["device"] == "cpu"
    assert lines[0]["command"] == " ".join(["python benchmarks/run.py", *options])
    for line in lines:
        assert line["machine"]["threads"] == 1 and line["limits"]["bytes_per_second"] > 0
        ours = line["seconds"]["select_topk"]
        assert ours["low"] <= ours["p25"] <= ours["median"] <= ours["p75"] <= ours["high"]


@pytest.mark.skipif(native.instruction_set() is None, reason="the C++ library was not built here")
@pytest.mark.parametrize(
    "script, arguments, heading",
    [
        ("cpu_limits", ["--context", "4096"], "Share of the multiply-add peak"),
        ("cpu_threads", ["--context", "4096", "--queries", "1", "--threads", "2"], "2 threads against one"),
    ],
)
def test_a_script_about_the_cpu_kernels_runs(script, arguments, heading, tmp_path):
    record, path = tmp_path / "record.jsonl", ROOT / "benchmarks" / f"{script}.py"
    command = [sys.executable, str(path), *arguments, "--rounds", "1", "--json", str(record)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert heading in " ".join(done.stdout.split())
    assert json.loads(record.read_text().splitlines()[0])["benchmark"] == script


@pytest.mark.parametrize("name", list(operations.OPERATIONS))
def test_every_operation_is_checked_timed_and_plotted(name, tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "MEMORY_QUERIES", 8)
    monkeypatch.setattr(limits, "STREAM_BYTES", 1 << 20)
    record = tmp_path / "record.jsonl"
    options = {"operations": [name], "device": timing.CPU, "rounds": 1, "json": record, "output": tmp_path}
    sizes = SMALL._replace(scores=case.QUICK.scores, rows=(1,), queries=2)
    with open(tmp_path / "table.txt", "w") as file:
        assert run.run(argparse.Namespace(**options), sizes, Console(file=file, width=150))
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    values = [line["peak_bytes"] if name == "memory" else line["seconds"] for line in lines]
    assert lines and all(len(found) > 1 for found in values) and not any(line["failed"] for line in lines)
    assert all(line["limit_seconds"] > 0 for line in lines)
    assert f"{name}, " in (tmp_path / "table.txt").read_text()
    others = {"memory": "memory", "layer": "crossover"} | dict.fromkeys(
        ("merge", "ragged", "writers", "formats")
    )
    plot = others.get(name, "time")
    assert plot is None or (tmp_path / f"{plot}.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_result_is_named_and_not_timed_and_a_peer_may_fail(tmp_path):
    def wrong():
        raise AssertionError("another selection")

    def fail():
        raise RuntimeError("no such kernel\nand much more")

    work, limits_ = limits.Work(1e9, 1e6), limits.Limits(1e12, 1e9)

    def measure(*made):
        line = case.measure(64, "gaussian", lambda: case.Case(*made, work), 1, limits=limits_)
        return {"operation": "top-k", **line}

    line = measure({"ours": lambda: None}, wrong)
    assert line["not_timed"] == "wrong: another selection" and line["seconds"] == {}
    other = measure({"ours": lambda: None, "peer": fail}, lambda: None)
    assert other["failed"] == {"peer": "RuntimeError: no such kernel"} and list(other["seconds"]) == ["ours"]
    unbuilt = case.measure(64, "plateaus", fail, 1)
    assert unbuilt["not_timed"] == "RuntimeError: no such kernel" and unbuilt["seconds"] == {}
    with open(tmp_path / "table.txt", "w") as file:
        case.show(Console(file=file, width=120), "top-k", [line, other, unbuilt])
    said = (tmp_path / "table.txt").read_text()
    assert "not timed: wrong: another selection" in said
    assert "64, gaussian, peer: RuntimeError: no such" in said
    assert "64, plateaus: not timed: RuntimeError: no such kernel" in said


def test_a_function_that_does_a_part_of_the_work_is_timed_as_if_it_did_all():
    functions = dict.fromkeys(("all", "half"), lambda: time.sleep(4e-3))
    made = case.Case(functions, lambda: {"errors": 0}, shares={"half": 0.5})
    line = case.measure(1, "", lambda: made, 1)
    assert line["errors"] == 0
    assert line["seconds"]["half"]["low"] >= 8e-3 and line["seconds"]["all"]["low"] >= 4e-3


def test_the_limit_is_the_longer_of_computing_and_reading():
    machine = limits.Limits(operations_per_second=100.0, bytes_per_second=10.0)
    assert machine.seconds(limits.Work(200.0, 5.0)) == 2.0
    assert machine.seconds(limits.Work(200.0, 50.0)) == 5.0
    assert limits.Limits(0.0, 10.0).seconds(limits.Work(200.0, 5.0)) == 0.5  # no C++ kernels, no peak
    # Counted by hand: 3 queries, 5 keys, 2 heads of 7, bf16.
    assert limits.index_work(3, 5, 2, 7) == limits.Work(2 * 3 * 5 * 2 * 7, 2 * 7 * (5 + 6) + 4 * 15)
    assert limits.select_work(3, 5, 2) == limits.Work(0, 4 * (15 + 6))
    assert limits.attention_work(3, 4, 2, 10, 8, 20) == limits.Work(2 * 3 * 4 * 2 * 18, 240 + 2 * 3 * 2 * 18)


def test_limits_of_a_gpu_are_of_a_product_and_a_pass(monkeypatch):
    monkeypatch.setattr(limits, "PRODUCT_SIZE", 64)
    measured = limits.gpu_limits(timing.CPU, timing.cpu_clock)
    assert 1e6 < measured.operations_per_second < 1e13 and 1e6 < measured.bytes_per_second < 1e13


@pytest.mark.parametrize("function", [limits.bandwidth, limits.peak_of_a_core])
def test_limits_are_those_of_a_machine(function, monkeypatch):
    monkeypatch.setattr(limits, "STREAM_BYTES", 8 << 20)
    if function is limits.peak_of_a_core and not native.available():
        assert function() == 0
    else:
        assert 1e8 < function() < 1e13


def test_kernels_do_not_beat_the_arithmetic():
    """The count of operations and the measured peak agree: no kernel computes faster than registers do."""
    q, kv = torch.randn(8, 32, 576).bfloat16(), torch.randn(512, 576).bfloat16()
    indices = torch.arange(512, dtype=torch.int32).expand(8, -1).contiguous()
    work = limits.attention_work(8, 512, 32, 576, 512, 2 * 576)
    taken = timing.interleaved({"attend": lambda: sparse_attn.sparse_mla(q, kv, indices)}, 5)["attend"].low
    peak = limits.peak_of_a_core() * torch.get_num_threads()
    assert not peak or work.operations / peak < 1.5 * taken


def test_real_scores_rank_as_the_model_selects():
    pytest.importorskip("transformers")
    from transformers import LlamaConfig, LlamaForCausalLM

    import sparse_attn.integrations.transformers as sa
    from bench import real

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 99}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    ids = torch.randint(0, 99, (1, 50))
    size = {"n_heads": 4, "head_dim": 16, "rope_dim": 8}
    indexers = sa.Indexers(64, dict.fromkeys(range(2), size))
    scores = real.scores_of(model, ids, indexers, layers=(0, 1))
    sa.attach(model, topk=[12, 50], indexer=indexers)
    with sa.record(model) as selections:
        model.model(ids)
    best = scores[0][0, 1:49].topk(10).indices + 1
    assert sorted(selections[0][0, -1].tolist()) == sorted([0, 49, *best.tolist()])
    assert scores[1].shape == (1, 50) and scores[1].isfinite().all()


def test_the_readme_shows_its_record():
    readme = (ROOT / "README.md").read_text()
    script = load(ROOT / "benchmarks" / "readme.py")
    parts = list(script.PART.finditer(readme))
    assert len(parts) >= 1
    for part in parts:
        assert part[0] == script.measured(ROOT / part[1])


def test_the_part_of_the_readme_says_what_the_record_holds(tmp_path, monkeypatch):
    script = load(ROOT / "benchmarks" / "readme.py")
    monkeypatch.setattr(script, "ROOT", tmp_path)
    about = {"benchmark": "cpu", "operation": "layer", "rounds": 5, "command": "python benchmarks/run.py"}
    about |= {"date": "2026-01-02"}
    about |= {"limits": {"operations_per_second": 2e11, "bytes_per_second": 5e9}, "limit_seconds": 1e-3}
    about |= {"machine": {"threads": 1, "processor": "Chip", "bf16_instructions": "none", "torch": "2"}}
    about |= {"errors": {"attention": 1.5e-3, "bf16_rounding": 1.4e-3}, "peak_bytes": 64 << 20, "tokens": 512}
    seconds = {"indexer": 1e-3, "topk": 1e-4, "attend": 9e-4, "sparse": 2e-3}
    seconds |= {"layer": 4e-2, "projections": 3.8e-2}
    seconds |= {"dense_sdpa": 0.1, "dense_gemm": 0.02, "dense_own": 0.004}
    decode = {**about, **seconds, "data": "decode", "context": 8192}
    prefill = {**about, **seconds, "data": "prefill of 512", "context": 32768, "sparse": 1.25}
    record = tmp_path / "record.jsonl"
    record.write_text("\n".join(map(json.dumps, (decode, {**decode, "context": 1024}, prefill))))
    text = script.measured(record)
    words = text.replace("\n", " ")
    assert "| 8,192 | 1.00 | 0.10 | 0.90 | **2.00** | 50% | 100 (50x) | 20.0 (10x) | 4.0 (2.0x) |" in text
    assert "takes 40.0 ms at 8,192 tokens, 95% of it in projections" in words
    assert "| 1,024 |" not in text and "Prefill of 512 tokens at 32,768: 1.25 s" in text
    assert "one thread of a machine with Chip" in words and "200 GFLOP/s" in text and "64 MiB" in text
    for kind in ("cpu", "gpu"):
        (tmp_path / f"{kind}.jsonl").write_text(json.dumps({"benchmark": kind}))
    old = [f"{script.BEGIN.format(f'{kind}.jsonl')}\nold\n{script.END}" for kind in ("cpu", "gpu")]
    (tmp_path / "README.md").write_text(f"before\n{old[0]}\nbetween\n{old[1]}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["readme.py", str(record), "--write"])
    script.main()
    assert (tmp_path / "README.md").read_text() == f"before\n{text}\nbetween\n{old[1]}\nafter\n"


def test_the_part_on_a_gpu_says_what_its_record_holds(tmp_path, monkeypatch):
    script = load(ROOT / "benchmarks" / "readme.py")
    monkeypatch.setattr(script, "ROOT", tmp_path)
    about = {"benchmark": "gpu", "date": "2026-01-02", "command": "benchmarks/gpu.py"}
    about |= {"limits": {"operations_per_second": 8e14, "bytes_per_second": 4e12}, "limit_seconds": 2e-5}
    about |= {"machine": {"gpu": "Card", "torch": "2.11", "triton": "3.9"}, "peak_bytes": {}}
    fields = {"indexer": 2e-5, "topk": 1e-5, "attend": 1e-5, "sparse": 4e-5, "dense_sdpa": 4e-3}
    both = {name: {"median": 1e-3} for name in ("attend", "attend, fp8 cache")}
    layer = {**about, **fields, "operation": "layer", "seconds": both}
    layer |= {"errors": {"attention": 1.5e-3, "bf16_rounding": 1.4e-3}}
    decode = {**layer, "data": "decode, 32 sequences", "context": 8192}
    prefill = {**layer, "data": "prefill of 4096", "context": 32768, "tokens": 4096, "attend": 5e-3}
    few = {**about, "operation": "attention", "seconds": both, "context": 32768}
    lines = decode, prefill, {**few, "data": "64 heads, 128 sequences"}, {**few, "data": "gaussian"}
    record = tmp_path / "record.jsonl"
    record.write_text("\n".join(map(json.dumps, lines)))
    text = script.measured(record)
    words = text.replace("\n", " ")
    assert "`python benchmarks/gpu.py`" in words
    assert "| 32 | 8,192 | 20 | 10 | 10 | **40** | 50% | 4,000 (100x) | - | - |" in text
    assert "one Card (800 TFLOP/s in bf16 and 4.0 TB/s" in words and "Triton 3.9" in words
    assert "Prefill of 4,096 tokens at 32,768, 128 heads: 0.0 ms" in words and "attention 5.0" in words
    flops = 2 * 2048 * 1088 / 1e-3 / 1e12
    assert f"| 64 heads, decode of 128 | 1,000 | {128 * 64 * flops:.0f} |" in text
    assert f"| 128 heads, decode of 1 | 1,000 | {128 * flops:.0f} |" in text


def test_the_commands_explain_themselves(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit) as stop:
        demo.main(["--help"])
    assert stop.value.code == 0
    assert "--part" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run.main(["nonsense"])
    expected = f"expected some of {', '.join(operations.OPERATIONS)}, got nonsense"
    assert expected in " ".join(capsys.readouterr().err.split())
    for command in (run.main, demo.main):
        for name in ("cuda", "nonsense"):
            with pytest.raises(SystemExit, match=f"device: expected cpu, got {name}. With torch"):
                command(["--device", name])
    with pytest.raises(SystemExit):
        cli.main(["nonsense"])
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err


def test_a_missing_package_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(SystemExit, match=r"demo needs rich.console: pip install .sparse_attn\[demo\]"):
        demo.main(["--output", str(tmp_path)])
