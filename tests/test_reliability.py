"""Long use, several threads, forks, interrupted and failing calls: results stay right, caches stay usable."""

import importlib.util
import itertools
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import sparse_attn
from sparse_attn import DSACache, DSAConfig, SparseGQA, SparseMLA
from sparse_attn.testing import gqa_inputs, index_inputs, mla_inputs

MLA = DSAConfig.deepseek_v32(
    **{"hidden_size": 64, "num_attention_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 48},
    **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16},
    **{"index_n_heads": 4, "index_head_dim": 32, "index_topk": 16},
)
GQA = DSAConfig(
    **{"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    **{"index_n_heads": 4, "index_head_dim": 32, "index_topk": 16, "indexer_rope": "half"},
)
LAYERS = pytest.mark.parametrize("layer, config", [(SparseMLA, MLA), (SparseGQA, GQA)])


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_short_soak(capsys):
    load("soak").main(["--steps", "600"])
    assert "results right, memory constant" in capsys.readouterr().out


def test_the_soak_sees_a_leak_and_a_wrong_result(monkeypatch):
    soak = load("soak")
    kept, step, calls = [], soak.Engine.step, itertools.count()

    def leak(self):
        step(self)
        if next(calls) % 20 == 0:
            kept.append(torch.ones(12 << 20))

    monkeypatch.setattr(soak.Engine, "step", leak)
    with pytest.raises(AssertionError, match="grew"):
        soak.soak(200)

    def wrong(self):
        step(self)
        self.done[-1].mul_(1.001)

    monkeypatch.setattr(soak.Engine, "step", wrong)
    with pytest.raises(AssertionError, match="relative error"):
        soak.soak(20)


# A call that fails


@LAYERS
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("fails", ["_project", "division.select", "_attention", "_output"])
def test_a_call_that_fails_leaves_the_cache_as_it_was(layer, config, error, fails, monkeypatch):
    layer, cache = layer(config), DSACache(config, 64, batch_size=2)
    hidden, boundaries = torch.randn(50, 64), torch.tensor([0, 30, 50])
    layer(hidden, cache=cache, cu_seqlens_q=boundaries)
    new, boundaries = torch.randn(3, 64), torch.tensor([0, 2, 3])
    before = {name: cache[name].clone() for name in cache._tensors}

    def fail(*args, **kwargs):
        raise error("on purpose")

    with monkeypatch.context() as patch:
        *owner, name = fails.split(".")
        patch.setattr(layer.division if owner else layer, name, fail)
        with pytest.raises(error, match="on purpose"):
            layer(new, cache=cache, cu_seqlens_q=boundaries, return_indices=True)
    assert cache.lengths == (30, 20)
    for name, tensor in before.items():
        for b, length in enumerate(cache.lengths):
            assert torch.equal(cache[name][b, :length], tensor[b, :length])
    expected = layer(torch.cat([hidden[:30], new[:2]]))[-2:]
    torch.testing.assert_close(layer(new, cache=cache, cu_seqlens_q=boundaries)[:2], expected)
    assert cache.lengths == (32, 21)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers that interrupt")
@LAYERS
def test_interrupts_at_any_time_lose_nothing(layer, config):
    """The timer strikes anywhere; a step is repeated if the cache says that it did not happen."""
    torch.manual_seed(0)
    layer, cache = layer(config).double(), DSACache(config, 120, dtype=torch.float64)
    hidden = torch.randn(120, 64, dtype=torch.float64)
    expected = layer(hidden)

    class Interrupt(Exception):
        pass

    def strike(number, frame):
        raise Interrupt

    before, struck = signal.signal(signal.SIGALRM, strike), 0
    try:
        for t in range(120):
            out = None
            for delay in (1e-4, 3e-4, 6e-4, 0):
                try:
                    signal.setitimer(signal.ITIMER_REAL, delay * (1 + t % 7 / 3))
                    out = layer(hidden[t : t + 1], cache=cache)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except Interrupt:
                    struck += 1
                signal.setitimer(signal.ITIMER_REAL, 0)
                assert cache.lengths[0] in (t, t + 1)
                if out is not None:
                    break
                cache.truncate(t)  # the timer struck after the layer's last line, before its result was here
            torch.testing.assert_close(out, expected[t : t + 1])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert struck > 10


OUT_OF_MEMORY = """
import resource, torch
from sparse_attn import DSACache, DSAConfig, SparseGQA
torch.set_num_threads(1)
config = DSAConfig(hidden_size=512, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
                   index_n_heads=4, index_head_dim=32, index_topk=16, indexer_rope="half")
with torch.inference_mode():
    layer, cache = SparseGQA(config), DSACache(config, 40_000)
    some, many = torch.randn(50, 512), torch.randn(30_000, 512)
    layer(some, cache=cache)
    status = open("/proc/self/status").read()
    limit = int(status.split("VmSize:")[1].split()[0]) * 1024 + (96 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        layer(many, cache=cache)
    except RuntimeError as error:
        assert "allocate" in str(error), error
    else:
        raise SystemExit("memory sufficed")
    assert cache.lengths == (50,)
    new = torch.randn(3, 512)
    expected = layer(torch.cat([some, new]))[-3:]
    torch.testing.assert_close(layer(new, cache=cache), expected, atol=1e-4, rtol=1e-4)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits its own address space")
def test_a_call_that_runs_out_of_memory():
    run(OUT_OF_MEMORY)


# Threads and processes


@pytest.mark.parametrize("torch_threads", [1, 2])
def test_python_threads_at_once(torch_threads):
    """Layers with caches of their own, and every function, from many threads, against one thread alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(torch_threads)
    index, mla, gqa = index_inputs(5, 300), mla_inputs(5, 60), gqa_inputs(5, 60)
    layers = [SparseMLA(MLA), SparseGQA(GQA)]

    def work(n: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(n)
        layer = layers[n % 2]
        cache, results = DSACache(layer.config, 64), []
        with torch.no_grad():
            for count in (40, 1, 3, 1):
                results.append(layer(torch.randn(count, 64, generator=generator), cache=cache))
            results.append(sparse_attn.index_logits(**index))
            results.append(sparse_attn.select_topk(results[-1], 20, index["ks"], index["ke"]))
            results.append(sparse_attn.lightning_topk(**index, topk=20))
            results += sparse_attn.sparse_mla(**mla, d_v=32, return_lse=True)
            results += sparse_attn.sparse_gqa(**gqa, return_lse=True)
        return results

    try:
        expected, found = [work(n) for n in range(8)], {}
        threads = [threading.Thread(target=lambda n=n: found.update({n: work(n)})) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(before)
    for n, results in enumerate(expected):
        torch.testing.assert_close(found[n], results, rtol=0, atol=1e-5, equal_nan=True)


FORK = """
import os, signal, sys, torch, sparse_attn
torch.set_num_threads(2)
def work():
    torch.manual_seed(0)
    q, k, weights = torch.randn(64, 4, 32), torch.randn(3000, 32), torch.randn(64, 4)
    ks, ke = torch.zeros(64, dtype=torch.int32), torch.full((64,), 3000, dtype=torch.int32)
    indices = sparse_attn.lightning_topk(q, k, weights, 32, ks, ke)
    return sparse_attn.sparse_mla(q, k, indices, d_v=16)
used = sys.argv[1] == "used"
expected = work() if used else None
pid = os.fork()
if pid == 0:
    signal.alarm(60)  # a child that hangs is killed
    if used:
        torch.set_num_threads(1)  # as torch asks of a forked child: OpenMP's threads stayed with the parent
    out = work()
    os._exit(0 if expected is None or torch.equal(out, expected) else 3)
assert os.waitpid(pid, 0)[1] == 0
work()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("when", ["imported", "used"])
def test_a_forked_child_works(when):
    run(FORK, when)


def run(script: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or done.stdout or done.returncode
