"""The warp-specialised kernel for sm_90 on a GPU, against the fp64 reference.

    timeout 60 pytest -m gpu tests/test_gpu_hopper.py

Its partitions wait for each other: a mistake in its barriers hangs. So it has a file of its own, that can run
in a process of its own, with a timeout.
"""

import pytest
import torch

import sparse_attn
from sparse_attn import formats, reference
from sparse_attn.testing import INT_MAX, INT_MIN, assert_close, mla_inputs

DEVICE = "cuda"


def why_not():
    """The reason why the kernel cannot run here, or None."""
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    if torch.cuda.get_device_capability() != (9, 0):
        return "needs a GPU of sm_90, got sm_{}{}".format(*torch.cuda.get_device_capability())
    triton = pytest.importorskip("triton")
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9):
        return f"needs Triton 3.9 or newer, got {triton.__version__}"
    return None


if reason := why_not():
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.gpu

BF16, NAN, INF = torch.bfloat16, float("nan"), float("inf")
D_QK, D_V, SCALE = 576, 512, 0.05
TOPK, S_KV = 2048, 20_032


def int32(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def lengths(s_q, longest):
    """For topk_length: a part of the row, more than it, nothing, negative."""
    kinds = [longest - 1, longest // 2, INT_MAX, 1, longest, 0, INT_MIN, 64, 129]
    return int32(*(kinds[t % len(kinds)] for t in range(s_q)))


def sinks(heads):
    sink = torch.randn(heads, device=DEVICE)
    sink[:3] = torch.tensor([INF, -INF, 30.0])
    return sink


def case(s_q, heads, topk=TOPK, seed=0, **more):
    """NaN in all that nobody selects, indices of every invalid kind; of several queries the last has no valid
    index, and the one before none in its first 192.
    """
    made = mla_inputs(max(s_q, 2), S_KV, 1, topk, D_QK, dtype=BF16, device=DEVICE, seed=seed)
    inputs = {"kv": made["kv"], "indices": made["indices"][:s_q], **more}
    if s_q > 1:
        inputs["indices"][-2, :192] = -1
    return {"q": torch.randn(s_q, heads, D_QK, device=DEVICE).to(BF16), **inputs}


def extra_segment(s_q, topk, lengths=None):
    made = case(s_q, 64, topk, seed=1)
    segment = {"extra_kv": made["kv"], "extra_indices": made["indices"]}
    return segment if lengths is None else {**segment, "extra_topk_length": lengths}


def pack(kv, page_size=64):
    """Pages of 656 bytes per token; a row of NaN becomes 0xFF: NaN in codes, scales and RoPE part."""
    made = formats.pack_v32_kv(kv.nan_to_num(), power_of_two=False)
    made[kv.isnan().any(-1)] = 0xFF
    return made.unflatten(0, (-1, page_size))


def packed(inputs, page_size=64):
    return {n: pack(x, page_size) if n in ("kv", "extra_kv") else x for n, x in inputs.items()}


def unpacked(inputs):
    """As the kernel computes: fp32 products, rounded to bf16."""
    return {
        n: formats.unpack(x, BF16).flatten(0, 1) if n in ("kv", "extra_kv") and x.dtype == torch.uint8 else x
        for n, x in inputs.items()
    }


@pytest.fixture(autouse=True)
def warp_specialised(monkeypatch):
    """For all that it can compute."""
    monkeypatch.setattr("sparse_attn.kernels.configs.WARP_SPECIALISED", "all")


@pytest.fixture
def plain(monkeypatch):
    """Runs the other kernel on the same inputs."""

    def run_plain(inputs):
        with monkeypatch.context() as patch:
            patch.setattr("sparse_attn.kernels.configs.WARP_SPECIALISED", "none")
            return run(inputs)

    return run_plain


def run(inputs, **options):
    options = {"d_v": D_V, "softmax_scale": SCALE, **options}
    return sparse_attn.sparse_mla(**inputs, **options, return_lse=True, return_max_logits=True)


def check(inputs):
    """Some of the rows against the fp64 reference, then the same call once more: not one bit may change."""
    actual = run(inputs)
    s_q = len(inputs["q"])
    t = torch.linspace(0, s_q - 1, min(s_q, 12)).round().long().to(DEVICE)
    t = torch.cat([t, t[-1:] - int(s_q > 1)])  # the row before the last too
    rows = {n: x if n in ("kv", "extra_kv", "attn_sink") else x[t] for n, x in unpacked(inputs).items()}
    rows["q"] = rows["q"].double()  # the reference gathers first, and computes in the dtype of q
    expected = reference.sparse_mla(**rows, d_v=D_V, softmax_scale=SCALE)
    assert_close(actual[0][t], expected[0], factor=2.5)  # probabilities are rounded to bf16 too
    for found, right in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(found[t].double(), right, rtol=1e-3, atol=1e-3)
    assert not any(x.isnan().any() for x in actual), "NaN in a row that was not compared"
    for _ in range(2):
        assert all(torch.equal(x, y) for x, y in zip(run(inputs), actual, strict=True)), "it does not repeat"


def check_packed(inputs, page_size=64):
    """As check, over quantised caches, whose values in bf16 give the same bits."""
    inputs = packed(inputs, page_size)
    check(inputs)
    for found, other in zip(run(inputs), run(unpacked(inputs)), strict=True):
        assert torch.equal(found, other), "not what its values in bf16 give"


OF_BOTH_CACHES = pytest.mark.parametrize("check", [check, check_packed], ids=["bf16", "packed"])


@OF_BOTH_CACHES
@pytest.mark.parametrize("s_q", [1, 37, 300])
@pytest.mark.parametrize("heads", [20, 64, 128])
def test_one_segment(heads, s_q, check):
    check(case(s_q, heads))


@OF_BOTH_CACHES
@pytest.mark.parametrize("topk", [0, 1, 63, 64, 65, 127, 128, 129, 257, 2047])
def test_partial_tiles(topk, check):
    for s_q in (1, 9):
        check(case(s_q, 64, topk))


@OF_BOTH_CACHES
@pytest.mark.parametrize("s_q", [1, 37, 300])
@pytest.mark.parametrize("heads", [64, 128])
def test_every_option(heads, s_q, check):
    for topk, extra in ((TOPK, 128), (1000, 77), (65, 2047)):
        more = extra_segment(s_q, extra, lengths(s_q, extra).flip(0))
        check(case(s_q, heads, topk, topk_length=lengths(s_q, topk), attn_sink=sinks(heads), **more))


def test_a_second_segment_alone():
    for extra in (1, 64, 200, 2048):
        check(case(37, 128, 300, **extra_segment(37, extra)))
        check(case(37, 128, 300, topk_length=int32(*[0] * 37), **extra_segment(37, extra)))


def test_lengths_and_sinks():
    check(case(40, 64, 300, topk_length=lengths(40, 300)))
    check(case(40, 64, 300, attn_sink=sinks(64)))


def test_scores_that_grow_and_shrink():
    """The maximum moves in every tile, in both directions."""
    inputs = case(2, 64, 512)
    inputs["kv"] = torch.randn(512, D_QK, device=DEVICE).mul(
        torch.linspace(0.1, 20, 512, device=DEVICE)[:, None]
    )
    inputs["kv"] = inputs["kv"].to(BF16)
    inputs["indices"][0] = torch.arange(512)
    inputs["indices"][1] = torch.arange(511, -1, -1)
    check(inputs)


def test_strided_rows():
    inputs = case(37, 64, 300)
    for name in ("q", "kv"):
        wide = torch.full((*(2 * n for n in inputs[name].shape[:-1]), D_QK), NAN, dtype=BF16, device=DEVICE)
        inputs[name] = wide[(slice(1, None, 2),) * (wide.dim() - 1)].copy_(inputs[name])
    inputs["indices"] = inputs["indices"].repeat_interleave(3, 1)[:, ::3]
    check(inputs)


def test_a_cache_beyond_32_bits():
    """9 GB, of which the selected rows are not NaN."""
    kv = torch.empty(8_000_000, D_QK, dtype=BF16, device=DEVICE)  # NaN, by the fixture poisoned_memory
    inputs = case(40, 64, 700)
    indices = torch.randint(0, len(kv), inputs["indices"].shape, device=DEVICE, dtype=torch.int32)
    indices[:, 0], indices[:, 1], indices[0, 2] = len(kv) - 1, INT_MIN, len(kv)
    slots = indices[(indices >= 0) & (indices < len(kv))].unique().long()
    kv[slots] = torch.randn(len(slots), D_QK, device=DEVICE).to(BF16)
    check({**inputs, "kv": kv, "indices": indices})


@pytest.mark.parametrize("page_size", [1, 2, 313])
def test_pages_of_packed_rows(page_size):
    check_packed(case(37, 64, 300, **extra_segment(37, 200)), page_size)


def test_packed_rows_and_pages_apart():
    inputs = packed(case(37, 64, 300))
    kv = inputs["kv"]
    check({**inputs, "kv": kv.flatten(0, 1)[:, None]})
    wide = torch.full((2 * len(kv), 64, 656 + 16), 0xFF, dtype=torch.uint8, device=DEVICE)
    apart = wide[1::2, :, 16:].copy_(kv)
    check({**inputs, "kv": apart})
    assert all(torch.equal(x, y) for x, y in zip(run(inputs), run({**inputs, "kv": apart}), strict=True))


def test_every_code_of_every_scale():
    """One key for each query: the value is the result."""
    code = torch.randint(0, 127, (S_KV, 512), device=DEVICE) + 128 * torch.randint(
        0, 2, (S_KV, 512), device=DEVICE
    )
    kv = torch.zeros(S_KV, 656, dtype=torch.uint8, device=DEVICE)
    kv[:, :512] = code.to(torch.uint8)
    kv[:, 512:528].view(torch.float32).copy_(
        torch.exp2(torch.empty(S_KV, 4, device=DEVICE).uniform_(-100, 100))
    )
    kv = kv.unflatten(0, (-1, 64))
    q = torch.zeros(S_KV, 64, D_QK, dtype=BF16, device=DEVICE)
    indices = torch.randperm(S_KV, device=DEVICE).int()[:, None]
    out = run({"q": q, "kv": kv, "indices": indices})[0]
    value = unpacked({"kv": kv})["kv"][indices[:, 0].long(), :D_V]
    assert (out == value[:, None]).all()


def test_a_packed_cache_beyond_32_bits():
    """5.2 GB, of which the selected rows are not NaN."""
    kv = torch.full((125_000, 64, 656), 0xFF, dtype=torch.uint8, device=DEVICE)
    inputs, slots = case(40, 64, 700), kv.shape[:-1].numel()
    indices = torch.randint(0, slots, inputs["indices"].shape, device=DEVICE, dtype=torch.int32)
    indices[:, 0], indices[:, 1], indices[0, 2] = slots - 1, INT_MIN, slots
    valid = (indices >= 0) & (indices < slots)
    used, place = indices[valid].long().unique(return_inverse=True)
    few = torch.randn(len(used), D_QK, device=DEVICE).to(BF16)
    made = pack(few, 1)
    kv.view(-1, 656)[used] = made[:, 0]
    compact = torch.full_like(indices, -1)
    compact[valid] = place.int()
    small = {**inputs, "kv": made, "indices": compact}
    check(small)
    found = run({**inputs, "kv": kv, "indices": indices})
    assert all(torch.equal(x, y) for x, y in zip(found, run(small), strict=True))


def test_packed_rows_agree_with_the_other_kernel(plain):
    inputs = case(300, 128, topk_length=lengths(300, TOPK), attn_sink=sinks(128), **extra_segment(300, 130))
    inputs = packed(inputs)
    for found, other in zip(run(inputs), plain(inputs), strict=True):
        torch.testing.assert_close(found.float(), other.float(), rtol=2e-2, atol=2e-3)


def test_many_calls_over_packed_rows_beside_a_busy_stream():
    inputs = packed(case(64, 128, 1000))
    first = run(inputs)
    torch.cuda.synchronize()
    x, other = torch.randn(2048, 2048, device=DEVICE).to(BF16), torch.cuda.Stream()
    with torch.cuda.stream(other):
        for _ in range(50):
            x = (x @ x).clamp(-1, 1)
    for _ in range(50):
        assert all(torch.equal(x, y) for x, y in zip(run(inputs), first, strict=True))
    torch.cuda.synchronize()


def test_it_agrees_with_the_other_kernel(plain):
    inputs = case(300, 128, topk_length=lengths(300, TOPK), attn_sink=sinks(128), **extra_segment(300, 130))
    for found, other in zip(run(inputs), plain(inputs), strict=True):
        torch.testing.assert_close(found.float(), other.float(), rtol=2e-2, atol=2e-3)


def test_many_calls_beside_a_busy_stream():
    inputs = case(64, 128, 1000)
    first = run(inputs)
    torch.cuda.synchronize()
    x, other = torch.randn(2048, 2048, device=DEVICE).to(BF16), torch.cuda.Stream()
    with torch.cuda.stream(other):
        for _ in range(50):
            x = (x @ x).clamp(-1, 1)
    for _ in range(50):
        assert all(torch.equal(x, y) for x, y in zip(run(inputs), first, strict=True))
    torch.cuda.synchronize()


def test_a_graph_follows_its_inputs():
    inputs = case(64, 64, 1000)
    inputs["kv"].normal_()
    run(inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(inputs)
    for name in ("q", "kv", "indices"):
        inputs[name].copy_(inputs[name].roll(1, 0))
    graph.replay()
    replayed = [x.clone() for x in outputs]
    assert all(torch.equal(x, y) for x, y in zip(replayed, run(inputs), strict=True))


def test_it_does_not_wait_for_the_gpu():
    inputs = case(5, 64, attn_sink=sinks(64), topk_length=lengths(5, TOPK))
    run(inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
