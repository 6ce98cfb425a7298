"""The C++ kernels, on each instruction set of this machine: what the tests of every backend do not cover."""

import ctypes
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import sparse_attn
from sparse_attn import formats, ops, reference
from sparse_attn.ops.attention import SparseMLAOp
from sparse_attn.ops.backends import native
from sparse_attn.ops.backends import torch as torch_backend
from sparse_attn.ops.writers import QuantiseIndexQOp, WriteKVOp
from sparse_attn.testing import (
    ADVERSARIAL_LOGITS,
    adversarial_logits,
    assert_close,
    gqa_inputs,
    index_inputs,
    mla_inputs,
    to_pages,
)

ROOT = Path(__file__).resolve().parents[1]
FLOATS = [torch.bfloat16, torch.float16, torch.float32]
WORDS = [torch.bfloat16, torch.float32]

if not native.instruction_sets():
    pytest.skip("the C++ library was not built here", allow_module_level=True)


@pytest.fixture(params=native.instruction_sets())
def isa(request):
    with native.use(request.param):
        yield request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def only_cpp(monkeypatch):
    """The torch path raises: only the C++ library can compute."""

    def fail(a):
        raise AssertionError("torch was to do the work")

    for name in ("index_logits", "select_topk", "sparse_mla", "sparse_gqa"):
        monkeypatch.setattr(torch_backend, name, fail)
    for name in native.WRITERS:
        monkeypatch.setattr(reference, name, fail)
    ops.implementation.cache_clear()
    yield
    ops.implementation.cache_clear()


def wide(inputs):
    """The same in fp64, but for the sink, which is fp32 always."""
    wide = {n: t for n, t in inputs.items() if isinstance(t, torch.Tensor)}
    return {n: t.double() if t.is_floating_point() and n != "attn_sink" else t for n, t in wide.items()}


def assert_attention(function, inputs, factor=1.2, exact_kv=None, **options):
    """Output, lse and so on are those of the definition in fp64, which reads ``exact_kv`` if given."""
    exact = wide(inputs if exact_kv is None else {**inputs, "kv": exact_kv})
    out, *logits = function(**inputs, **options, return_lse=True)
    expected, *expected_logits = function(**exact, **options, return_lse=True, backend="reference")
    assert_close(out, expected, factor)
    torch.testing.assert_close([x.double() for x in logits], expected_logits, rtol=1e-5, atol=1e-5)


def assert_selected(logits, topk, ks, ke, case=None):
    expected = reference.select_topk(logits, topk, ks, ke)
    assert torch.equal(sparse_attn.select_topk(logits, topk, ks, ke), expected), case


def test_the_fastest_instruction_set_is_in_use():
    # The second on Intel without AMX, which skips its slow bf16 dots.
    assert native.instruction_set() in native.instruction_sets()[:2]
    assert native.instruction_sets()[-1] == "portable"
    with native.use("portable"):
        assert native.instruction_set() == "portable"
        with native.use(None):
            assert native.instruction_set() is None and not native.available()
        assert native.available()
    with pytest.raises(ValueError, match="name: expected one of"), native.use("mmx"):
        pass


def test_calls_really_reach_the_library(isa, only_cpp):
    ks, ke = torch.tensor([[0], [3]], dtype=torch.int32)
    picked = sparse_attn.select_topk(torch.tensor([[1.0, 3.0, 2.0]]), 2, ks, ke)
    assert picked.tolist() == [[1, 2]]


def test_vectors_with_gaps_stay_with_the_library(only_cpp):
    q, k, weights = torch.randn(5, 4, 32), torch.randn(90, 32), torch.rand(5, 4)
    ranges = torch.stack([torch.arange(5), torch.arange(80, 85)], 1).int()
    ks, ke = ranges.unbind(1)
    indices = sparse_attn.lightning_topk(q, k, weights, 20, ks, ke)
    assert torch.equal(indices, sparse_attn.lightning_topk(q, k, weights, 20, ks.clone(), ke.clone()))
    options = {"topk_length": ranges[:, 1] - 70, "attn_sink": torch.randn(4)}
    gaps = {name: x.repeat_interleave(2)[::2] for name, x in options.items()}
    assert torch.equal(*(sparse_attn.sparse_mla(q, k, indices, d_v=16, **x) for x in (options, gaps)))


def test_writers_reach_the_library(isa, only_cpp):
    turn = {"cos": torch.ones(3, 32), "sin": torch.zeros(3, 32), "pairing": "half"}
    slots = torch.arange(6)[::2]  # gaps in it are closed, and nothing else is copied
    rows, cache = torch.randn(3, 576), torch.zeros(2, 4, 576)
    sparse_attn.write_kv(rows, cache, slots, **turn)
    assert torch.equal(cache.flatten(0, 1)[slots], rows)
    packed = formats.pack_index_k(torch.zeros(2, 4, 128))
    sparse_attn.write_index_k(rows[:, :128], packed, slots, hadamard=False, **turn)
    codes, _ = sparse_attn.quantise_index_q(rows[:, None, :128], torch.ones(3, 1), hadamard=False, **turn)
    keys = formats.index_k_views(packed)[0].flatten(0, 1).view(torch.uint8)
    assert torch.equal(keys[slots], codes[:, 0].view(torch.uint8)) and keys.any()


# Accuracy at the shapes of models


@pytest.mark.parametrize("h_q", [1, 8, 9, 16, 48, 128])
@pytest.mark.parametrize("d_qk", [576, 512])
@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_mla_at_model_shapes(isa, h_q, d_qk, spread):
    inputs = mla_inputs(2, 3000, h_q, 2048, d_qk, dtype=torch.bfloat16)
    inputs["q"] *= spread
    inputs["kv"] = torch.randn(3000, d_qk).bfloat16()
    inputs["indices"] = torch.stack([torch.randperm(3000)[:2048] for _ in range(2)]).int()
    # These round the probabilities of long rows to bf16: an error as large as rounding the output.
    factor = 1.45 if isa in ("avx512bf16", "neon_bf16") and spread < 1 else 1.2
    assert_attention(sparse_attn.sparse_mla, inputs, factor, d_v=512, return_max_logits=True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "h_q, h_kv, d", [(32, 8, 128), (24, 2, 256), (16, 16, 64), (10, 2, 96), (64, 1, 128), (16, 2, 72)]
)
@pytest.mark.parametrize("per_head", [False, True])
def test_gqa_at_model_shapes(isa, dtype, h_q, h_kv, d, per_head):
    inputs = gqa_inputs(2, 900, h_q, h_kv, 500, d, d, dtype=dtype, per_head=per_head)
    assert_attention(sparse_attn.sparse_gqa, inputs)
    by_head = {name: inputs[name].transpose(0, 1).contiguous().transpose(0, 1) for name in "kv"}
    assert torch.equal(sparse_attn.sparse_gqa(**inputs), sparse_attn.sparse_gqa(**{**inputs, **by_head}))


@pytest.mark.parametrize("dtype", WORDS)
@pytest.mark.parametrize("softmax_scale", [0.0, -0.3])
def test_any_softmax_scale(isa, dtype, softmax_scale):
    for h_q in (1, 3, 8, 16):
        for topk in (3, 64, 97):  # blocks that padding fills up, and whole ones
            inputs = gqa_inputs(2, 300, h_q, 1, topk, 32, 32, dtype=dtype)
            assert_attention(sparse_attn.sparse_gqa, inputs, softmax_scale=softmax_scale)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("h_q", [1, 8, 16, 100])
@pytest.mark.parametrize("power_of_two", [True, False])
def test_quantised_latent_read_in_place(isa, dtype, h_q, power_of_two, only_cpp):
    kv = torch.randn(700, 576) * torch.logspace(-3, 0, 700)[:, None]
    packed = formats.pack_v32_kv(kv, power_of_two=power_of_two)
    packed[:256, 0] = torch.arange(256, dtype=torch.uint8)  # every code
    indices = torch.stack([torch.randperm(700)[:300] for _ in range(3)]).int()
    indices[:, ::7] = 10**9
    inputs = {
        "q": (torch.randn(3, h_q, 576) / 10).to(dtype),
        "kv": packed.view(7, 100, 1, 656),
        "indices": indices.masked_fill((indices == 0x7F) | (indices == 0xFF), -1),  # NaN
        "topk_length": torch.tensor([300, 0, 77], dtype=torch.int32),
        "attn_sink": torch.randn(h_q),
    }
    assert_attention(sparse_attn.sparse_mla, inputs, exact_kv=formats.unpack(packed, torch.float64))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("h_q", [3, 40])
@pytest.mark.parametrize("name", formats.KV_FORMATS)
def test_every_latent_format_read_in_place(isa, dtype, h_q, name, only_cpp):
    """And beside it rows of the dtype, in pages that lie apart."""
    fmt = formats.KV_FORMATS[name]
    inputs = mla_inputs(3, 120, h_q, topk=100, d_qk=fmt.width, dtype=dtype)
    rows = inputs["kv"].nan_to_num()
    packed = fmt.pack(rows.view(15, 8, fmt.width))
    wide_rows = torch.full((15, 3, 8, fmt.width), float("nan"), dtype=dtype)
    wide_rows[:, 1] = rows.view(15, 8, fmt.width)
    exact = formats.unpack(packed, torch.float64, name).flatten(0, 1)
    inputs |= {"kv": packed, "kv_format": name}
    inputs |= {"extra_kv": wide_rows[:, 1], "extra_indices": inputs["indices"].flip(1)}
    assert_attention(sparse_attn.sparse_mla, inputs, exact_kv=exact)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("page_size, heads", [(64, 64), (1, 3), (37, 20)])
def test_quantised_index_keys_read_in_place(isa, dtype, page_size, heads, only_cpp):
    pages = 600 // page_size + 1
    packed = formats.pack_index_k(torch.randn(pages, page_size, 128), power_of_two=False)
    formats.index_k_views(packed)[1][3] *= -1  # scales that no packer writes
    inputs = {
        "q": torch.randn(4, heads, 128).to(dtype),
        "weights": torch.randn(4, heads),
        "ks": torch.tensor([0, 3, 100, 9], dtype=torch.int32),
        "ke": torch.tensor([600, 300, 101, 9], dtype=torch.int32),
        "block_table": torch.randperm(pages)[None].int(),
    }
    logits = sparse_attn.index_logits(**inputs, k=packed)
    assert_close(logits, reference.index_logits(**wide(inputs), k=formats.unpack(packed, torch.float64)))
    picked = sparse_attn.lightning_topk(**inputs, k=packed, topk=50)
    assert torch.equal(picked, sparse_attn.select_topk(logits, 50, inputs["ks"], inputs["ke"]))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("heads, d", [(64, 128), (32, 128), (70, 33)])
def test_logits_at_model_shapes(isa, dtype, heads, d):
    inputs = index_inputs(3, 2000, heads, d, dtype=dtype)
    assert_close(sparse_attn.index_logits(**inputs), reference.index_logits(**wide(inputs)))


def of_query(inputs, t):
    """The arguments of index_logits or sparse_gqa for one of their queries."""
    per_query = {"q", "weights", "ks", "ke", "indices", "topk_length"}
    return {name: x[t : t + 1] if name in per_query and x is not None else x for name, x in inputs.items()}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("heads", range(1, 10))
@pytest.mark.parametrize("d", [7, 33, 64])
def test_few_index_heads_score_a_query_alike_alone_and_beside_others(isa, dtype, heads, d):
    group = 192 // heads  # queries that are scored together, at most
    inputs = index_inputs(2 * group + 1, 150, heads, d, dtype=dtype)
    assert_close(sparse_attn.index_logits(**inputs), reference.index_logits(**wide(inputs)))
    inputs["k"][60:80] = float("nan")  # some queries see them, some do not
    inputs["ke"][::3] = 60
    together = sparse_attn.index_logits(**inputs)
    assert not together[::3].isnan().any() and together.isnan().any()
    picked = sparse_attn.lightning_topk(**inputs, topk=20)
    assert torch.equal(picked, sparse_attn.select_topk(together, 20, inputs["ks"], inputs["ke"]))
    for t in (0, 1, group - 1, group, 2 * group):
        assert same_bits(sparse_attn.index_logits(**of_query(inputs, t)), together[t : t + 1])
        some = {name: x if name == "k" else x[t:] for name, x in inputs.items()}
        assert same_bits(sparse_attn.index_logits(**some), together[t:])


@pytest.mark.parametrize("dtype", WORDS)
@pytest.mark.parametrize("page_size", [1, 7, 64])
def test_few_index_heads_in_pages_of_several_sequences(isa, dtype, page_size):
    ends = torch.tensor([0, 1, 1, 40, 49], dtype=torch.int32)  # the last query belongs to no sequence
    inputs = index_inputs(50, 300, 4, 40, dtype=dtype)
    k, table = to_pages(inputs.pop("k").nan_to_num(), page_size)
    tables = table.repeat(4, 1)
    tables[3] = tables[3].flip(0)
    tables[:, 3] = -1
    tables[2, 1] = len(k)
    together = sparse_attn.index_logits(**inputs, k=k, block_table=tables, cu_seqlens_q=ends)
    assert (together[-1] == -torch.inf).all() and (
        together[1:40, page_size : 2 * page_size] == -torch.inf
    ).all()
    for t in range(49):
        row = int((ends[1:] <= t).sum())
        alone = sparse_attn.index_logits(**of_query(inputs, t), k=k, block_table=tables[row : row + 1])
        assert same_bits(alone, together[t : t + 1])


@pytest.mark.parametrize("dtype", WORDS)
def test_a_prefill_that_copies_the_rows_of_a_head(isa, dtype):
    """Those of all heads fill more than 16 MB; a single query reads them where they are."""
    inputs = gqa_inputs(64, 4200 if dtype == torch.bfloat16 else 2100, 16, 8, 600, 128, 128, dtype=dtype)
    together = sparse_attn.sparse_gqa(**inputs, return_lse=True)
    for t in (0, 31, 63):
        alone = sparse_attn.sparse_gqa(**of_query(inputs, t), return_lse=True)
        assert same_bits(alone, [part[t : t + 1] for part in together])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("heads", [5, 64])
def test_infinities_in_a_visible_key_follow_the_definition(isa, dtype, heads):
    inputs = index_inputs(2, 40, heads, 32, dtype=dtype)
    inputs["ks"].zero_()
    inputs["ke"].fill_(40)
    inputs["k"].nan_to_num_()
    inputs["q"].abs_().add_(1)
    inputs["weights"].abs_()
    inputs["k"][3] = float("inf")
    inputs["k"][4] = -float("inf")
    logits = sparse_attn.index_logits(**inputs)
    assert torch.isposinf(logits[:, 3]).all() and (logits[:, 4] == 0).all()
    assert logits.isfinite().sum() == 2 * 39


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("h_q", [2, 20])
def test_a_nan_in_a_selected_row_shows(isa, dtype, h_q):
    inputs = mla_inputs(1, 30, h_q, 6, 40, dtype=dtype)
    inputs["kv"].nan_to_num_()
    inputs["indices"] = torch.tensor([[1, 2, 3, 4, 5, 6]], dtype=torch.int32)
    inputs["kv"][4, 39] = float("nan")  # in the key only, not in the value
    out, lse = sparse_attn.sparse_mla(**inputs, d_v=32, return_lse=True)
    assert out.isnan().all() and lse.isnan().all()


# Selection, bit for bit


def selection_cases(count):
    """Lengths from 0 to 20,000, k on both sides of them, every adversarial kind, every sort of range."""
    g = torch.Generator().manual_seed(0)
    for seed in range(count):
        longest = (40, 700, 5000, 20000)[seed % 4]
        s_kv, topk = (int(torch.randint(low, longest + 1, (), generator=g)) for low in (0, 1))
        topk = topk if seed % 3 else max(1, topk // 8)
        logits = adversarial_logits(ADVERSARIAL_LOGITS[seed % len(ADVERSARIAL_LOGITS)], 2, s_kv, seed)
        ks = torch.randint(-5, s_kv // 4 + 1, (2,), generator=g, dtype=torch.int32)
        ke = torch.randint(s_kv // 2, s_kv + 9, (2,), generator=g, dtype=torch.int32)
        yield logits, topk, ks, ke


def test_a_thousand_selections_equal_the_reference(isa):
    for number, case in enumerate(selection_cases(1000)):
        assert_selected(*case, f"case {number}")


@pytest.mark.parametrize("kind", ADVERSARIAL_LOGITS)
def test_selections_from_a_million(isa, kind):
    logits = adversarial_logits(kind, 1, 1 << 20)
    ks, ke = torch.tensor([[3], [(1 << 20) - 2]], dtype=torch.int32)
    assert_selected(logits, 2048, ks, ke)


def test_a_misleading_sample_changes_nothing(isa):
    """Large values are adjacent or at a fixed stride, so that a threshold from sampled runs is wrong."""
    logits = torch.randn(3, 30000)
    logits[0, 1000:3000] += 50
    logits[1, 5000:15000] += 50
    logits[2, ::17] = 60
    ks, ke = torch.zeros(3, dtype=torch.int32), torch.full((3,), 30000, dtype=torch.int32)
    for topk in (1, 100, 2048, 7400):
        assert_selected(logits, topk, ks, ke)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("heads, d", [(64, 128), (3, 40), (17, 33)])
@pytest.mark.parametrize("page_size", [None, 1, 7, 64])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_fused_equals_scoring_then_selecting(isa, threads, dtype, heads, d, page_size, n_threads):
    threads(n_threads)
    inputs = index_inputs(5, 1500, heads, d, dtype=dtype)
    if page_size:
        pages, table = to_pages(inputs.pop("k"), page_size)
        inputs.update(k=pages, block_table=table)
    logits = sparse_attn.index_logits(**inputs)
    unfused = sparse_attn.select_topk(logits, 100, inputs["ks"], inputs["ke"])
    for workspace_bytes in (1, 1 << 16, 1 << 28):
        fused = sparse_attn.lightning_topk(**inputs, topk=100, workspace_bytes=workspace_bytes)
        assert torch.equal(fused, unfused)


# Threads


def outputs_of_everything(dtype, s_q):
    index = index_inputs(s_q, 3000, 64, 128, dtype=dtype)
    logits = sparse_attn.index_logits(**index)
    results = [logits, sparse_attn.lightning_topk(**index, topk=300)]
    for h_q in (4, 128):
        results += sparse_attn.sparse_mla(**mla_inputs(s_q, 900, h_q, 300, 576, dtype=dtype), return_lse=True)
    for h_q, h_kv in ((32, 8), (40, 2)):
        for per_head in (False, True):
            inputs = gqa_inputs(s_q, 900, h_q, h_kv, 300, 64, 64, dtype=dtype, per_head=per_head)
            results += sparse_attn.sparse_gqa(**inputs, return_lse=True)
    return results


def same_bits(one, other):
    return all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", WORDS)
@pytest.mark.parametrize("s_q", [1, 7])
def test_results_do_not_depend_on_the_number_of_threads(isa, threads, dtype, s_q):
    threads(1)
    one = outputs_of_everything(dtype, s_q)
    for n in (2, 3, 16):
        threads(n)
        assert same_bits(outputs_of_everything(dtype, s_q), one)


def test_two_python_threads_at_once(isa):
    expected = {dtype: outputs_of_everything(dtype, 3) for dtype in WORDS}
    wrong = []

    def work(dtype):
        for _ in range(5):
            if not same_bits(outputs_of_everything(dtype, 3), expected[dtype]):
                wrong.append(dtype)

    workers = [threading.Thread(target=work, args=(dtype,)) for dtype in WORDS * 2]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_one_openmp_runtime_is_loaded():
    script = "import sparse_attn.doctor as d; d.native.available(); print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    runtimes = {line.split()[-1] for line in maps.splitlines() if "libgomp" in line or "libomp" in line}
    assert len(runtimes) <= 1, runtimes


# A library built from other sources is refused


@pytest.fixture
def library_loads_anew():
    native._library.cache_clear()
    yield
    native._library.cache_clear()


@pytest.mark.parametrize("name", native._STRUCTURES)
def test_a_library_with_other_structures_is_refused(name, library_loads_anew, monkeypatch):
    class Longer(native._STRUCTURES[name]):
        _fields_ = (("one_more", ctypes.c_void_p),)

    monkeypatch.setitem(native._STRUCTURES, name, Longer)
    theirs = ctypes.sizeof(Longer) - 8
    for _ in range(2):  # at every call, not only at the first
        with pytest.raises(ImportError, match=rf"built from other sources \({name}: {theirs} bytes there"):
            sparse_attn.sparse_mla(**mla_inputs(3, 20), d_v=32)


def test_every_structure_is_known_to_the_library():
    library = native._library()
    for name, structure in native._STRUCTURES.items():
        assert library.sizeof(name.encode()) == ctypes.sizeof(structure)
    assert library.sizeof(b"Nothing") == -1


# What it does not take goes to torch


def test_what_torch_must_do():
    q, kv = torch.zeros(2, 4, 40), torch.zeros(9, 40)
    indices, out, lse = torch.zeros(2, 5, dtype=torch.int32), torch.zeros(2, 4, 32), torch.zeros(2, 4)
    a = SparseMLAOp(q, kv, indices, 32, 1.0, out, lse, lse)
    assert native.refuses("sparse_mla", a) is None
    gaps = a._replace(kv=kv.T.contiguous().T)
    assert "kv: expected a contiguous last dimension" in native.refuses("sparse_mla", gaps)
    written = WriteKVOp(torch.zeros(2, 576), torch.arange(2), 1e-6, True, 1e-6, torch.zeros(1, 2, 576))
    assert native.refuses("write_kv", written) is None
    fp64_weight = written._replace(norm_weight=torch.ones(512, dtype=torch.float64))
    assert "torch.float64" in native.refuses("write_kv", fp64_weight)
    wide = QuantiseIndexQOp(torch.zeros(1, 1, 2048), lse, True, True, 1e-6, lse, lse)
    assert "at most 1024 values" in native.refuses("quantise_index_q", wide)
    fp64 = a._replace(q=q.double(), kv=kv.double())
    assert "torch.float64" in native.refuses("sparse_mla", fp64)
    with native.use(None):
        assert "not in use" in native.refuses("sparse_mla", a)


# Memory


def build_driver(driver, options, units=None):
    """tests/native_driver.cpp with every kernel, or only those units and portable."""
    spec = importlib.util.spec_from_file_location("setup_of_sparse_attn", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    if units is not None:
        setup.INSTRUCTION_SETS = {
            architecture: {name: flags for name, flags in sets.items() if name in units}
            for architecture, sets in setup.INSTRUCTION_SETS.items()
        }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        setup.build_library(driver, options, link=(), more_sources=["tests/native_driver.cpp"])


def run_driver(*command):
    """The instruction sets that it ran."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.split()


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_the_kernels_are_clean_under_sanitizers(tmp_path):
    driver, sets = tmp_path / "driver", native.instruction_sets()
    options = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    try:
        build_driver(driver, options, [f"isa_{name}" for name in sets])
    except subprocess.CalledProcessError as error:
        if "sanitize" in error.stderr or "asan" in error.stderr:
            pytest.skip("this compiler has no sanitizers")
        raise AssertionError(error.stderr) from None
    parts = list(itertools.product(sets, ["bf16", "fp16", "fp32"]))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ran = list(pool.map(lambda part: run_driver(driver, *part), parts))
    assert ran == [[name] for name, _ in parts]


@pytest.mark.skipif(shutil.which("clang++") is None, reason="clang++ is not installed")
def test_clang_builds_every_kernel(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "clang++")
    build_driver(tmp_path / "driver", ["-O1"])
    assert run_driver(tmp_path / "driver") == native.instruction_sets()


CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.skipif(
    not (shutil.which(CROSS_COMPILER) and shutil.which(EMULATOR)),
    reason=f"needs {CROSS_COMPILER} and {EMULATOR}",
)
@pytest.mark.slow
def test_the_kernels_for_arm64_run_under_an_emulator(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", CROSS_COMPILER)
    build_driver(tmp_path / "driver", ["-O1"])
    for cpu, sets in (("max", ["neon_bf16", "portable"]), ("cortex-a72", ["portable"])):
        emulator = [EMULATOR, "-L", "/usr/aarch64-linux-gnu", "-cpu", cpu]
        assert run_driver(*emulator, tmp_path / "driver") == sets
