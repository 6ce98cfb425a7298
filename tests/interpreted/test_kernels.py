"""What only the kernels can get wrong: tile edges, every configuration, strides, memory around the outputs.

The meaning of the operations at large is tested by tests/test_index.py and tests/test_sparse_attention.py,
which run in the interpreter too.
"""

import contextlib
import mmap

import pytest
import torch

from sparse_attn import formats, reference
from sparse_attn.kernels import configs
from sparse_attn.kernels import index_logits as index_kernel
from sparse_attn.kernels.index_logits import index_logits
from sparse_attn.kernels.merge_attention import merge_attention, merge_parts
from sparse_attn.kernels.sparse_gqa import sparse_gqa
from sparse_attn.kernels.sparse_mla import sparse_mla
from sparse_attn.ops.attention import MergeAttentionOp, SparseGQAOp, SparseMLAOp
from sparse_attn.ops.index import IndexLogitsOp
from sparse_attn.testing import (
    INT_MAX,
    INT_MIN,
    assert_close,
    assert_logits_close,
    gqa_inputs,
    index_inputs,
    mla_inputs,
    selection_indices,
    to_pages,
)

NAN, INF = float("nan"), float("inf")
MAP_NORESERVE = 0x4000  # Linux; the mmap module has the name from Python 3.13 on
FLOATS = [torch.bfloat16, torch.float16, torch.float32]
ARCHITECTURES = [80, 86, 90, 100, 120]
slow = pytest.mark.slow


@pytest.fixture(params=[pytest.param(sm, marks=[] if sm == 90 else slow) for sm in ARCHITECTURES])
def architecture(request, monkeypatch):
    monkeypatch.setattr(configs, "architecture", lambda device: request.param)
    return request.param


def wide(inputs):
    return {n: t.double() if torch.is_tensor(t) and t.is_floating_point() else t for n, t in inputs.items()}


def check(actual, expected):
    (out, *logits), (expected_out, *expected_logits) = actual, expected
    assert_close(out, expected_out, factor=2.5)  # probabilities are rounded to the input dtype too
    tolerance = 1e-5 if out.dtype == torch.float32 else 1e-3
    for tensor, right in zip(logits, expected_logits, strict=True):  # lse, and of sparse_mla max_logits
        torch.testing.assert_close(tensor.double(), right, rtol=tolerance, atol=tolerance)


def run_mla(inputs, d_v, out=None, lse=None, unpacked=None):
    """Launch into poisoned outputs and compare with the fp64 reference, over ``unpacked`` caches if given."""
    q, scale = inputs["q"], inputs["q"].shape[-1] ** -0.5
    out = q.new_full((*q.shape[:2], d_v), NAN) if out is None else out
    lse = torch.full(q.shape[:2], NAN) if lse is None else lse
    outputs = {"out": out, "lse": lse, "max_logits": torch.full_like(lse, NAN)}
    sparse_mla(SparseMLAOp(**inputs, d_v=d_v, softmax_scale=scale, **outputs))
    expected = wide({**inputs, **(unpacked or {})})
    check(outputs.values(), reference.sparse_mla(**expected, d_v=d_v, softmax_scale=scale))
    return out, lse


def run_gqa(inputs, out=None, lse=None):
    q, scale = inputs["q"], inputs["q"].shape[-1] ** -0.5
    out = q.new_full((*q.shape[:2], inputs["v"].shape[-1]), NAN) if out is None else out
    lse = torch.full(q.shape[:2], NAN) if lse is None else lse
    sparse_gqa(SparseGQAOp(**inputs, softmax_scale=scale, out=out, lse=lse))
    check((out, lse), reference.sparse_gqa(**wide(inputs), softmax_scale=scale))
    return out, lse


def run_index(inputs, block_table=None, out=None):
    k = inputs["k"]
    width = k.shape[0] if block_table is None else block_table.shape[1] * k.shape[1]
    out = torch.full((len(inputs["q"]), width), NAN) if out is None else out
    index_logits(IndexLogitsOp(**inputs, out=out, block_table=block_table))
    assert_logits_close(out, **inputs, block_table=block_table)
    return out


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


# Every configuration: a partial block of heads, partial and wholly invalid tiles, both segments.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("h_q", [1, 17, 70])
def test_mla_configurations(architecture, h_q, dtype):
    inputs = mla_inputs(3, 90, h_q, topk=201, dtype=dtype)
    inputs["indices"][0, 64:128] = -1  # no tile size sees a valid index here
    inputs["indices"][1, :128] = 90
    extra = mla_inputs(3, 40, h_q, topk=33, dtype=dtype, seed=1)
    inputs.update(extra_kv=extra["kv"], extra_indices=extra["indices"], extra_topk_length=int32(33, 0, 7))
    inputs.update(topk_length=int32(130, 201, 77), attn_sink=torch.randn(h_q))
    run_mla(inputs, d_v=24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("h_q, h_kv", [(3, 3), (80, 2)])
def test_gqa_configurations(architecture, h_q, h_kv, dtype):
    inputs = gqa_inputs(3, 90, h_q, h_kv, topk=201, d=40, d_v=24, per_head=True, dtype=dtype)
    inputs["indices"][0, :, 64:128] = -1
    inputs.update(topk_length=int32(130, 201, 77), attn_sink=torch.randn(h_q))
    run_gqa(inputs)


@pytest.mark.parametrize("dtype", FLOATS)
def test_index_configurations(architecture, dtype):
    run_index(index_inputs(4, 300, heads=17, d=40, dtype=dtype))


@pytest.mark.parametrize("h", [1, 17, 128])
def test_heads_of_the_indexer(h):
    run_index(index_inputs(3, 70, heads=h, d=128, dtype=torch.bfloat16))


@pytest.mark.parametrize("topk", [1, 33])
@pytest.mark.parametrize(
    "d_qk, d_v", [(576, 512), (512, 512), (40, 24), (576, 128), (320, 96), (600, 600), (640, 512)]
)
def test_mla_widths(d_qk, d_v, topk):
    run_mla(mla_inputs(2, 50, h_q=3, topk=topk, d_qk=d_qk, dtype=torch.bfloat16), d_v)


# Quantised caches: every code, scale and slot, on every architecture.

PAGE_SIZE = 8
E4M3 = torch.arange(256, dtype=torch.uint8)
FINITE = E4M3[(E4M3 & 0x7F) != 0x7F]


def packed_cache(size, codes, scales, ropes):
    """Pages of ``size`` bytes per token from the parts of its tokens; 0xFF, a NaN, in all other bytes."""
    slots = len(codes)
    pages, page_bytes = -(-slots // PAGE_SIZE), 64 + (584 if size == 584 else 656) * PAGE_SIZE
    cache = torch.full((pages * page_bytes,), 0xFF, dtype=torch.uint8)
    cache = cache.as_strided((pages, PAGE_SIZE, size), (page_bytes, size, 1))
    slot = torch.arange(slots)
    values, scale, rope = formats.views(cache)
    for part, source in ((values, codes.view(torch.float8_e4m3fn)), (scale, scales), (rope, ropes)):
        part[slot // PAGE_SIZE, slot % PAGE_SIZE] = source
    return cache


def unpacked(cache):
    """The rows ``[s_kv, d_qk]`` in fp64."""
    return formats.dequantise(*formats.views(cache), dtype=torch.float64).flatten(0, 1)


def quantised_parts(size, slots):
    codes = FINITE[torch.randint(len(FINITE), (slots, 512 if size == 656 else 448))]
    exponent = torch.randint(-12, -6, (slots, 4 if size == 656 else 7))
    scales = torch.exp2(exponent.float()) if size == 656 else (exponent + 127).byte()
    return codes, scales, torch.randn(slots, 64).bfloat16()


def quantised_segment(size, s_q, topk, slots=21):
    """A cache with NaN in every part of the slots that nobody selected, and indices."""
    indices = selection_indices(s_q, slots, topk, seed=topk)
    codes, scales, ropes = quantised_parts(size, slots)
    unused = torch.ones(slots, dtype=torch.bool)
    unused[indices[(indices >= 0) & (indices < slots)].long()] = False
    codes[unused], ropes[unused] = 0xFF, NAN
    scales[unused] = NAN if size == 656 else 255
    cache = packed_cache(size, codes, scales, ropes)
    return cache, torch.where(indices >= slots, cache.shape[0] * PAGE_SIZE, indices)


def run_quantised(inputs):
    rows = {n: unpacked(x) for n, x in inputs.items() if x.dtype == torch.uint8}
    return run_mla(inputs, 512, unpacked=rows)


@pytest.mark.parametrize("size", [656, 584])
@pytest.mark.parametrize("h_q, multiprocessors", [(5, 1), (33, 108)])
def test_quantised_caches(architecture, size, h_q, multiprocessors, monkeypatch):
    monkeypatch.setattr(configs, "multiprocessors", lambda device: multiprocessors)
    kv, indices = quantised_segment(size, 3, 130)
    extra_kv, extra_indices = quantised_segment(size, 3, 9)
    indices[0, 32:96] = -1  # no tile size sees a valid index here
    inputs = {
        **{"q": torch.randn(3, h_q, 576 if size == 656 else 512).bfloat16(), "kv": kv, "indices": indices},
        **{"extra_kv": extra_kv, "extra_indices": extra_indices, "extra_topk_length": int32(9, 0, 7)},
        **{"topk_length": int32(97, 130, 33), "attn_sink": torch.randn(h_q)},
    }
    run_quantised(inputs)


def test_segments_of_two_formats():
    kv, indices = quantised_segment(656, 2, 40)
    plain = mla_inputs(2, 30, 5, topk=40, d_qk=576, dtype=torch.bfloat16)
    extra = {"extra_kv": plain["kv"], "extra_indices": plain["indices"]}
    run_quantised({"q": plain["q"], "kv": kv, "indices": indices, **extra})
    run_quantised({**plain, "extra_kv": kv, "extra_indices": indices})


@pytest.mark.parametrize("size", [656, 584])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_code_and_scale(architecture, size, dtype):
    """One selected token per query: out is that token's value, bit for bit."""
    codes = FINITE.roll(7).repeat(3)[: 512 if size == 656 else 448].expand(12, -1)
    if size == 656:
        scales = torch.tensor([2.0**-12, 1.0, 0.37, 1e-4 / 448, 3e5, 2.0**100, 1e-38, 0.0])
    else:
        scales = torch.tensor([0, 1, 7, 118, 127, 128, 200, 246], dtype=torch.uint8)
    scales = torch.stack([scales.roll(i)[: 4 if size == 656 else 7] for i in range(12)])
    cache = packed_cache(size, codes, scales, torch.randn(12, 64).bfloat16())
    expected = unpacked(cache)[:12]
    q = torch.zeros(12, 1, expected.shape[1], dtype=dtype)
    out, lse = torch.full((12, 1, 512), NAN, dtype=dtype), torch.full((12, 1), NAN)
    indices = torch.arange(12, dtype=torch.int32)[:, None]
    sparse_mla(SparseMLAOp(q, cache, indices, 512, 1.0, out, lse, torch.empty_like(lse)))
    assert torch.equal(out[:, 0], expected[:, :512].float().to(dtype))
    assert (lse == 0).all()


@pytest.mark.parametrize("size", [656, 584])
@pytest.mark.parametrize("where", ["value", "scale", "rope"])
def test_nan_in_a_selected_token_shows(architecture, size, where):
    codes, scales, ropes = quantised_parts(size, 3)
    if where == "value":
        codes[1, 40] = 0xFF
    elif where == "scale":
        scales[1, 2] = NAN if size == 656 else 255
    else:
        ropes[1, 40] = NAN
    q = torch.randn(3, 2, 576 if size == 656 else 512).bfloat16()
    out, lse = torch.zeros(3, 2, 512).bfloat16(), torch.zeros(3, 2)
    indices = torch.tensor([[0, 2], [0, 1], [2, 2]], dtype=torch.int32)
    cache = packed_cache(size, codes, scales, ropes)
    sparse_mla(SparseMLAOp(q, cache, indices, 512, 0.1, out, lse, torch.empty_like(lse)))
    assert lse.isnan().any(1).tolist() == [False, True, False]
    assert not out[::2].isnan().any()


def test_tokens_of_656_bytes_may_lie_in_any_pages():
    codes, scales, ropes = quantised_parts(656, 16)
    gapped = packed_cache(656, codes, scales, ropes)
    inputs = {"q": torch.randn(3, 5, 576).bfloat16(), "indices": selection_indices(3, 16, 40)}
    out, lse = run_quantised({**inputs, "kv": gapped})
    for kv in (gapped.contiguous(), gapped.reshape(16, 1, 656)):
        same = run_quantised({**inputs, "kv": kv})
        assert torch.equal(out, same[0]) and torch.equal(lse, same[1])


@pytest.mark.parametrize("forms", ["e4m3 e4m3", "bf16 e4m3", "e2m1 e2m1", "e4m3 e2m1"])
@pytest.mark.parametrize("heads, page_size", [(5, None), (70, 48), (5, 64), (33, 128)])
def test_quantised_index_configurations(architecture, forms, heads, page_size):
    """The e4m3 product of sm_89 and newer, and everything that is decoded before."""
    inputs, table = index_inputs(5, 300, heads, 128, dtype=torch.bfloat16), None
    for name, form in zip("qk", forms.split(), strict=True):
        x = inputs[name]
        if form == "e4m3":
            inputs[name] = formats.to_e4m3(x.float())
            if name == "k":
                inputs["k_scale"] = torch.rand(300) + 0.1
        elif form == "e2m1":
            values = torch.empty(*x.shape[:-1], 64, dtype=torch.uint8)
            inputs[f"{name}_scale"] = torch.empty(*x.shape[:-1], 4, dtype=torch.uint8)
            formats.quantise(x, values, inputs[f"{name}_scale"], min_scale=1e-9)
            inputs[name] = values
    if page_size:
        pages = -(-300 // page_size)
        order = torch.randperm(pages)
        for name in ("k", "k_scale"):
            codes = inputs[name].contiguous().view(300, -1).view(torch.uint8)
            paged = codes.new_full((pages * page_size, codes.shape[1]), 0xFF)  # NaN
            paged[:300] = codes
            paged = paged.view(inputs[name].dtype).view(pages, page_size, *inputs[name].shape[1:])
            inputs[name] = paged.view(torch.uint8)[order.argsort()].view(paged.dtype)
        table = torch.cat([order, torch.tensor([-1, pages, INT_MAX])])[None].int()
        inputs["ke"].clamp_(max=300)
    run_index(inputs, table)


# Several programs per query: their number comes from shapes and the device alone.


def launches(queries, heads, slots=132, tiles=32, block_n=64, block_h=64):
    """Queries and splits of each launch."""
    programs = -(-heads // block_h)
    made = configs.attention_launches(queries, programs, tiles, block_n, block_h, slots)
    return [(part.stop - part.start, splits) for part, splits in made]


def test_few_queries_are_split_over_their_keys():
    assert launches(1, 64) == [(1, 16)]  # two tiles each
    assert launches(32, 64) == [(32, 4)] and launches(32, 128) == [(32, 2)]
    assert launches(67, 64) == [(67, 3)]  # two shorter waves, nearly full
    assert launches(128, 64) == launches(128, 64, slots=128) == [(128, 1)]
    assert launches(1, 64, tiles=0) == launches(1, 64, tiles=1) == [(1, 1)]


def test_what_whole_waves_leave_is_split():
    assert launches(133, 64) == [(132, 1), (1, 16)]
    assert launches(67, 128) == [(66, 1), (1, 16)]
    assert launches(132, 64) == [(132, 1)]
    assert launches(529, 64) == [(528, 1), (1, 16)] and launches(4097, 64) == [(4097, 1)]  # saves 2 %
    assert launches(250, 64) == [(250, 1)]  # the second wave is nearly full
    assert launches(3, 1024, slots=8) == [(3, 1)]  # a query fills more than a wave


def slots_busy(queries, heads, block_h):
    """The longest time of a slot that takes the next program whenever one ends, in tiles; and their ideal."""
    programs, longest = -(-heads // block_h), 0
    for part, splits in configs.attention_launches(queries, programs, 32, 64, block_h, 132):
        waves = -(-(part.stop - part.start) * programs * splits // 132)
        longest += waves * -(-32 // splits)
    return longest, queries * programs * 32 / 132


@pytest.mark.parametrize("heads, block_h", [(16, 16), (64, 64), (128, 64)])
def test_slots_are_busy(heads, block_h):
    busy = {}
    for queries in range(8, 257):
        longest, ideal = slots_busy(queries, heads, block_h)
        busy[queries] = ideal / longest
    assert sum(busy.values()) / len(busy) >= 0.85
    assert min(busy.values()) >= 0.66, min(busy.items(), key=lambda item: item[1])


def test_launches_take_every_query_once_and_leave_no_split_idle():
    for slots in (8, 108, 132):
        for programs in (1, 2, 3, 16):
            for queries in (*range(1, 70), 133, 300, 4097):
                for tiles in (1, 5, 32):
                    made = configs.attention_launches(queries, programs, tiles, 64, 64, slots)
                    taken = [t for part, _ in made for t in range(part.start, part.stop)]
                    assert taken == list(range(queries))
                    for part, n in made:
                        assert (n - 1) * -(-tiles // n) < tiles
                        assert n == 1 or (part.stop - part.start) * programs * n <= configs.MOST_WAVES * slots


@pytest.fixture(params=[1, 2, pytest.param(6, marks=slow), 24, pytest.param(1000, marks=slow)])
def multiprocessors(request, monkeypatch):
    """With one, 3 queries of MLA are a whole wave of 2 and a rest in splits; with two, those of GQA."""
    monkeypatch.setattr(configs, "multiprocessors", lambda device: request.param)


SINKS = torch.tensor([0.5, -INF, INF, 30.0, -3.0, 0.0])
LENGTHS = [[513, 130, 0], [1, 64, 65], [INT_MAX, INT_MIN, 400]]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_mla_in_splits(multiprocessors, lengths):
    inputs = mla_inputs(3, 90, 5, topk=513, dtype=torch.bfloat16)
    inputs["indices"][0, 64:320] = -1  # whole splits without a valid index
    extra = mla_inputs(3, 40, 5, topk=200, dtype=torch.bfloat16, seed=1)
    inputs.update(extra_kv=extra["kv"], extra_indices=extra["indices"])
    inputs.update(topk_length=int32(*lengths), extra_topk_length=int32(*lengths[::-1]))
    inputs["attn_sink"] = SINKS[:5]
    first = run_mla(inputs, d_v=24)
    again = run_mla(inputs, d_v=24)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("lengths", LENGTHS)
def test_gqa_in_splits(multiprocessors, lengths):
    inputs = gqa_inputs(3, 90, 6, 2, topk=513, d=40, d_v=24, per_head=True, dtype=torch.bfloat16)
    inputs["indices"][0, :, 64:320] = -1
    inputs.update(topk_length=int32(*lengths), attn_sink=SINKS)
    run_gqa(inputs)


def test_splits_of_strided_outputs(multiprocessors):
    inputs = mla_inputs(2, 90, 5, topk=300)
    with strided_outputs((2, 5, 32), (2, 5)) as outputs:
        run_mla(inputs, 32, *outputs)


# Ranges that meet the edges of a program's share of the keys.

KEYS = 512  # of a program
EDGES = [0, 1, 63, 64, 65, *(KEYS + i for i in (-1, 0, 1)), 2 * KEYS + 5]


@pytest.mark.parametrize(
    "page_size",
    [pytest.param(None, marks=slow), pytest.param(48, marks=slow), 64, pytest.param(256, marks=slow)],
)
def test_ranges_at_the_edges(page_size, monkeypatch):
    monkeypatch.setattr(index_kernel, "KEYS_PER_PROGRAM", (KEYS,))
    ks = int32(*(a for a in EDGES for _ in EDGES))
    ke = int32(*EDGES).repeat(len(EDGES))
    inputs = index_inputs(len(ks), EDGES[-1], heads=2, d=16)
    inputs.update(ks=ks, ke=ke, k=inputs["k"].nan_to_num())
    table = None
    if page_size:
        pages, table = to_pages(inputs["k"], page_size)
        inputs["k"] = pages.nan_to_num()
        table = torch.cat([table.roll(row, 1) for row in range(len(EDGES))])  # puts missing pages in view
    run_index(inputs, table)


def test_extreme_ranges():
    inputs = index_inputs(4, 70)
    inputs["k"].nan_to_num_()
    inputs.update(ks=int32(INT_MIN, INT_MIN, INT_MAX, 3), ke=int32(INT_MAX, INT_MIN, INT_MIN, INT_MAX))
    run_index(inputs)


def test_an_infinite_key_meets_padded_heads():
    q, k = torch.ones(1, 3, 8), torch.ones(5, 8)
    k[2] = INF
    out = torch.full((1, 5), NAN)
    index_logits(IndexLogitsOp(q, k, torch.ones(1, 3), int32(0), int32(5), out))
    assert out.tolist() == [[24.0, 24.0, INF, 24.0, 24.0]]


# Arithmetic at its limits.


@pytest.mark.parametrize("sign", [1, -1])
def test_huge_finite_scores(sign):
    """Scores near -1e36 are ordinary: the running maximum must not be mistaken for them."""
    q = torch.full((1, 1, 16), 1e18)
    kv = sign * torch.tensor([[1e17], [2e17], [3e17]]).expand(3, 16).contiguous()
    k, best = kv[:, None], 2 if sign > 0 else 0
    out, lse = torch.full((1, 1, 16), NAN), torch.full((1, 1), NAN)
    max_logits = torch.full((1, 1), NAN)
    sparse_mla(SparseMLAOp(q, kv, int32(0, 1, 2)[None], 16, 1.0, out, lse, max_logits))
    assert torch.equal(out[0, 0], kv[best])
    assert lse.item() == pytest.approx(16 * 1e18 * kv[best, 0].item(), rel=1e-5)
    assert torch.equal(max_logits, lse)
    out, lse = torch.full((1, 1, 16), NAN), torch.full((1, 1), NAN)
    sparse_gqa(SparseGQAOp(q, k, k, int32(0, 1, 2)[None], 1.0, out, lse))
    assert torch.equal(out[0, 0], kv[best])


def test_scores_of_minus_infinity_are_not_an_empty_row():
    q, kv = torch.full((1, 1, 16), 1e20), torch.full((3, 16), -1e20)
    max_logits, chosen = torch.zeros(1, 1), int32(0, 1)[None]
    for run in (
        lambda *outputs: sparse_mla(SparseMLAOp(q, kv, chosen, 16, 1.0, *outputs, max_logits)),
        lambda *outputs: sparse_gqa(SparseGQAOp(q, kv[:, None], kv[:, None], chosen, 1.0, *outputs)),
    ):
        out, lse = torch.zeros(1, 1, 16), torch.zeros(1, 1)
        run(out, lse)
        assert out.isnan().all() and torch.isneginf(lse).all()
    assert torch.isneginf(max_logits).all()


def test_nan_in_a_value_column_stays_there():
    inputs = gqa_inputs(1, 30, topk=3)
    inputs["k"].nan_to_num_()
    inputs["v"].nan_to_num_()
    inputs["indices"].copy_(int32(2, 5, 8))
    inputs["v"][5, 0, 3] = NAN
    run_gqa(inputs)


@pytest.mark.parametrize("dtype", FLOATS)
def test_merge(dtype):
    outs, lses = torch.randn(5, 3, 17, 24).to(dtype), torch.randn(5, 3, 17).mul(20)
    lses[1], lses[:, 2, 16], lses[:, 0, 3] = -INF, -INF, 1e30
    outs[1] = NAN
    lses[2, 1, 1] = NAN
    lses[2, 2, 2] = INF
    out, lse = outs.new_full((3, 17, 24), NAN), torch.full((3, 17), NAN)
    merge_attention(MergeAttentionOp(outs, lses, out, lse))
    expected, expected_lse = reference.merge_attention(outs.double(), lses)
    assert_close(out, expected)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_merge_with_sinks():
    outs, lses, sink = torch.randn(3, 2, 5, 24), torch.randn(3, 2, 5), SINKS[:5]
    lses[1, :, 0], lses[:, 1, 4] = -INF, -INF
    out, lse = torch.full((2, 5, 24), NAN), torch.full((2, 5), NAN)
    merge_parts(outs, lses, out, lse, sink)
    expected, expected_lse = reference.merge_attention(outs.double(), lses)
    kept = torch.sigmoid(expected_lse - sink).nan_to_num()
    assert_close(out, expected * kept[..., None])
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6)


def test_merging_one_part_changes_no_bit():
    outs, lses = torch.randn(1, 3, 5, 24), torch.randn(1, 3, 5).mul(50)
    out, lse = torch.full((3, 5, 24), NAN), torch.full((3, 5), NAN)
    merge_attention(MergeAttentionOp(outs, lses, out, lse))
    assert torch.equal(out, outs[0]) and torch.equal(lse, lses[0])


# Strides: of every kind, and far enough to leave 32 bits.


def strided(tensor):
    """The same values with gaps between the elements of the last dimension, and dimensions reversed."""
    order = range(tensor.dim() - 1, -1, -1)
    buffer = torch.full((*tensor.permute(*order).shape, 3), 7).to(tensor.dtype)
    return buffer[..., 1].permute(*order).copy_(tensor), buffer


@contextlib.contextmanager
def strided_outputs(*shapes):
    """Strided outputs of NaN; in the end nothing may have been written between their elements."""
    outputs, buffers = zip(*(strided(torch.full(shape, NAN)) for shape in shapes), strict=True)
    yield outputs
    for buffer in buffers:
        assert (buffer[..., 0] == 7).all() and (buffer[..., 2] == 7).all()


def test_strided_mla():
    inputs = mla_inputs(3, 40, h_q=17, topk=20)
    extra = mla_inputs(3, 30, h_q=17, topk=9, seed=1)
    inputs.update(extra_kv=extra["kv"], extra_indices=extra["indices"], attn_sink=torch.randn(17))
    inputs.update(topk_length=int32(7, 20, 3), extra_topk_length=int32(9, 2, 5))
    inputs = {name: strided(t)[0] for name, t in inputs.items()}
    with strided_outputs((3, 17, 32), (3, 17)) as outputs:
        run_mla(inputs, 32, *outputs)


def test_strided_gqa():
    inputs = gqa_inputs(3, 40, h_q=6, h_kv=2, d=40, d_v=24, per_head=True)
    inputs.update(topk_length=int32(7, 16, 3), attn_sink=torch.randn(6))
    inputs = {name: strided(t)[0] for name, t in inputs.items()}
    with strided_outputs((3, 6, 24), (3, 6)) as outputs:
        run_gqa(inputs, *outputs)


@pytest.mark.parametrize("paged", [False, True])
def test_strided_index_logits(paged):
    inputs, table = index_inputs(4, 40, heads=3, d=40), None
    if paged:
        inputs["k"], table = to_pages(inputs["k"], 16)
        inputs["ke"].clamp_(max=40)
        table = strided(table.repeat(2, 1))[0]
    width = table.shape[1] * 16 if paged else 40
    inputs = {name: strided(t)[0] for name, t in inputs.items()}
    with strided_outputs((4, width)) as (out,):
        run_index(inputs, table, out)


def test_strided_merge():
    outs, lses = torch.randn(2, 3, 9, 24), torch.randn(2, 3, 9)
    with strided_outputs((3, 9, 24), (3, 9)) as outputs:
        merge_attention(MergeAttentionOp(strided(outs)[0], strided(lses)[0], *outputs))
    check(outputs, reference.merge_attention(outs.double(), lses))


def test_expanded_inputs():
    mla = mla_inputs(1, 40, h_q=1, topk=20)
    mla["indices"][:] = torch.arange(20)
    mla["kv"].nan_to_num_()
    mla = {n: t.expand(3, *t.shape[1:]) if n != "kv" else t for n, t in mla.items()}
    mla["q"] = mla["q"].expand(3, 4, 40)
    run_mla({**mla, "topk_length": int32(7).expand(3), "attn_sink": torch.randn(1).expand(4)}, 32)
    index = index_inputs(1, 40, heads=1)
    key = index.pop("k")[:1].nan_to_num()
    index = {"k": key.expand(40, -1), **{n: t.expand(3, *t.shape[1:]) for n, t in index.items()}}
    run_index({**index, "weights": index["weights"].expand(3, 4), "q": index["q"].expand(3, 4, -1)})


def far(tensor, dim):
    """The same values in untouched virtual memory; twice the stride of ``dim`` leaves 32 bits."""
    strides = list(tensor.contiguous().stride())
    strides[dim] = 2**30 + 64
    length = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True)) + 1
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, length * tensor.element_size(), flags=flags)
    return torch.frombuffer(memory, dtype=tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)


def dims(**sizes):
    """Every dimension of every tensor: pairs of a name and a number."""
    return pytest.mark.parametrize("name, dim", [(name, d) for name, n in sizes.items() for d in range(n)])


@dims(q=3, kv=2, indices=2)
def test_far_mla_inputs(name, dim):
    inputs = mla_inputs(3, 12, h_q=3, topk=5, d_qk=24, dtype=torch.float16)
    run_mla({**inputs, name: far(inputs[name], dim)}, 16)


@dims(q=3, k=3, v=3, indices=3)
def test_far_gqa_inputs(name, dim):
    inputs = gqa_inputs(3, 12, topk=5, d=16, d_v=24, per_head=True, dtype=torch.float16)
    run_gqa({**inputs, name: far(inputs[name], dim)})


@dims(q=3, k=2, weights=2)
def test_far_index_inputs(name, dim):
    inputs = index_inputs(3, 12, heads=3, d=16, dtype=torch.float16)
    run_index({**inputs, name: far(inputs[name], dim)})


@pytest.mark.parametrize("dim", range(3))
def test_far_pages(dim):
    inputs = index_inputs(3, 12, heads=3, d=16, dtype=torch.float16)
    pages, table = to_pages(inputs["k"], 4)
    inputs["ke"].clamp_(max=12)
    run_index({**inputs, "k": far(pages, dim)}, table)
    run_index({**inputs, "k": pages}, far(table.repeat(3, 1), min(dim, 1)))


@pytest.mark.parametrize("dim", range(3))
def test_far_outputs(dim):
    outs = [far(torch.full((3, h, 16), NAN, dtype=torch.float16), dim) for h in (3, 4)]
    lses = [far(torch.full((3, h), NAN), min(dim, 1)) for h in (3, 4)]
    run_mla(mla_inputs(3, 12, h_q=3, topk=5, d_qk=24, dtype=torch.float16), 16, outs[0], lses[0])
    run_gqa(gqa_inputs(3, 12, topk=5, d=16, d_v=16, dtype=torch.float16), outs[1], lses[1])
    run_index(index_inputs(3, 12), out=far(torch.full((3, 12), NAN), min(dim, 1)))


@pytest.mark.parametrize("dim", range(4))
def test_far_merge(dim):
    outs, lses = torch.randn(3, 3, 4, 8), torch.randn(3, 3, 4)
    out = far(torch.full((3, 4, 8), NAN), max(dim, 1) - 1)
    lse = far(torch.full((3, 4), NAN), dim % 2)
    merge_attention(MergeAttentionOp(far(outs, dim), far(lses, min(dim, 2)), out, lse))
    check((out, lse), reference.merge_attention(outs.double(), lses))


def test_configurations_of_unknown_architectures(monkeypatch):
    table = {80: "Ampere", 90: "Hopper"}
    for arch, expected in ((80, "Ampere"), (89, "Ampere"), (90, "Hopper"), (121, "Hopper")):
        monkeypatch.setattr(configs, "architecture", lambda device, arch=arch: arch)
        assert configs.for_device(table, torch.device("cuda")) == expected
    monkeypatch.setattr(configs, "architecture", lambda device: 75)
    with pytest.raises(RuntimeError, match="need sm_80 or newer, cuda is sm_75"):
        configs.for_device(table, torch.device("cuda"))
