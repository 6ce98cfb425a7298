"""The benchmarks measure what they say: dense forms are attention, timings and memory are real."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sparse_attn import DSAConfig, cli
from sparse_attn.reference import sparse_mla
from sparse_attn.testing import relative_error

pytest.importorskip("rich", reason="rich is in the demo extra")
pytest.importorskip("matplotlib", reason="matplotlib is in the demo extra")

from sparse_attn.bench import dense, layer, timing

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
    assert relative_error(form(q, k, v, 0.2), scores.softmax(-1) @ v.double()) < 1e-5


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
    from rich.console import Console

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
    assert lines and all(line["machine"]["threads"] == 1 for line in lines)


def test_the_command_explains_itself(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--help"])
    assert stop.value.code == 0
    assert "--part" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["nonsense"])
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err


def test_a_missing_package_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(
        SystemExit, match=r"sparse-attn demo needs rich.console: pip install .sparse_attn\[demo\]"
    ):
        cli.main(["demo", "--output", str(tmp_path)])
