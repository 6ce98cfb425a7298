"""`make gpu` on a machine without a GPU: the same code with tiny sizes, stand-ins for other libraries."""

import contextlib
import importlib.util
import io
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("rich", reason="rich is in the demo extra")

from rich.console import Console

from bench import attention, case, command, dense, index, layer, limits, operations, timing
from sparse_attn import doctor, reference
from sparse_attn.compat import deep_gemm, flash_mla
from sparse_attn.testing import assert_close, relative_error

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
CPU = torch.device("cpu")


@pytest.fixture
def main(monkeypatch):
    """The script's main with the given arguments, in this process; gives its exit status."""
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    threads = torch.get_num_threads()
    monkeypatch.setattr(limits, "STREAM_BYTES", 1 << 20)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            script.main()
        return stop.value.code

    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


def cases(sizes=case.TINY):
    """The first and the last case of each operation: layer and gqa end in a prefill."""
    for operation, make in operations.OPERATIONS.items():
        if operation != "memory":
            builders = [build for _, _, build in make(sizes, CPU)]
            for build in (builders[0], *builders[1:][-1:]):
                yield operation, build()


def timed(console, operation):
    """The lines of a dry run."""
    return operations.run(console, [operation], case.TINY, CPU, 1)


def test_without_a_gpu_it_says_so_in_a_sentence(main, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = main()
    assert said.startswith("make gpu needs a CUDA GPU") and said.count("\n") == 0 and len(said) < 120


def test_a_dry_run_times_every_operation_and_writes_a_record(main, tmp_path):
    assert main("--dry-run", "--rounds", 1, "--output", tmp_path / "records") == 0
    (record,) = (tmp_path / "records").glob("*-dry-run-on-a-cpu.jsonl")
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    done = list(dict.fromkeys(line["operation"] for line in lines))
    assert done[0] == "layer" and set(done) == set(operations.OPERATIONS)
    for line in lines:
        assert line["dry_run"] and line["benchmark"] == "gpu" and "tests collected" in line["tests"]
        assert line["machine"]["torch"] == torch.__version__ and line["date"] in record.name
        assert line["device"] == "cpu" and line["command"].startswith("python benchmarks/gpu.py --dry-run")
        assert line["failed"] == {} and "not_timed" not in line
        if line["operation"] == "memory":
            assert len(line["peak_bytes"]) >= 2
        else:
            assert len(line["seconds"]) >= 2 and all(t["median"] > 0 for t in line["seconds"].values())
    table = record.with_suffix(".txt").read_text()
    assert all(f"{name}, M" in table or f"{name}, ms" in table for name in operations.OPERATIONS)
    assert "dry run on a CPU" in table


def test_failing_tests_and_unknown_operations_fail_the_run(main, monkeypatch, tmp_path):
    options = "--dry-run", "--rounds", 1, "--output", tmp_path
    assert main(*options, "--only", "merge", "--skip-tests") == 0
    assert main(*options, "--only", "no such operation", "--skip-tests") == 1
    pytest_that_fails = tmp_path / "pytest"
    pytest_that_fails.write_text("#!/bin/sh\necho '== 1 failed in 0.1s =='\nexit 1\n")
    pytest_that_fails.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert main(*options, "--only", "merge") == 1
    (record,) = tmp_path.glob("*.jsonl")
    said = [json.loads(line)["tests"] for line in record.read_text().splitlines()]
    assert said == ["skipped", "1 failed in 0.1s"]


def test_a_wrong_result_is_not_timed(console, monkeypatch):
    right = attention.merge_attention
    monkeypatch.setattr(attention, "merge_attention", lambda outs, lses: (right(outs, lses)[0] * 1.1, None))
    (line,) = timed(console, "merge")
    assert line["seconds"] == {} and "exceeds the budget" in line["not_timed"]
    assert "not timed: wrong: relative error" in console.file.getvalue()


@pytest.mark.parametrize(
    "operation, module, function", [("layer", layer, "lightning_topk"), ("top-k", index, "select_topk")]
)
def test_another_selection_is_not_timed(console, monkeypatch, operation, module, function):
    right = getattr(module, function)

    def wrong(*args, **options):
        selected = right(*args, **options)
        selected[-1, -1] = -1
        return selected

    monkeypatch.setattr(module, function, wrong)
    for line in timed(console, operation):
        assert line["seconds"] == {} and "selection differs" in line["not_timed"]


def test_the_dense_peers_are_attention_over_everything():
    seen = set()
    for operation, made in cases(case.TINY._replace(topk=128)):
        ours = made.functions.get("attend") or made.functions.get("sparse_gqa")
        if operation == "layer" and "layer" not in made.functions:
            continue  # a prefill: dense attends by expanded heads, from other inputs
        for name, function in made.functions.items():
            if "dense" in name:
                out = function()  # GEMM rounds its scores
                assert relative_error(out[..., : ours().shape[-1]], ours()) < 2e-2, (operation, name)
                seen.add((operation, name))
    assert {operation for operation, _ in seen} == {"attention", "gqa", "layer"} and len(seen) >= 8


def test_every_tensor_is_made_on_the_device_of_its_case(monkeypatch):
    """Where tensors go by default there is no data, so one that is made without a device breaks its case."""
    monkeypatch.setattr(dense, "gemm_chunked", dense.gemm)  # runs on a CPU only
    with torch.device("meta"):
        for _, made in cases():
            made.check()
            for function in made.functions.values():
                function()


def test_the_expanded_heads_are_causal_attention():
    q, k, v = (torch.randn(1, 3, n, 24, dtype=torch.bfloat16) for n in (5, 40, 40))
    scores = q.double() @ k.double().mT * 0.3
    scores.masked_fill_(torch.ones(5, 40).triu(36).bool(), float("-inf"))
    assert_close(dense.sdpa_causal(q[0], k[0], v[0], 0.3)[None], scores.softmax(-1) @ v.double(), factor=6)


def install(monkeypatch, **modules):
    for name, content in modules.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name.replace("__", "."), module)


def test_flash_mla_is_called_as_documented(monkeypatch):
    def flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v=512):
        s_q, s_kv = q.shape[0], kv.shape[0]
        assert q.shape in ((s_q, 4, 576), (s_q, 2, 576)) and kv.shape == (s_kv, 1, 576)
        assert indices.shape == (s_q, 1, 16)
        assert indices.dtype == torch.int32 and q.dtype == kv.dtype == torch.bfloat16
        wide = q.double(), kv[:, 0].double()
        out, lse, max_logits = reference.sparse_mla(*wide, indices[:, 0], d_v, sm_scale)
        return out, max_logits, lse

    paged = {name: getattr(flash_mla, name) for name in ("flash_mla_with_kvcache", "get_mla_metadata")}
    install(monkeypatch, flash_mla={"flash_mla_sparse_fwd": flash_mla_sparse_fwd, **paged})
    for operation, made in cases():
        if operation in ("attention", "layer"):
            functions = made.functions
            assert_close(functions["attend"](), functions["attend, FlashMLA"](), factor=2.5)
            assert torch.equal(functions["attend, fp8 cache"](), functions["attend, FlashMLA fp8 cache"]())


def test_deep_gemm_is_called_as_documented(monkeypatch):
    def fp8_mqa_logits(q, kv, weights, ks, ke):
        assert q.shape == (5, 4, 128) and kv[0].shape == (128, 128) and ke.tolist() == list(range(124, 129))
        assert all(x.is_contiguous() for x in (q, *kv, weights))
        return deep_gemm.fp8_mqa_logits(q, kv, weights, ks, ke)

    def fp8_paged_mqa_logits(q, kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len):
        assert q.shape == (2, 1, 4, 128) and kv_cache.shape == (4, 64, 1, 132) and weights.shape == (2, 4)
        assert context_lens.tolist() == [[128], [128]] and block_table.shape == (2, 2)
        assert len(schedule_meta) == deep_gemm.get_num_sms() + 1 and max_context_len == 128
        inputs = q, kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len
        return deep_gemm.fp8_paged_mqa_logits(*inputs)

    planning = {name: getattr(deep_gemm, name) for name in ("get_num_sms", "get_paged_mqa_logits_metadata")}
    logits = {"fp8_mqa_logits": fp8_mqa_logits, "fp8_paged_mqa_logits": fp8_paged_mqa_logits}
    install(monkeypatch, deep_gemm=logits | planning)
    found = [made.functions for operation, made in cases() if operation == "indexer"]
    assert len(found) == 2
    for functions in found:
        assert torch.equal(functions["fp8 queries and keys"](), functions["fp8, DeepGEMM"]())


def test_a_wrong_fp8_attention_is_not_timed(console, monkeypatch):
    right = attention.packed
    monkeypatch.setattr(attention, "packed", lambda kv: right(kv).flip(1))
    monkeypatch.setattr(attention, "unpack", lambda rows, dtype: torch.zeros(len(rows), 576, dtype=dtype))
    for line in timed(console, "attention"):
        assert line["seconds"] == {} and "exceeds the budget" in line["not_timed"]


def test_flashinfer_is_called_as_documented(monkeypatch):
    class BatchMLAPagedAttentionWrapper:
        def __init__(self, workspace):
            assert workspace.dtype == torch.int8

        def plan(self, qo_indptr, kv_indptr, kv_indices, kv_len, *sizes_and_types):
            heads, ckv, kpe, page_size, causal, self.scale, _q_type, _kv_type = sizes_and_types
            assert qo_indptr.tolist() == [0, 1, 2] and kv_indptr.tolist() == [0, 128, 256]
            assert kv_indices.tolist() == list(range(256)) and kv_len.tolist() == [128, 128]
            assert (heads, ckv, kpe, page_size, causal) == (4, 512, 64, 1, False)

        def run(self, q_nope, q_pe, ckv, kpe):
            assert q_nope.shape == (2, 4, 512) and q_pe.shape == (2, 4, 64)
            assert ckv.shape == (256, 1, 512) and kpe.shape == (256, 1, 64)
            q, kv = torch.cat([q_nope, q_pe], -1), torch.cat([ckv, kpe], -1)[:, 0]
            rows = torch.arange(256, dtype=torch.int32).view(2, 128)
            return reference.sparse_mla(q.double(), kv.double(), rows, 512, self.scale)[0]

    def single_prefill_with_kv_cache(q, k, v, causal):
        assert causal and q.shape == (5, 4, 128) and k.shape == v.shape == (128, 2, 128)
        rows = torch.arange(128, dtype=torch.int32).expand(5, -1)
        lengths = torch.arange(124, 129, dtype=torch.int32)
        return reference.sparse_gqa(*(x.double() for x in (q, k, v)), rows, 128**-0.5, topk_length=lengths)[0]

    mla = {"BatchMLAPagedAttentionWrapper": BatchMLAPagedAttentionWrapper}
    prefill = {"single_prefill_with_kv_cache": single_prefill_with_kv_cache}
    install(monkeypatch, flashinfer=prefill, flashinfer__mla=mla)
    seen = []
    for operation, made in cases(case.TINY._replace(topk=128)):
        if flashinfer := made.functions.get("dense FlashInfer"):
            ours = made.functions["attend" if operation != "gqa" else "sparse_gqa"]
            assert_close(ours(), flashinfer(), factor=2.5)
            seen.append(operation)
    assert seen == ["attention", "gqa", "layer"]


def test_the_cuda_clock_flushes_waits_and_measures_each_call(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = len(log)
            log.append("record")

        def elapsed_time(self, end):
            return 2.0 * (end.at - self.at)  # milliseconds

    class Graph:
        def replay(self):
            log.append("replay")

    @contextlib.contextmanager
    def capture(graph):
        log.append("capture")
        yield

    properties = SimpleNamespace(L2_cache_size=1000)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("synchronize"))
    clock = timing.CudaClock("cpu")
    assert clock.flush.nbytes >= 2000
    clock.flush = SimpleNamespace(sum=lambda: log.append("flush"), device="cpu")

    def function():
        log.append("call")

    for _ in range(2):  # captured once
        assert clock(function, 2) == pytest.approx(4e-3)
    replays = ["flush", "record", "replay", "record"] * 2 + ["synchronize"]
    assert log == ["capture", "call", *replays, *replays]
    log.clear()
    assert clock(timing.eager(function), 2) == pytest.approx(4e-3)
    assert log == ["flush", "sleep", "record", "call", "record"] * 2 + ["synchronize"]


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, of which the first is too old; gives the current one."""
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7 + 2 * device.index, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(str(device)))
    monkeypatch.setattr(doctor, "_version", lambda package: "3.9.0")
    return current


def test_the_device_is_a_gpu_that_the_kernels_run_on(gpus):
    for name in (None, "cuda", "cuda:1"):
        assert command.choose_device(name) == torch.device("cuda", 1) and gpus.pop() == "cuda:1"
    assert command.choose_device("cpu") == CPU and gpus == []
    with pytest.raises(SystemExit, match="expected cuda:1 or cpu, got cuda:0"):
        command.choose_device("cuda:0")


def test_what_is_measured_on_a_gpu_is_said_of_that_gpu(gpus, console, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(timing, "CudaClock", lambda device: timing.cpu_clock)
    monkeypatch.setattr(limits, "gpu_limits", lambda device, clock: limits.Limits(8e14, 4e12))
    device = torch.device("cuda", 1)
    clock, measured, about = command.start(console, device)
    assert clock is timing.cpu_clock and measured.bytes_per_second == 4e12
    assert about["device"] == "cuda:1" and about["limits"]["operations_per_second"] == 8e14
    said = console.file.getvalue()
    assert f"card 1, torch {torch.__version__}, Triton" in said and "800 TFLOP/s, 4 TB/s" in said
    assert timing.now(device) <= timing.now(CPU) and waited == [device]


@pytest.fixture
def sweep(monkeypatch):
    """The script of sweeps on the CPU, where every configuration gives the same, with tiny inputs."""
    pytest.importorskip("triton")
    import gpu_sweep

    for name, value in {"DEVICE": CPU, "ROWS": 512, "TOPK": 16}.items():
        monkeypatch.setattr(gpu_sweep, name, value)
    return gpu_sweep


def tiny(sweep, found):
    make, *sizes = found.inputs.func, *found.inputs.args
    most = {
        "attention": (2,),
        "gqa": (2,),
        "paged_index": (2, 128),
        "prefill_index": (3, 128),
        "top_k": (2, 64),
    }
    sizes = [*map(min, sizes, most[make.__name__]), *sizes[len(most[make.__name__]) :]]
    return found._replace(inputs=lambda: make(*sizes), candidates=found.candidates[:2])


def test_a_sweep_checks_and_times_configurations(sweep, monkeypatch, capsys):
    before = {name: dict(getattr(sweep.configs, name)) for name in ("SPARSE_MLA", "INDEX_LOGITS")}
    for found in sweep.sweeps():
        lines = sweep.run(tiny(sweep, found), timing.cpu_clock, 1)
        assert len(lines) == 2 and all(line["median"] > 0 for line in lines), lines
    sweep.show(found, lines)
    assert "<- present" in capsys.readouterr().out
    assert all(getattr(sweep.configs, name) == table for name, table in before.items())


def test_a_wrong_configuration_is_named_and_not_timed(sweep, monkeypatch):
    right, calls = sweep.select_topk, []

    def second_is_wrong(*args):
        calls.append(0)
        return right(*args) + (len(calls) == 2)

    monkeypatch.setattr(sweep, "select_topk", second_is_wrong)
    found = next(s for s in sweep.sweeps() if s.label.startswith("select_topk"))
    wrong, timed = sorted(
        sweep.run(tiny(sweep, found), timing.cpu_clock, 1), key=lambda line: "median" in line
    )
    assert "the selection differs" in wrong["failed"] and timed["median"] > 0


def test_a_sweep_without_a_gpu_says_so(sweep, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_sweep.py", "--only", "top"])
    with pytest.raises(SystemExit, match="gpu_sweep needs a CUDA GPU"):
        sweep.main()
