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
from sparse_attn import DSAConfig, cli, index_logits, native
from sparse_attn.reference import sparse_mla
from sparse_attn.testing import relative_error

pytest.importorskip("rich", reason="rich is in the demo extra")
pytest.importorskip("matplotlib", reason="matplotlib is in the demo extra")

from rich.console import Console

from sparse_attn.bench import dense, layer, limits, operations, run, timing

ROOT = Path(__file__).parents[1]
SMALL = DSAConfig.deepseek_v32(
    **{"hidden_size": 64, "num_attention_heads": 8, "q_lora_rank": 32, "kv_lora_rank": 48},
    **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16},
    **{"index_n_heads": 4, "index_head_dim": 32, "index_topk": 16},
)


@pytest.mark.parametrize("form", [dense.sdpa_folded, dense.gemm_chunked, dense.own_kernel])
def test_dense_decode_forms_are_attention_over_everything(form):
    q, kv = torch.randn(8, 72, dtype=torch.bfloat16), torch.randn(300, 72, dtype=torch.bfloat16)
    everything = torch.arange(300, dtype=torch.int32)[None]
    exact, *_ = sparse_mla(q[None].double(), kv.double(), everything, 64, 0.1)
    options = {"chunk": 128} if form is dense.gemm_chunked else {}
    assert relative_error(form(q, kv, 0.1, d_v=64, **options), exact[0]) < 1e-2


@pytest.mark.parametrize("form", [dense.sdpa_causal, dense.mha_causal])
def test_dense_prefill_forms_are_causal_attention(form):
    q, k, v = (torch.randn(3, n, d) for n, d in ((10, 24), (50, 24), (50, 16)))
    scores = q.double() @ k.double().mT * 0.2
    scores.masked_fill_(torch.ones(10, 50).triu(41).bool(), float("-inf"))
    in_bf16 = form is dense.mha_causal and dense.gemm_dtype() == torch.bfloat16  # where that is faster
    bound = 1e-2 if in_bf16 else 1e-5
    assert relative_error(form(q, k, v, 0.2), scores.softmax(-1) @ v.double()) < bound


def test_timings_are_of_the_functions():
    seen = []
    times = timing.interleaved(
        {"short": lambda: time.sleep(1e-3), "long": lambda: time.sleep(8e-3)}, 3, lambda: seen.append(1)
    )
    assert times["short"].low >= 1e-3 and times["long"].low >= 8e-3
    assert times["short"].median < times["long"].median
    assert all(t.low <= t.median <= t.high for t in times.values())
    assert len(seen) == 6


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_peak_memory_sees_what_was_freed_again():
    held = [torch.ones(1 << 18) for _ in range(64)]
    del held  # free, but perhaps still resident
    assert timing.peak_memory(lambda: torch.ones(64 << 18).sum()) > 60 << 20
    assert timing.peak_memory(lambda: [torch.ones(1 << 18) for _ in range(64)]) > 60 << 20
    assert timing.peak_memory(lambda: None) < 8 << 20


def test_the_layer_benchmark_on_a_small_layer(tmp_path):
    with open(tmp_path / "table.txt", "w") as file:
        results = layer.run(
            Console(file=file, width=120),
            tmp_path,
            contexts=(64, 100),
            prefill_tokens=20,
            prefill_context=80,
            rounds=1,
            config=SMALL,
        )
    assert [row["context"] for row in results["decode"]] == [64, 100]
    for row in (*results["decode"], results["prefill"]):
        assert row["errors"]["attention"] < 1.5 * row["errors"]["bf16_rounding"]
        assert row["sparse"] > 0 and row["dense_sdpa"] > 0
    assert "Decode of one token" in (tmp_path / "table.txt").read_text()
    assert (tmp_path / "layer_decode.png").read_bytes().startswith(b"\x89PNG")
    json.dumps(results)


def test_a_benchmark_script_runs(tmp_path):
    record = tmp_path / "record.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks" / "select_topk.py"), "--quick", "--rounds", "1"]
    done = subprocess.run([*command, "--json", str(record)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "torch.topk" in done.stdout
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert {line["data"] for line in lines} == {"gaussian", "clustered", "plateaus"}
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
    for size in ("HEADS", "INDEX_HEADS", "TOPK", "MEMORY_QUERIES"):
        monkeypatch.setattr(operations, size, 8)
    monkeypatch.setattr(operations, "GQA_HEADS", (8, 2))
    monkeypatch.setattr(operations, "QUICK", (64, 128))
    monkeypatch.setattr(limits, "STREAM_BYTES", 1 << 20)
    record = tmp_path / "record.jsonl"
    options = argparse.Namespace(quick=True, threads=1, rounds=1, json=record, output=tmp_path)
    with open(tmp_path / "table.txt", "w") as file:
        assert run.run(options, [name], Console(file=file, width=150))
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    values = [line["peak_bytes"] if name == "memory" else line["seconds"] for line in lines]
    assert lines and all(len(found) > 1 for found in values) and not any(line["failed"] for line in lines)
    assert all(line["limit_seconds"] > 0 for line in lines)
    assert f"{name}, " in (tmp_path / "table.txt").read_text()
    if name != "memory":
        assert (tmp_path / "time.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_result_is_named_and_not_timed_and_a_peer_may_fail(tmp_path):
    def wrong():
        raise AssertionError("another selection")

    def fail():
        raise RuntimeError("no such kernel\nand much more")

    work, limits_ = limits.Work(1e9, 1e6), limits.Limits(1e12, 1e9)
    case = operations.Case(64, "gaussian", {"ours": lambda: None}, wrong, work)
    line = {"operation": "top-k", **run.measure(case, limits_, 1)}
    assert line["wrong"] == "another selection" and line["seconds"] == {}
    case = operations.Case(64, "gaussian", {"ours": lambda: None, "peer": fail}, lambda: None, work)
    other = {"operation": "top-k", **run.measure(case, limits_, 1)}
    assert other["failed"] == {"peer": "RuntimeError: no such kernel"} and list(other["seconds"]) == ["ours"]
    with open(tmp_path / "table.txt", "w") as file:
        run.show(Console(file=file, width=120), "top-k", [line, other])
    said = (tmp_path / "table.txt").read_text()
    assert "wrong: another selection" in said and "no such kernel" in said


def test_the_limit_is_the_longer_of_computing_and_reading():
    machine = limits.Limits(operations_per_second=100.0, bytes_per_second=10.0)
    assert machine.seconds(limits.Work(200.0, 5.0)) == 2.0
    assert machine.seconds(limits.Work(200.0, 50.0)) == 5.0
    assert limits.Limits(0.0, 10.0).seconds(limits.Work(200.0, 5.0)) == 0.5  # no C++ kernels, no peak
    # Counted by hand: 3 queries, 5 keys, 2 heads of 7, bf16.
    assert limits.index_work(3, 5, 2, 7) == limits.Work(2 * 3 * 5 * 2 * 7, 2 * 7 * (5 + 6) + 4 * 15)
    assert limits.select_work(3, 5, 2) == limits.Work(0, 4 * (15 + 6))
    assert limits.attention_work(3, 4, 2, 10, 8, 20) == limits.Work(2 * 3 * 4 * 2 * 18, 240 + 2 * 3 * 2 * 18)


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


def test_real_scores_are_those_of_the_model():
    pytest.importorskip("transformers")
    from transformers import LlamaConfig, LlamaForCausalLM

    from sparse_attn.bench import real
    from sparse_attn.demo import model as demo

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 99}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    ids = torch.randint(0, 99, (1, 50))
    seen = {}

    def observe(layer, q, k, indices, lse, scaling):
        seen[layer] = index_logits(*demo.training_free_indexer(q[-1:], k), *torch.tensor([[0], [50]]).int())

    demo.use_attention(model, 50)
    model.model(ids, observe=observe)
    demo.use_attention(model, None)
    for number, scores in real.scores_of(model, ids, layers=(0, 1)).items():
        torch.testing.assert_close(scores, seen[number], rtol=1e-4, atol=1e-4)


def test_the_readme_shows_its_record():
    readme = (ROOT / "README.md").read_text()
    script = load(ROOT / "benchmarks" / "readme.py")
    found = script.PART.search(readme)
    if found is None:
        pytest.skip("README.md has no part that a record was written to")
    assert found[0] == script.measured(ROOT / found[1])


def test_the_part_of_the_readme_says_what_the_record_holds(tmp_path, monkeypatch):
    script = load(ROOT / "benchmarks" / "readme.py")
    monkeypatch.setattr(script, "ROOT", tmp_path)
    about = {"operation": "layer", "rounds": 5, "command": "sparse-attn bench", "date": "2026-01-02"}
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
    assert "| 8,192 | 1.00 | 0.10 | 0.90 | **2.00** | 50% | 100 (50x) | 20.0 (10x) | 4.0 (2.0x) |" in text
    assert "takes 40.0 ms at 8,192 tokens, 95% of it in projections" in text.replace("\n", " ")
    assert "| 1,024 |" not in text and "Prefill of 512 tokens at 32,768: 1.25 s" in text
    assert (
        "one thread of a machine with Chip" in text.replace("\n", " ")
        and "200 GFLOP/s" in text
        and "64 MiB" in text
    )
    (tmp_path / "README.md").write_text(f"before\n{script.BEGIN.format('old')}\nold\n{script.END}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["readme.py", str(record), "--write"])
    script.main()
    assert (tmp_path / "README.md").read_text() == f"before\n{text}\nafter\n"


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_explains_itself(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--help"])
    assert stop.value.code == 0
    assert "--part" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["bench", "nonsense"])
    assert "expected some of indexer, top-k, attention, gqa, memory, layer" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["nonsense"])
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err


def test_a_missing_package_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(
        SystemExit, match=r"sparse-attn demo needs rich.console: pip install .sparse_attn\[demo\]"
    ):
        cli.main(["demo", "--output", str(tmp_path)])
