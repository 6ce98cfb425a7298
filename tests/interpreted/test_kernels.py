"""What only the kernels can get wrong: tile edges, every configuration, strides, memory around the outputs.

The meaning of the operations at large is tested by tests/test_index.py and tests/test_sparse_attention.py,
which run in the interpreter too.
"""

import contextlib
import mmap
from itertools import product

import pytest
import torch
from sparse_attn.kernels import configs
from sparse_attn.kernels import index_logits as index_kernel
from sparse_attn.kernels.index_logits import index_logits
from sparse_attn.kernels.merge_attention import merge_attention, merge_parts
from sparse_attn.kernels.sparse_gqa import sparse_gqa
from sparse_attn.kernels.sparse_mla import sparse_mla

from sparse_attn import formats, reference
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
ARCHITECTURES = [90, 80, 86, 100, 120]
slow = pytest.mark.slow


@pytest.fixture
def architecture(request, monkeypatch):
    monkeypatch.setattr(configs, "architecture", lambda device: request.param)
    return request.param


def on_architectures(names, cases, program):
    """Each case, on every architecture where the interpreter runs another program; all but sm_90 are slow.

    ``program(arch, *case)``: what the kernel is compiled with there.
    """
    params = []
    for case in cases:
        seen = []
        for arch in ARCHITECTURES:
            if (one := program(arch, *case)) not in seen:
                seen.append(one)
                params.append(pytest.param(arch, *case, marks=[] if arch == 90 else slow))
    return pytest.mark.parametrize(f"architecture, {names}", params, indirect=["architecture"])


def entry(table, arch, heads=None):
    """Of a table, without warps and stages, which the interpreter does not know; of attention by heads."""
    found, block_h = configs.nearest(table, arch), None
    if heads is not None:  # as attention_tiling does
        block_h = min((size for size in found if size >= heads), default=max(found))
        found = found[block_h]
    return block_h, found._replace(num_warps=0, num_stages=0)


def mla_program(arch, h_q, dtype=torch.bfloat16, name=None):
    """Over rows of q's dtype, or over a quantised cache."""
    if name is None:
        return entry(configs.SPARSE_MLA_FP32 if dtype == torch.float32 else configs.SPARSE_MLA, arch, h_q)
    table = configs.SPARSE_MLA_FP8 if name == "v32" else configs.SPARSE_MLA_PACKED
    table = configs.SPARSE_MLA_FP32 if dtype == torch.float32 else table
    return entry(table, arch, h_q), arch >= 89  # has_native_fp8


def gqa_program(arch, heads, dtype):
    h_q, h_kv = heads
    table = configs.SPARSE_GQA_FP32 if dtype == torch.float32 else configs.SPARSE_GQA
    return entry(table, arch, h_q // h_kv)


def index_program(arch, dtype):
    return entry(configs.INDEX_LOGITS_FP32 if dtype == torch.float32 else configs.INDEX_LOGITS, arch)


def quantised_index_program(arch, forms, *others):
    native = arch >= 89
    fp8_product = native and forms == ("e4m3", "e4m3", 128)
    return entry(configs.INDEX_LOGITS_FP8 if fp8_product else configs.INDEX_LOGITS_QUANTISED, arch), native


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


@on_architectures("h_q, dtype", product([1, 17, 70], [torch.bfloat16, torch.float32]), mla_program)
def test_mla_configurations(architecture, h_q, dtype):
    inputs = mla_inputs(3, 90, h_q, topk=201, dtype=dtype)
    inputs["indices"][0, 64:128] = -1  # no tile size sees a valid index here
    inputs["indices"][1, :128] = 90
    extra = mla_inputs(3, 40, h_q, topk=33, dtype=dtype, seed=1)
    inputs.update(extra_kv=extra["kv"], extra_indices=extra["indices"], extra_topk_length=int32(33, 0, 7))
    inputs.update(topk_length=int32(130, 201, 77), attn_sink=torch.randn(h_q))
    run_mla(inputs, d_v=24)


@on_architectures("heads, dtype", product([(3, 3), (80, 2)], [torch.bfloat16, torch.float32]), gqa_program)
def test_gqa_configurations(architecture, heads, dtype):
    h_q, h_kv = heads
    inputs = gqa_inputs(3, 90, h_q, h_kv, topk=201, d=40, d_v=24, per_head=True, dtype=dtype)
    inputs["indices"][0, :, 64:128] = -1
    inputs.update(topk_length=int32(130, 201, 77), attn_sink=torch.randn(h_q))
    run_gqa(inputs)


@on_architectures("dtype", product(FLOATS), index_program)
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
CODES = torch.arange(256, dtype=torch.uint8)
FINITE = CODES[(CODES & 0x7F) != 0x7F]  # of e4m3
FORMATS = formats.KV_FORMATS


def packed_cache(name, parts):
    """Pages from the parts of its tokens; 0xFF, a NaN but in e2m1, in all other bytes."""
    fmt, slots = FORMATS[name], len(parts[0])
    pages, page_bytes = -(-slots // PAGE_SIZE), 64 + fmt.bytes * PAGE_SIZE
    cache = torch.full((pages * page_bytes,), 0xFF, dtype=torch.uint8)
    cache = cache.as_strided((pages, PAGE_SIZE, fmt.bytes), (page_bytes, fmt.bytes, 1))
    slot = torch.arange(slots)
    for part, source in zip(fmt.views(cache), parts, strict=True):
        part = part.view(torch.uint8) if source.dtype == torch.uint8 else part
        part[slot // PAGE_SIZE, slot % PAGE_SIZE] = source
    return cache


def unpacked(cache, name):
    """The rows ``[s_kv, d_qk]`` in fp64."""
    return formats.unpack(cache, torch.float64, name).flatten(0, 1)


def quantised_parts(name, slots):
    """Codes of all finite values, moderate scales, and RoPE values if the format has a part for them."""
    values, scales, *ropes = FORMATS[name].views(
        torch.zeros(1, slots, FORMATS[name].bytes, dtype=torch.uint8)
    )
    usable = FINITE if values.dtype == torch.float8_e4m3fn else CODES
    exponent = torch.randint(-12, -6, scales.shape[1:])
    if scales.dtype == torch.float32:
        scale = torch.exp2(exponent.float())
    else:  # of ue8m0, and of e4m3
        scale = (exponent + 127).byte() if scales.dtype == torch.uint8 else (exponent + 40).byte()
    codes = usable[torch.randint(len(usable), values.shape[1:])]
    return codes, scale, *(torch.randn(rope.shape[1:]).bfloat16() for rope in ropes)


def nan_of(part):
    return NAN if part.is_floating_point() else 0xFF  # which is NaN in ue8m0 and in e4m3


def quantised_segment(name, s_q, topk, slots=21):
    """A cache with NaN in every part of the slots that nobody selected, and indices."""
    indices = selection_indices(s_q, slots, topk, seed=topk)
    parts = quantised_parts(name, slots)
    unused = torch.ones(slots, dtype=torch.bool)
    unused[indices[(indices >= 0) & (indices < slots)].long()] = False
    for part in parts:
        part[unused] = nan_of(part)
    cache = packed_cache(name, parts)
    return cache, torch.where(indices >= slots, cache.shape[0] * PAGE_SIZE, indices)


def run_quantised(inputs):
    rows = {
        n: unpacked(x, inputs[f"{n}_format"])
        for n, x in inputs.items()
        if getattr(x, "dtype", 0) == torch.uint8
    }
    rows |= {f"{n}_format": None for n in rows}
    return run_mla(inputs, 512, unpacked=rows)


@on_architectures(
    "name, h_q", product(FORMATS, [5, 33]), lambda arch, name, h_q: mla_program(arch, h_q, name=name)
)
def test_mla_over_quantised_caches(architecture, name, h_q, monkeypatch):
    monkeypatch.setattr(configs, "multiprocessors", lambda device: 1 if h_q == 5 else 108)
    kv, indices = quantised_segment(name, 3, 130)
    extra_kv, extra_indices = quantised_segment(name, 3, 9)
    indices[0, 32:96] = -1  # no tile size sees a valid index here
    inputs = {
        **{"q": torch.randn(3, h_q, FORMATS[name].width).bfloat16(), "kv": kv, "indices": indices},
        **{"extra_kv": extra_kv, "extra_indices": extra_indices, "extra_topk_length": int32(9, 0, 7)},
        **{"topk_length": int32(97, 130, 33), "attn_sink": torch.randn(h_q)},
        **{"kv_format": name, "extra_kv_format": name},
    }
    run_quantised(inputs)


@pytest.mark.parametrize("name, other", [("v32", None), ("nope", None), ("v41_by_page", "v41_fp4_by_page")])
def test_mla_over_segments_of_two_formats(name, other):
    kv, indices = quantised_segment(name, 2, 40)
    plain = mla_inputs(2, 30, 5, topk=40, d_qk=FORMATS[name].width, dtype=torch.bfloat16)
    extra = {"extra_kv": plain["kv"], "extra_indices": plain["indices"], "extra_kv_format": other}
    if other is not None:
        extra["extra_kv"], extra["extra_indices"] = quantised_segment(other, 2, 40)
    one = {"q": plain["q"], "kv": kv, "indices": indices, "kv_format": name}
    run_quantised({**one, **extra})
    swapped = {f"extra_{n}": x for n, x in one.items() if n != "q"}
    run_quantised({"q": plain["q"], **{n.removeprefix("extra_"): x for n, x in extra.items()}, **swapped})


@on_architectures(
    "name, dtype",
    product(FORMATS, [torch.bfloat16, torch.float32]),
    lambda arch, name, dtype: mla_program(arch, 1, dtype, name),
)
def test_mla_of_every_code_and_scale(architecture, name, dtype):
    """One selected token per query: out is that token's value, bit for bit."""
    codes, scale, *ropes = quantised_parts(name, 12)
    usable = CODES if codes.shape[1] == 256 else FINITE
    codes = usable.roll(7).repeat(3)[: codes.shape[1]].expand(12, -1)
    if scale.dtype == torch.float32:
        scales = torch.tensor([2.0**-12, 1.0, 0.37, 1e-4 / 448, 3e5, 2.0**100, 1e-38, 0.0])
    elif name.startswith("v41_fp4"):
        scales = FINITE
    else:
        scales = torch.tensor([0, 1, 7, 118, 127, 128, 200, 246], dtype=torch.uint8)
    groups, step = scale.shape[1], 21 if len(scales) > 8 else 1
    scale = torch.stack([scales.repeat(4).roll(step * i)[:groups] for i in range(12)])
    cache = packed_cache(name, (codes, scale, *ropes))
    expected = unpacked(cache, name)[:12]
    q = torch.zeros(12, 1, expected.shape[1], dtype=dtype)
    out, lse = torch.full((12, 1, 512), NAN, dtype=dtype), torch.full((12, 1), NAN)
    indices = torch.arange(12, dtype=torch.int32)[:, None]
    outputs = out, lse, torch.empty_like(lse)
    sparse_mla(SparseMLAOp(q, cache, indices, 512, 1.0, *outputs, kv_format=name))
    assert torch.equal(out[:, 0], expected[:, :512].float().to(dtype))
    assert (lse == 0).all()


PARTS = [(name, part) for name in FORMATS for part in ("value", "scale", "rope")]


@on_architectures(
    "name, where",
    [
        (name, part)
        for name, part in PARTS
        if not (name.startswith("v41_fp4") and part == "value")  # e2m1 has no NaN
        and not (name not in ("v32", "v4") and part == "rope")
    ],
    lambda arch, name, where: mla_program(arch, 2, name=name),
)
def test_mla_shows_nan_of_a_selected_token(architecture, name, where):
    parts = quantised_parts(name, 3)
    part = parts[("value", "scale", "rope").index(where)]
    part[1, 2] = nan_of(part)
    q = torch.randn(3, 2, FORMATS[name].width).bfloat16()
    out, lse = torch.zeros(3, 2, 512).bfloat16(), torch.zeros(3, 2)
    indices = torch.tensor([[0, 2], [0, 1], [2, 2]], dtype=torch.int32)
    outputs = out, lse, torch.empty_like(lse)
    sparse_mla(SparseMLAOp(q, packed_cache(name, parts), indices, 512, 0.1, *outputs, kv_format=name))
    assert lse.isnan().any(1).tolist() == [False, True, False]
    assert not out[::2].isnan().any()


@pytest.mark.parametrize("name", ["v32", "nope", "v41_fp4"])
def test_mla_over_tokens_in_any_pages(name):
    gapped = packed_cache(name, quantised_parts(name, 16))
    inputs = {"q": torch.randn(3, 5, FORMATS[name].width).bfloat16(), "indices": selection_indices(3, 16, 40)}
    inputs["kv_format"] = name
    out, lse = run_quantised({**inputs, "kv": gapped})
    for kv in (gapped.contiguous(), gapped.reshape(16, 1, -1)):
        same = run_quantised({**inputs, "kv": kv})
        assert torch.equal(out, same[0]) and torch.equal(lse, same[1])


@on_architectures(
    "widths, dtype",
    product([(576, 512), (40, 24)], FLOATS),
    lambda arch, _, dtype: mla_program(arch, 5, dtype),
)
def test_mla_over_pages_apart(architecture, widths, dtype):
    """Rows of q's dtype, in pages with NaN between them."""
    d_qk, d_v = widths
    rows = mla_inputs(3, 56, 5, topk=70, d_qk=d_qk, dtype=dtype)
    rows["kv"].nan_to_num_()
    buffer = torch.full((7, 11, d_qk + 3), NAN, dtype=dtype)
    kv = buffer[:, 1:9, :d_qk].copy_(rows["kv"].view(7, 8, d_qk))
    extra = {"extra_kv": kv, "extra_indices": rows["indices"].flip(1)}
    out, lse = run_mla({**rows, **extra, "extra_kv": rows["kv"]}, d_v)
    for one, other in ((kv, rows["kv"]), (rows["kv"], kv), (kv, kv)):
        same = run_mla({**rows, **extra, "kv": one, "extra_kv": other}, d_v)
        assert torch.equal(out, same[0]) and torch.equal(lse, same[1])


FORMS = [(q, k, 128) for q, k in (("e4m3", "e4m3"), ("bf16", "e4m3"), ("e2m1", "e2m1"), ("e4m3", "e2m1"))]
FORMS += [("e2m1", "e2m1", 64)]


@on_architectures(
    "forms, heads, page_size",
    [(forms, *rest) for forms, rest in product(FORMS, [(5, None), (70, 48), (5, 64), (33, 128)])],
    quantised_index_program,
)
def test_quantised_index_configurations(architecture, forms, heads, page_size):
    """The e4m3 product of sm_89 and newer, and everything that is decoded before."""
    *forms, d = forms
    inputs, table = index_inputs(5, 300, heads, d, dtype=torch.bfloat16), None
    for name, form in zip("qk", forms, strict=True):
        x = inputs[name]
        if form == "e4m3":
            inputs[name] = formats.to_e4m3(x.float())
            if name == "k":
                inputs["k_scale"] = torch.rand(300) + 0.1
        elif form == "e2m1":
            values = torch.empty(*x.shape[:-1], d // 2, dtype=torch.uint8)
            inputs[f"{name}_scale"] = torch.empty(*x.shape[:-1], d // 32, dtype=torch.uint8)
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


def test_batch_invariant_launches_divide_the_keys_of_every_query_alike():
    for tiles in (0, 1, 7, 32, 100):
        made = {n: configs.invariant_launches(n, 128, tiles, 64) for n in (1, 2, 133, 4097)}
        splits = {launch.splits for launches in made.values() for launch in launches}
        assert splits == {max(1, -(-tiles * 64 // configs.INVARIANT_KEYS))}
        for n, launches in made.items():
            assert [t for part, _ in launches for t in range(part.start, part.stop)] == list(range(n))
            rows = max(128 * (part.stop - part.start) * n_splits for part, n_splits in launches)
            assert splits == {1} or rows <= configs.INVARIANT_ROWS
    assert configs.invariant_launches(3, 1 << 20, 32, 64)[1] == configs.Launch(slice(1, 2), 4)


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

KEYS = 256  # of a program: two tiles
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
