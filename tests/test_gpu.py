"""Every Triton kernel on a CUDA GPU, at the sizes of real models, against the fp64 reference.

    pytest -m gpu tests/test_gpu.py -n 12

Most of its time goes to compiling kernels, so a test goes through many sizes and options that share the same
compiled ones. Results of large calls are compared in some of their rows. test_gpu_hopper.py has the
warp-specialised kernel. With TRITON_INTERPRET=1 all but the tests that need CUDA itself run in Triton's
interpreter, with tiny sizes, so that these tests are known to be right before a GPU sees them.
"""

import os
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import sparse_attn
from sparse_attn import DSACache, DSAConfig, SparseGQA, SparseMLA, formats, ops, reference
from sparse_attn.compat import deep_gemm, flash_mla
from sparse_attn.formats.index_keys import INDEX_K
from sparse_attn.ops.index import IndexLogitsOp
from sparse_attn.ops.records import PER_QUERY
from sparse_attn.rope import apply_rope, hadamard_transform
from sparse_attn.testing import (
    ADVERSARIAL_LOGITS,
    E4M3_PRODUCT_ERROR,
    INT_MAX,
    INT_MIN,
    adversarial_logits,
    assert_close,
    conformance,
    gqa_inputs,
    index_inputs,
    mla_inputs,
    relative_error,
    selection_indices,
    to_pages,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(INTERPRETED, reason="the interpreter has no streams and no graphs")

BF16, FP16, FP32, E4M3 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
NAN, INF = float("nan"), float("inf")
TRITON = {"backend": "triton"}


def sized(on_gpu, tiny):
    """A size: on a GPU, and in the interpreter."""
    return tiny if INTERPRETED else on_gpu


def rows_of(count, most=12):
    """At most ``most`` rows out of ``count``, the first and the last among them."""
    return torch.linspace(0, count - 1, min(count, most)).round().long().to(DEVICE)


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def normal(*shape, dtype=FP32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def lengths(count, longest):
    """For topk_length: a part of the row, more than it, nothing, negative."""
    kinds = [longest - 1, longest // 2, INT_MAX, 1, longest, 0, INT_MIN]
    return int32([kinds[t % len(kinds)] for t in range(count)])


def sinks(heads):
    """Of every kind, where heads are enough."""
    sink = torch.randn(heads, device=DEVICE)
    if heads > 3:
        sink[:3] = torch.tensor([INF, -INF, 30.0])
    return sink


def bits(*tensors):
    return [x.contiguous().view(torch.uint8) for x in tensors]


def assert_same_bits(actual, expected):
    for number, (one, other) in enumerate(zip(bits(*actual), bits(*expected), strict=True)):
        assert torch.equal(one, other), f"output {number}: {int((one != other).sum())} bytes differ"


def check_attention(actual, expected):
    (out, *logits), (expected_out, *expected_logits) = actual, expected
    assert_close(out, expected_out, factor=2.5)  # probabilities are rounded to the input dtype too
    tolerance = 1e-5 if out.dtype == FP32 else 1e-3
    for tensor, right in zip(logits, expected_logits, strict=True):  # lse, and of sparse_mla max_logits
        torch.testing.assert_close(tensor.double(), right, rtol=tolerance, atol=tolerance)


# sparse_mla


def latent_rows(s_q, s_kv, topk, width, dtype, seed):
    """A cache in which NaN is what nobody selects, and indices; of several queries the last selects nothing.

    A dtype that is the name of a format is a packed cache, in pages of 64.
    """
    fmt = formats.KV_FORMATS.get(dtype)
    dtype = FP32 if fmt else dtype
    made = mla_inputs(max(s_q, 2), s_kv, 1, topk, width, dtype=dtype, device=DEVICE, seed=seed)
    kv, indices = made["kv"], made["indices"][:s_q]
    return fmt.pack(kv.unflatten(0, (-1, 64))) if fmt else kv, indices


def mla_case(s_q, heads, topk, d_qk=576, dtype=BF16, cache=None, extra_topk=0, seed=0):
    """All arguments but d_v; with ``extra_topk`` a second segment, lengths and sinks."""
    s_kv = sized(20_032, 128)
    kv, indices = latent_rows(s_q, s_kv, topk, d_qk, cache or dtype, seed)
    inputs = {"q": normal(s_q, heads, d_qk, dtype=dtype), "kv": kv, "indices": indices, "kv_format": cache}
    if extra_topk:
        inputs["extra_kv_format"] = cache
        kv, indices = latent_rows(s_q, sized(1024, 64), extra_topk, d_qk, cache or dtype, seed + 1)
        inputs.update(extra_kv=kv, extra_indices=indices, extra_topk_length=lengths(s_q, extra_topk).flip(0))
        inputs.update(topk_length=lengths(s_q, topk), attn_sink=sinks(heads))
    return inputs


def check_mla(inputs):
    options = {"d_v": 512, "softmax_scale": inputs["q"].shape[2] ** -0.5}
    actual = sparse_attn.sparse_mla(**inputs, **options, return_lse=True, return_max_logits=True, **TRITON)
    t = rows_of(len(inputs["q"]))
    per_query = {n: x[t] if n in PER_QUERY else x for n, x in inputs.items()}
    per_query["q"] = per_query["q"].double()  # the reference gathers first, and computes in the dtype of q
    check_attention([x[t] for x in actual], reference.sparse_mla(**per_query, **options))


MLA_QUERIES = sized((1, 37, 300), (1, 3))
TOPK = sized(2048, 200)  # with few queries, programs share the keys of each


@pytest.mark.parametrize(
    "heads, d_qk", [(1, 576), (16, 576), (32, 576), (64, 576), (128, 576), (16, 512), (128, 512)]
)
def test_mla(heads, d_qk):
    for s_q in MLA_QUERIES:
        check_mla(mla_case(s_q, heads, TOPK, d_qk))
        check_mla(mla_case(s_q, heads, TOPK, d_qk, extra_topk=sized(130, 33)))


@pytest.mark.parametrize("dtype", [FP16, FP32])
def test_mla_in_other_dtypes(dtype):
    for s_q in MLA_QUERIES:
        check_mla(mla_case(s_q, 20, sized(1025, 140), dtype=dtype, extra_topk=sized(130, 33)))


@pytest.mark.parametrize("name", formats.KV_FORMATS)
@pytest.mark.parametrize("heads", [16, 32, 64, 128])
def test_mla_of_packed_caches(heads, name):
    d_qk = formats.KV_FORMATS[name].width
    for s_q in MLA_QUERIES:
        check_mla(mla_case(s_q, heads, TOPK, d_qk, cache=name, extra_topk=sized(130, 33)))
    check_mla(mla_case(2, heads, sized(1000, 70), d_qk, cache=name))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_mla_of_pages_apart(dtype):
    """As of an engine that allocates the layers of a page together; what lies between is NaN."""
    inputs = mla_case(sized(37, 3), 64, TOPK, dtype=dtype, extra_topk=sized(130, 33))
    for name in ("kv", "extra_kv"):
        pages = inputs[name].unflatten(0, (-1, 64))
        apart = torch.full((len(pages), 3, 64, 576), float("nan"), dtype=dtype, device=DEVICE)
        apart[:, 1] = pages
        inputs[name] = apart[:, 1]
    check_mla(inputs)


def test_mla_of_many_keys_per_tile_that_are_invalid():
    inputs = mla_case(sized(5, 3), 64, TOPK)
    inputs["indices"][0, :-1] = -1
    inputs["indices"][1] = len(inputs["kv"])
    check_mla(inputs)


def far_indices(s_kv):
    """Over all of a cache, its last row included."""
    indices = torch.randint(0, s_kv, sized((40, 512), (2, 40)), device=DEVICE, dtype=torch.int32)
    indices[:, 0], indices[:, 1], indices[0, 2] = s_kv - 1, INT_MIN, s_kv
    return indices


def slots_of(indices, s_kv):
    return indices[(indices >= 0) & (indices < s_kv)].unique().long()


@pytest.mark.parametrize("cache", [BF16, "v32"])
def test_mla_beyond_32_bits(cache):
    """Byte offsets beyond 2 ** 32 (9 GB and 5 GB); element offsets of bf16 beyond 2 ** 31."""
    s_kv = sized(8_000_000 if cache == BF16 else 7_000_000, 128) // 64 * 64
    indices = far_indices(s_kv)
    slots = slots_of(indices, s_kv)
    rows = normal(len(slots), 576, dtype=BF16)
    if cache == BF16:
        kv = torch.empty(s_kv, 576, dtype=BF16, device=DEVICE)  # NaN, by the fixture poisoned_memory
        kv[slots] = rows
    else:
        kv = torch.full((s_kv // 64, 64, 656), 0xFF, dtype=torch.uint8, device=DEVICE)  # NaN
        kv.view(-1, 656)[slots] = formats.pack_v32_kv(rows)
    check_mla({"q": normal(len(indices), 16, 576, dtype=BF16), "kv": kv, "indices": indices})


# sparse_gqa


def gqa_case(s_q, heads, h_kv, d, topk, dtype=BF16, per_head=False, options=True):
    sizes = {"h_q": heads, "h_kv": h_kv, "topk": topk, "d": d, "d_v": d, "per_head": per_head}
    inputs = gqa_inputs(max(s_q, 2), sized(6000, 60), **sizes, dtype=dtype, device=DEVICE)
    inputs.update({n: inputs[n][:s_q].clone() for n in ("q", "indices")})
    if options:
        inputs.update(topk_length=lengths(s_q, topk), attn_sink=sinks(heads))
    return inputs


def check_gqa(inputs):
    scale = inputs["q"].shape[2] ** -0.5
    actual = sparse_attn.sparse_gqa(**inputs, softmax_scale=scale, return_lse=True, **TRITON)
    t = rows_of(len(inputs["q"]), most=6)
    per_query = {n: x if n in ("k", "v", "attn_sink") else x[t] for n, x in inputs.items()}
    per_query["q"] = per_query["q"].double()
    check_attention([x[t] for x in actual], reference.sparse_gqa(**per_query, softmax_scale=scale))


@pytest.mark.parametrize("groups", [(1, 4, 16), (32,), (64, 80)], ids=str)
@pytest.mark.parametrize("d", [64, 128, 256])
def test_gqa(d, groups):
    """Query heads per key head; those of one test share compiled kernels."""
    for group in groups:
        for s_q in sized((1, 37, 300), (1, 3)):
            check_gqa(gqa_case(s_q, 2 * group, 2, d, sized(1100, 140), per_head=s_q > 1))


def test_gqa_in_fp32():
    for s_q in sized((1, 37), (1, 3)):
        check_gqa(gqa_case(s_q, 8, 2, 128, sized(1025, 40), FP32, per_head=True))


def test_gqa_of_all_heads_with_the_same_keys():
    for s_q in sized((1, 300), (1, 3)):
        check_gqa(gqa_case(s_q, 32, 8, 128, sized(2048, 40), options=False))


def test_gqa_beyond_32_bits():
    """Byte offsets beyond 2 ** 32, element offsets beyond 2 ** 31, in k and in v."""
    s_kv = sized(2_200_000, 100)
    indices = far_indices(s_kv)
    slots = slots_of(indices, s_kv)
    caches = torch.empty(2, s_kv, 8, 128, dtype=BF16, device=DEVICE)  # NaN, by the fixture
    caches[:, slots] = normal(2, len(slots), 8, 128, dtype=BF16)
    q = normal(len(indices), 32, 128, dtype=BF16)
    check_gqa({"q": q, "k": caches[0], "v": caches[1], "indices": indices})


# index_logits


def e2m1(x):
    """Values and scales as the functions take them."""
    values = torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=torch.uint8, device=x.device)
    stored = torch.full((*x.shape[:-1], 4), 255, dtype=torch.uint8, device=x.device)  # of d = 64 a pad of NaN
    formats.quantise(x, values, stored[..., : x.shape[-1] // 32], min_scale=formats.FP4_MIN_SCALE)
    return values, stored.view(torch.int32)[..., 0]


def index_case(form, s_q, s_kv, heads, sequences=0, seed=0):
    """Arguments of index_logits whose unseen keys are NaN; with ``sequences`` in pages of 64.

    ``form``: of the queries, of the keys, and d if not 128. Quantised keys in pages are a packed cache.
    """
    q_form, k_form, *width = form.split()
    d = int(width[0]) if width else 128
    dtypes = {"bf16": BF16, "fp16": FP16, "fp32": FP32}
    inputs = index_inputs(s_q, s_kv, heads, d, dtype=dtypes.get(q_form, BF16), device=DEVICE, seed=seed)
    k = inputs["k"]
    if sequences:
        k, table = to_pages(k, 64, seed)
        inputs["block_table"] = table.repeat(sequences, 1)
        inputs["ke"].clamp_(max=s_kv)
    if k_form == "e4m3" and sequences:
        k = formats.pack_index_k(k)
    elif k_form == "e4m3":
        inputs["k_scale"] = torch.rand(s_kv, device=DEVICE) + 0.1
        k = formats.to_e4m3(k.float())
    elif k_form == "e2m1" and sequences:
        k = formats.pack_mxfp4_index_k(k)
    elif k_form == "e2m1":
        k, inputs["k_scale"] = e2m1(k)
    inputs["k"] = k
    if q_form == "e4m3":
        inputs["q"] = formats.to_e4m3(inputs["q"].float())
    elif q_form == "e2m1":
        inputs["q"], inputs["q_scale"] = e2m1(inputs["q"])
    return inputs


def exact_logits(t, q, k, weights, ks, ke, q_scale=None, k_scale=None, block_table=None):
    """Of query t, ``[1, width]`` in fp64: the logits, and the sums of the magnitudes that enter them."""
    one = slice(t, t + 1)
    scales = None if q_scale is None else q_scale[one, :, None].view(torch.uint8)[..., : q.shape[2] // 16]
    query = formats.dequantise(q[one], scales, dtype=torch.float64)
    if k.dtype == torch.uint8 and k_scale is None:
        k, k_scale = formats.views(k)
    elif k.dtype == torch.uint8:
        k_scale = k_scale[..., None].view(torch.uint8)[..., : k.shape[-1] // 16]
    exists = torch.ones(len(k), dtype=torch.bool, device=k.device)
    if block_table is not None:
        table = block_table[t // (len(q) // len(block_table))]
        mapped = (table >= 0) & (table < len(k))
        exists = mapped.repeat_interleave(k.shape[1])
        pages = torch.where(mapped, table, 0).long()
        k, k_scale = (None if x is None else x[pages].flatten(0, 1) for x in (k, k_scale))
    keys = formats.dequantise(k, k_scale, dtype=torch.float64)
    others = weights[one].double(), ks[one], ke[one]
    logits = reference.index_logits(query, keys, *others)
    terms = reference.index_logits(query.abs(), keys.abs(), others[0].abs(), *others[1:])
    return logits.masked_fill(~exists, -INF), terms.masked_fill(~exists, -INF)


def check_logits(actual, inputs, most=12, visible_only=False):
    chosen = rows_of(len(actual), most)
    exact, terms = (
        torch.cat(x) for x in zip(*(exact_logits(t, **inputs) for t in chosen.tolist()), strict=True)
    )
    actual = actual[chosen]
    if visible_only:
        actual = torch.where(exact == -INF, -INF, actual)
    native = inputs["q"].dtype == inputs["k"].dtype == E4M3 or (
        inputs["q"].dtype == E4M3 and inputs["k"].dtype == torch.uint8 and inputs["k"].shape[-1] == 132
    )
    if not native:
        assert_close(actual, exact, terms=terms)
        return
    assert torch.equal(actual == -INF, exact == -INF), "-inf in other places"
    seen = exact > -INF
    difference, magnitude = (actual.double() - exact)[seen].norm(), terms[seen].norm().clamp(min=1e-30)
    error = (difference / magnitude).item()
    budget = E4M3_PRODUCT_ERROR  # relative to the magnitudes summed, not to the result
    assert error <= budget, f"error {error:.3g} of the magnitudes, budget {budget:.3g}"


FORMS = [
    *("bf16 bf16", "fp16 fp16", "fp32 fp32", "bf16 e4m3", "fp16 e4m3", "fp32 e4m3", "e4m3 e4m3", "e2m1 e4m3"),
    *("bf16 e2m1", "fp32 e2m1", "e4m3 e2m1", "e2m1 e2m1", "bf16 e2m1 64", "e2m1 e2m1 64"),
]


@pytest.mark.parametrize("form", FORMS)
def test_index_logits(form):
    prefill, decode = sized((301, 5000), (5, 150)), sized(3000, 130)
    for case in (
        index_case(form, *prefill, heads=64),
        index_case(form, *prefill, heads=sized(32, 3)),
        index_case(form, sized(64, 2), decode, heads=64, sequences=sized(64, 2)),  # a query each
        index_case(form, sized(99, 4), decode, heads=8, sequences=sized(33, 2)),  # queries that share keys
    ):
        check_logits(sparse_attn.index_logits(**case, **TRITON), case)


@pytest.mark.parametrize("form", ["bf16 bf16", "bf16 e4m3", "e4m3 e4m3"])
def test_index_logits_that_need_not_be_clean(form):
    """Logits outside the ranges stay as they are; those inside are the same bit for bit."""
    case = index_case(form, *sized((301, 5000), (5, 150)), heads=32)
    clean = sparse_attn.index_logits(**case, **TRITON)
    out = torch.full_like(clean, 7.0)
    ops.call("index_logits", IndexLogitsOp(**case, out=out, clean=False), "triton")
    check_logits(out, case, visible_only=True)
    position = torch.arange(clean.shape[1], device=DEVICE)
    seen = (position >= case["ks"][:, None]) & (position < case["ke"][:, None])
    assert_same_bits([torch.where(seen, out, 0.0)], [torch.where(seen, clean, 0.0)])


@pytest.mark.parametrize("form", ["bf16 bf16", "e4m3 e4m3"])
def test_index_logits_of_a_long_context(form):
    """A decode batch whose sequences have pages of their own."""
    sequences, pages = sized((32, 2048), (2, 2))  # 131,072 tokens each
    count = sequences * pages
    if form == "bf16 bf16":
        q, k = normal(sequences, 64, 128, dtype=BF16), normal(count, 64, 128, dtype=BF16)
    else:
        q = formats.to_e4m3(normal(sequences, 64, 128))
        k = torch.empty(count, 64, 132, dtype=torch.uint8, device=DEVICE)
        keys, scales = formats.views(k)
        for page in range(0, count, 4096):
            keys[page : page + 4096] = normal(min(4096, count - page), 64, 128).to(E4M3)
        scales.copy_(torch.rand(count, 64, device=DEVICE) + 0.1)
    table = torch.randperm(count, device=DEVICE).int().view(sequences, pages)
    ke = torch.full((sequences,), pages * 64, device=DEVICE).int()
    ke[1] -= 17
    case = {
        "q": q,
        "k": k,
        "weights": normal(sequences, 64),
        "ks": ke * 0 + 5,
        "ke": ke,
        "block_table": table,
    }
    check_logits(sparse_attn.index_logits(**case, **TRITON), case, most=4)
    check_lightning(case, topk=sized(2048, 30))


def test_neighbours_do_not_change_a_bit_if_asked():
    """Alone, in a small batch and in a large one: the kernels of one query, of drafts and of a prefill."""
    pages, many = sized((64, 500), (2, 5))
    q, kv = normal(many, 128, 576, dtype=BF16), normal(pages * 64, 576, dtype=BF16)
    k, table = normal(pages, 64, 128, dtype=BF16), torch.arange(pages, device=DEVICE).int()[None]
    index_q, weights = normal(many, 64, 128, dtype=BF16), normal(many, 64)
    codes, folded = sparse_attn.quantise_index_q(index_q, weights, **TRITON)
    packed_k, packed_kv = (
        formats.pack_index_k(k.float()),
        formats.pack_v32_kv(kv.float().view(pages, 64, 576)),
    )
    indices = selection_indices(many, pages * 64, sized(2048, 70), device=DEVICE)
    keys, values = kv[:, None, :128], kv[:, None, 128:256]
    asked = {"batch_invariant": True, **TRITON}

    def of(t):
        """All results for the queries of a slice."""
        tables = {"block_table": table.expand(t.stop - t.start, -1) if t.stop - t.start < 9 else table}
        return [
            sparse_attn.index_logits(index_q[t], k, weights[t], **tables, **asked),
            sparse_attn.index_logits(codes[t], packed_k, folded[t], **tables, **asked),
            *sparse_attn.sparse_mla(q[t], kv, indices[t], return_lse=True, **asked),
            *sparse_attn.sparse_mla(q[t, :16], kv, indices[t], return_lse=True, **asked),
            *sparse_attn.sparse_mla(q[t], packed_kv, indices[t], return_lse=True, **asked),
            *sparse_attn.sparse_gqa(q[t, :, :128], keys, values, indices[t], return_lse=True, **asked),
        ]

    every = of(slice(0, many))
    for t in (slice(3, 4), slice(1, 5), slice(many // 2, many)):
        assert_same_bits(of(t), [x[t] for x in every])


def test_a_ragged_batch():
    """Sequences of 0 to many queries, a padded end: each as it is alone, to the last bit of the selection."""
    counts, pages = sized(([1, 300, 0, 4, 64, 2], 200), ([1, 3, 0, 4], 3))
    s_q, n = sum(counts) + 3, len(counts)
    q, k = normal(s_q, 64, 128), normal(n * pages, 64, 128, dtype=BF16)
    codes, weights = sparse_attn.quantise_index_q(q.bfloat16(), normal(s_q, 64), **TRITON)
    cache = formats.pack_index_k(k)
    table = torch.randperm(n * pages, device=DEVICE).int().view(n, pages)
    ends = torch.tensor([0, *counts], device=DEVICE).cumsum(0).int()
    ke = torch.full((s_q,), pages * 64 - 7, device=DEVICE).int()
    ranges, topk = {"ks": ke * 0 + 5, "ke": ke}, sized(2048, 30)
    of_batch = {"block_table": table, "cu_seqlens_q": ends}
    selected, scores = sparse_attn.lightning_topk(
        codes, cache, weights, topk, **ranges, **of_batch, return_scores=True, **TRITON
    )
    slots = sparse_attn.physical_slots(selected, table, 64, cu_seqlens_q=ends, **TRITON)
    logits = sparse_attn.index_logits(codes, cache, weights, **ranges, **of_batch, **TRITON)
    assert torch.equal(selected, reference.select_topk(logits, topk, **ranges))
    assert torch.equal(scores, reference.scores_of(logits, selected))
    assert torch.equal(slots, reference.physical_slots(selected, table, 64, cu_seqlens_q=ends))
    assert torch.isneginf(logits[-3:]).all() and (selected[-3:] == -1).all()
    rows = reference.table_rows(s_q - 3, table, ends)
    single = {"q": codes[:-3], "k": cache, "weights": weights[:-3], "ks": ranges["ks"][:-3], "ke": ke[:-3]}
    check_logits(logits[:-3], {**single, "block_table": table[rows]}, most=8)


def test_keys_beyond_32_bits():
    """A cache of 4.3 GB: byte offsets beyond 2 ** 32, element offsets beyond 2 ** 31."""
    pages = sized(265_000, 9)
    k = torch.empty(pages, 64, 128, dtype=BF16, device=DEVICE)  # NaN, by the fixture
    table = torch.cat([torch.arange(3), torch.arange(pages - 5, pages)]).int().to(DEVICE)[None].repeat(2, 1)
    k[table[0].long()] = normal(8, 64, 128, dtype=BF16)
    case = {"q": normal(4, 32, 128, dtype=BF16), "k": k, "weights": normal(4, 32), "block_table": table}
    case.update(ks=int32([0, 3, 300, 500]), ke=int32([512, 500, 512, INT_MAX]))
    check_logits(sparse_attn.index_logits(**case, **TRITON), case)


def test_logits_beyond_32_bits():
    """More than 2 ** 31 logits, of which each query sees a few; then the selection from them."""
    s_q, s_kv = sized((16_700, 131_072), (40, 300))
    ks = torch.randint(0, s_kv - 90, (s_q,), device=DEVICE, dtype=torch.int32)
    case = {
        "q": normal(s_q, 8, 128, dtype=BF16),
        "k": normal(s_kv, 128, dtype=BF16),
        "weights": normal(s_q, 8),
    }
    case.update(ks=ks, ke=ks + 90)
    logits = sparse_attn.index_logits(**case, **TRITON)
    check_logits(logits, case, most=6)
    selected = sparse_attn.select_topk(logits, 16, ks, case["ke"], **TRITON)
    t = rows_of(s_q)
    assert torch.equal(selected[t], reference.select_topk(logits[t], 16, ks[t], case["ke"][t]))


# select_topk and lightning_topk


def ranges(s_q, s_kv, seed=0):
    """Ranges of every kind: all of the row, a part, beyond its ends, empty, reversed."""
    g = torch.Generator().manual_seed(seed)
    ks = torch.randint(-5, s_kv // 2 + 1, (s_q,), generator=g, dtype=torch.int32)
    ke = torch.randint(0, s_kv + 9, (s_q,), generator=g, dtype=torch.int32)
    ks[: s_q // 3], ke[: s_q // 3] = 0, s_kv
    ks[-1], ke[-1] = INT_MIN, INT_MAX
    return ks.to(DEVICE), ke.to(DEVICE)


def check_selection(logits, topk, ks, ke):
    selected = sparse_attn.select_topk(logits, topk, ks, ke, **TRITON)
    wrong = (selected != reference.select_topk(logits, topk, ks, ke)).any(1).nonzero()[:, 0]
    assert not len(wrong), f"rows {wrong.tolist()[:9]} of {list(logits.shape)}, topk {topk}"


CONTEXTS = sized(
    [
        *((1, (1, 64)), (2047, (1, 64)), (2049, (3, 1000)), (8192, (1, 3, 1000)), (40_001, (1, 3, 64, 300))),
        *((131_072, (1, 3, 64)), (1_048_576, (1, 3))),
    ],
    [(1, (1, 3)), (70, (1, 5))],
)


@pytest.mark.parametrize("kinds", [ADVERSARIAL_LOGITS[:7], ADVERSARIAL_LOGITS[7:]], ids=["some", "others"])
@pytest.mark.parametrize("context, rows", CONTEXTS, ids=str)
def test_select_topk(context, rows, kinds):
    for kind in kinds:
        logits = adversarial_logits(kind, max(rows), context).to(DEVICE)
        for s_q in rows:
            for topk in sized((1, 512, 2048), (1, 30)):
                check_selection(logits[:s_q], topk, *ranges(s_q, context, topk))
        part = int32([context // 7]), int32([context - context // 5])
        check_selection(logits[-1:], sized(2048, 30), *part)  # a part of one row, in segments if it is long


def test_select_topk_of_strided_logits():
    for s_q, s_kv in sized(((50, 9001), (2, 131_072)), ((5, 90),)):
        ks, ke = (x.repeat_interleave(2)[::2] for x in ranges(s_q, s_kv))
        for logits in (normal(s_kv, s_q).T, normal(s_q, s_kv, 2)[..., 1], normal(s_q, s_kv + 3)[:, 3:]):
            check_selection(logits, sized(2048, 20), ks, ke)
        out = torch.full((s_q, 2 * 20, 2), INT_MAX, dtype=torch.int32, device=DEVICE)
        sparse_attn.select_topk(logits, 20, ks, ke, out=out[:, ::2, 1], **TRITON)
        assert torch.equal(out[:, ::2, 1], reference.select_topk(logits, 20, ks, ke))
        assert (out[..., 0] == INT_MAX).all() and (out[:, 1::2] == INT_MAX).all()


def check_lightning(case, topk, **options):
    """The selection is that of the logits that the other kernel gives, which other tests compare."""
    selected = sparse_attn.lightning_topk(**case, topk=topk, **options, **TRITON)
    logits = sparse_attn.index_logits(**case, **TRITON)
    assert torch.equal(selected, reference.select_topk(logits, topk, case["ks"], case["ke"]))


@pytest.mark.parametrize("form", ["bf16 bf16", "e4m3 e4m3", "e2m1 e2m1"])
def test_lightning_topk(form):
    prefill = index_case(form, *sized((700, 9000), (5, 150)), heads=64)
    decode = index_case(form, *sized((64, 20_000), (4, 130)), heads=32, sequences=sized(32, 2))
    for case in (prefill, decode):
        for topk in sized((1, 512, 2048), (1, 30)):
            check_lightning(case, topk)
        check_lightning(case, topk, workspace_bytes=sized(3 << 20, 2000))


# merge_attention, writers, physical_slots


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_merge_attention(dtype):
    shapes = sized(((2, 300, 128, 512), (7, 37, 16, 512), (32, 5, 20, 96)), ((3, 3, 5, 64), (2, 2, 3, 16)))
    for n, s_q, heads, d_v in shapes:
        outs, lses = normal(n, s_q, heads, d_v, dtype=dtype), normal(n, s_q, heads) * 20
        lses[1, ::2], lses[:, -1, -1] = -INF, -INF
        outs[lses == -INF] = NAN
        out, lse = sparse_attn.merge_attention(outs, lses, **TRITON)
        expected, expected_lse = reference.merge_attention(outs.double(), lses)
        assert_close(out, expected)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6)


TOKENS = sized(20_000, 9)
WRITTEN = {**formats.KV_FORMATS, "index_k": INDEX_K}
MIN_SCALES = (formats.FP8_MIN_SCALE, formats.FLASH_MLA_MIN_SCALE)


def hostile_rows(tokens, width, dtype):
    """Rows of every magnitude, from far below the least scale; zeros, infinities and NaN."""
    rows = torch.randn(tokens, width) * torch.logspace(-9, 4, tokens)[:, None]
    rows[0], rows[1, : width // 2] = 0, 0
    rows[3, 5], rows[4, 9], rows[5, 3] = INF, -INF, NAN
    return rows.to(dtype)


def new_cache(name, pages, page_size):
    """A cache of 0xAB; pages of 584 bytes per token are aligned."""
    size = WRITTEN[name].bytes
    stride = formats.v4_page_bytes(page_size) if name == "v4" else page_size * size
    buffer = torch.full((pages, stride), 0xAB, dtype=torch.uint8, device=DEVICE)
    return buffer[:, : page_size * size].unflatten(1, (page_size, size))


def token_bytes(part):
    """[slots, bytes] of a view on a cache, on the CPU, without the sign of a NaN code."""
    codes = part.reshape(part.shape[0] * part.shape[1], -1).contiguous().view(torch.uint8).cpu()
    return torch.where(codes & 0x7F == 0x7F, 0x7F, codes)


def rotation(tokens, columns=32):
    angles = torch.rand(tokens, columns, device=DEVICE) * 6
    return {"cos": angles.cos(), "sin": angles.sin()}


def writer(name):
    """Of a cache of that format."""
    if name == "index_k":
        return sparse_attn.write_index_k
    return partial(sparse_attn.write_kv, cache_format=name)


def written(name, rows, slots, pages, page_size=64, **options):
    cache = new_cache(name, pages, page_size)
    writer(name)(rows.to(DEVICE), cache, slots.to(DEVICE), **options, **TRITON)
    return cache


@pytest.mark.parametrize("name", list(WRITTEN))
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_written_bytes_are_those_of_the_packers(name, dtype):
    """Without norm and rotation nothing is rounded twice, so every byte is decided."""
    pages, fmt = -(-TOKENS // 64) + 3, WRITTEN[name]
    slots = torch.randperm(pages * 64)[:TOKENS]
    slots[7], slots[-1] = -1, pages * 64
    real = (slots >= 0) & (slots < pages * 64)
    rows = hostile_rows(TOKENS, fmt.width, dtype)
    conventions = [{"min_scale": min_scale} for min_scale in MIN_SCALES]
    if name in ("v32", "nope", "index_k"):
        conventions = [{**how, "power_of_two": each} for how in conventions for each in (True, False)]
    for how in [{}] if "fp4" in name else conventions:
        cache = written(name, rows, slots, pages, **how, **({"hadamard": False} if name == "index_k" else {}))
        expected = fmt.views(fmt.pack(rows[real][:, None], **how))
        untouched = torch.ones(pages * 64, dtype=torch.bool)
        untouched[slots[real]] = False
        for part, source in zip(fmt.views(cache), expected, strict=True):
            found, source = token_bytes(part), token_bytes(source)
            wrong = (found[slots[real]] != source).any(1).nonzero()[:, 0]
            assert not len(wrong), f"{len(wrong)} tokens ({how}), first {wrong[:9].tolist()}"
            assert (found[untouched] == 0xAB).all()


@pytest.mark.parametrize("stored", [BF16, FP16, FP32])
def test_written_into_caches_of_floats(stored):
    """Each value is rounded once, and layers interleaved in one allocation stay apart."""
    pages = -(-TOKENS // 64)
    slots = torch.randperm(TOKENS, device=DEVICE)
    slots[7] = -1
    kept, turn = slots >= 0, rotation(TOKENS)
    cos, sin = (a.double() for a in turn.values())
    step = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: 1e-6}[stored]
    for width in (576, 512, 128):
        every = torch.full((pages, 2, 64, width), 9.0, dtype=stored, device=DEVICE)
        rows, weight = normal(TOKENS, width, dtype=BF16), torch.rand(min(width, 512), device=DEVICE) + 0.5
        x, options = rows.double(), {"norm_weight": weight, **turn, "pairing": "half"}
        if width == 128:
            bias = normal(width)
            sparse_attn.write_index_k(rows, every[:, 1], slots, norm_bias=bias, **options, **TRITON)
            x = F.layer_norm(x, (width,), weight.double(), bias.double(), 1e-6)
            x = hadamard_transform(apply_rope(x[:, None], cos, sin, "half")[:, 0])
        else:
            sparse_attn.write_kv(rows, every[:, 1], slots, **options, **TRITON)
            x = torch.cat([F.rms_norm(x[:, :512], (512,), weight.double(), 1e-6), x[:, 512:]], 1)
            x = torch.cat([x[:, :-64], apply_rope(x[:, None, -64:], cos, sin, "half")[:, 0]], 1)
        found = every[:, 1].flatten(0, 1)
        torch.testing.assert_close(found[slots[kept]].double(), x[kept], rtol=1.01 * step, atol=2e-6)
        untouched = torch.ones(len(found), dtype=torch.bool, device=DEVICE)
        untouched[slots[kept]] = False
        assert (found[untouched] == 9).all() and (every[:, 0] == 9).all()


def assert_quantised(actual, expected):
    """At most half a step of e4m3 apart: 1/16 of the value, or half the smallest step of the block."""
    step = expected.abs() / 16 + expected.abs().amax(-1, keepdim=True) * 2.0**-16
    wrong = (actual.double() - expected).abs() > 1.01 * step
    assert not wrong.any(), f"{int(wrong.sum())} values, first at {wrong.nonzero()[0].tolist()}"


@pytest.mark.parametrize("name", ["v32", "v4", "v41", "v41_by_page"])
@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_latents_are_normalised_and_rotated(name, pairing):
    fmt = WRITTEN[name]
    d = fmt.width
    rows = (normal(TOKENS, d) * torch.logspace(-2, 2, TOKENS, device=DEVICE)[:, None]).bfloat16()
    weight, turn = (torch.rand(512, device=DEVICE) + 0.5).bfloat16(), rotation(TOKENS)
    slots = torch.randperm(TOKENS, device=DEVICE).int()
    options = {"norm_weight": weight, "eps": 1e-5, **turn, "pairing": pairing}
    cache = written(name, rows, slots, -(-TOKENS // 64), **options)
    x = rows.double()
    x = torch.cat([F.rms_norm(x[:, :512], (512,), weight.double(), 1e-5), x[:, 512:]], 1)
    turned = apply_rope(x[:, None, -64:], *(a.double() for a in turn.values()), pairing)[:, 0]
    parts = fmt.views(cache)
    values = formats.dequantise(*parts, dtype=torch.float64).flatten(0, 1)[slots.long()]
    x = torch.cat([x[:, :-64], turned], 1)
    if len(parts) == 3:
        torch.testing.assert_close(values[:, -64:], turned, rtol=2.0**-8, atol=1e-5)  # bf16
        values, x = values[:, :-64], x[:, :-64]
    assert_quantised(*(y.unflatten(1, (parts[1].shape[2], -1)) for y in (values, x)))


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_index_keys_and_queries_are_rotated(pairing):
    tokens, heads, d = TOKENS // 4, sized(64, 3), 128
    k, q = normal(tokens, d, dtype=BF16), normal(tokens, heads, d, dtype=BF16)
    weights, norm, bias, turn = (
        normal(tokens, heads),
        torch.rand(d, device=DEVICE) + 0.5,
        normal(d),
        rotation(tokens),
    )
    slots, exact_turn = torch.randperm(tokens, device=DEVICE), [a.double() for a in turn.values()]
    options = {"norm_weight": norm, "norm_bias": bias, "hadamard": True, **turn, "pairing": pairing}
    cache = written("index_k", k, slots, -(-tokens // 64), **options)
    x = F.layer_norm(k.double(), (d,), norm.double(), bias.double(), 1e-6)
    x = hadamard_transform(apply_rope(x[:, None], *exact_turn, pairing)[:, 0])
    assert_quantised(formats.unpack(cache, torch.float64).flatten(0, 1)[slots], x)
    codes, folded = sparse_attn.quantise_index_q(q, weights, **turn, pairing=pairing, **TRITON)
    x = hadamard_transform(apply_rope(q.double(), *exact_turn, pairing))
    assert_quantised(codes.double() * (folded / weights)[..., None].double(), x)


@pytest.mark.parametrize("d", [64, 128])
def test_query_bytes(d):
    heads, tokens = 64, sized(1000, 2)
    q, weights = hostile_rows(tokens * heads, d, BF16).view(tokens, heads, d), torch.randn(tokens, heads)
    for power_of_two in (True, False):
        how = {"power_of_two": power_of_two, "min_scale": formats.FP8_MIN_SCALE}
        codes, folded = sparse_attn.quantise_index_q(
            q.to(DEVICE), weights.to(DEVICE), hadamard=False, **how, **TRITON
        )
        scale = formats.fp8_scale(q.float().abs().amax(-1), **how)
        expected = formats.to_e4m3(q.float() / scale[..., None])
        assert torch.equal(token_bytes(codes), token_bytes(expected)), how
        assert torch.equal(folded.cpu().nan_to_num(9.0), (weights * scale).nan_to_num(9.0)), how


def test_writing_beyond_32_bits():
    """A cache of more than 2 ** 32 bytes, written at both ends."""
    pages = sized(103_000, 3)
    cache = torch.full((pages, 64, 656), 0xAB, dtype=torch.uint8, device=DEVICE)
    rows = normal(8, 576, dtype=BF16)
    slots = torch.tensor(
        [0, 63, 64, pages * 32, pages * 64 - 65, pages * 64 - 1, -1, pages * 64], device=DEVICE
    )
    sparse_attn.write_kv(rows, cache, slots, **TRITON)
    assert torch.equal(cache.view(-1, 656)[slots[:6]], formats.pack_v32_kv(rows[:6]))
    cache.view(-1, 656)[slots[:6]] = 0xAB
    assert all((part == 0xAB).all() for part in cache.split(10_000))


def test_physical_slots():
    for s_q, topk, sequences, pages in sized(
        ((3000, 2048, 1000, 500), (64, 2047, 64, 2048)), ((6, 40, 3, 5),)
    ):
        positions = selection_indices(s_q, 2 * pages * 64, topk, device=DEVICE)
        table = torch.randint(
            0, 2**26, (sequences, pages), device=DEVICE, dtype=torch.int32
        )  # some too large
        table[:, ::7] = -1
        slots = sparse_attn.physical_slots(positions, table, 64, **TRITON)
        assert torch.equal(slots, reference.physical_slots(positions, table, 64))


# The facades and the layer


MODULES = {"flash_mla": flash_mla, "deep_gemm": deep_gemm}
CHECKS = [(library, check) for library in MODULES for check in conformance.checks(library)]


@pytest.mark.parametrize("library, check", CHECKS, ids=lambda x: getattr(x, "__name__", x))
def test_facades_conform(library, check):
    said = conformance.failure(check, MODULES[library], DEVICE)
    assert said is None, said


@pytest.mark.parametrize("cache_dtype", [BF16, E4M3])
def test_a_layer_prefills_and_decodes(cache_dtype):
    sizes = {"hidden_size": 256, "num_attention_heads": 16, "q_lora_rank": 128, "index_n_heads": 32}
    topk, counts = sized((128, [(700, 300), (1, 1), (1, 1), (3, 60)]), (12, [(20, 3), (1, 1), (2, 4)]))
    config = DSAConfig.deepseek_v32(**sizes, index_topk=topk, indexer_fp8=cache_dtype == E4M3)
    torch.manual_seed(0)
    on_triton, on_reference = (
        SparseMLA(config, dtype=BF16, device=DEVICE, backend=backend) for backend in ("triton", "reference")
    )
    on_reference.load_state_dict(on_triton.state_dict())
    caches = [DSACache(config, 1000, batch_size=2, dtype=cache_dtype, device=DEVICE) for _ in range(2)]
    for step in counts:
        hidden, boundaries = normal(sum(step), 256, dtype=BF16), torch.tensor([0, *step]).cumsum(0)
        with torch.inference_mode():
            got, expected = (
                layer(hidden, cache=cache, cu_seqlens_q=boundaries)
                for layer, cache in zip((on_triton, on_reference), caches, strict=True)
            )
        error = relative_error(got, expected)
        assert error < 2e-2, f"relative error {error:.3g} of {step} tokens"


# What the host sees: results that repeat, CUDA graphs, no waiting. A call is a function without arguments
# that gives tensors, and the tensors that it reads.


def mla_call(s_q, heads, cache=None):
    d_qk = formats.KV_FORMATS[cache].width if cache else 576
    inputs = mla_case(s_q, heads, TOPK, d_qk, cache=cache, extra_topk=sized(130, 33))
    if cache is None:
        inputs["kv"].normal_()  # instead of NaN
        inputs["extra_kv"].normal_()
    options = {"return_lse": True, "return_max_logits": True}
    tensors = [x for x in inputs.values() if isinstance(x, torch.Tensor)]
    return lambda: sparse_attn.sparse_mla(**inputs, **options, **TRITON), tensors


def gqa_call():
    inputs = gqa_case(sized(7, 2), 32, 4, 128, sized(1025, 40), per_head=True)
    inputs["k"].normal_()
    inputs["v"].normal_()
    return lambda: sparse_attn.sparse_gqa(**inputs, return_lse=True, **TRITON), inputs.values()


def index_call(name, form, sequences=0):
    inputs = index_case(form, *sized((64, 20_000), (4, 100)), heads=64, sequences=sequences)
    options = {"topk": sized(2048, 20)} if name == "lightning_topk" else {}
    return lambda: (getattr(sparse_attn, name)(**inputs, **options, **TRITON),), inputs.values()


def select_call(s_q, s_kv):
    logits, (ks, ke) = normal(s_q, s_kv).relu(), ranges(s_q, s_kv)
    return lambda: (sparse_attn.select_topk(logits, sized(2048, 20), ks, ke, **TRITON),), (logits, ks, ke)


def merge_call():
    outs, lses = normal(5, sized(37, 2), 16, 512, dtype=BF16), normal(5, sized(37, 2), 16)
    return lambda: sparse_attn.merge_attention(outs, lses, **TRITON), (outs, lses)


def write_call(name):
    tokens = sized(300, 5)
    rows, cache = normal(tokens, WRITTEN[name].width, dtype=BF16), new_cache(name, sized(9, 2), 64)
    slots, turn = torch.randperm(tokens, device=DEVICE), rotation(tokens)
    if name == "index_k":
        options = {"norm_weight": normal(128), "norm_bias": normal(128)}
    else:
        options = {"norm_weight": normal(512)}
    write = writer(name)

    def call():
        cache.fill_(0xAB)
        write(rows, cache, slots, **options, **turn, pairing="half", **TRITON)
        return (cache,)

    return call, (rows, slots, *turn.values(), *options.values())


def quantise_call():
    q, weights = normal(sized(50, 2), 64, 128, dtype=BF16), normal(sized(50, 2), 64)
    turn = rotation(len(q))
    return lambda: sparse_attn.quantise_index_q(q, weights, **turn, pairing="half", **TRITON), (q, weights)


def slots_call():
    positions = selection_indices(sized(64, 4), 4000, sized(2048, 20), device=DEVICE)
    table = torch.randint(-1, 1000, (4, 50), device=DEVICE, dtype=torch.int32)
    ends = torch.linspace(0, len(positions), 5, device=DEVICE).int()
    options = {"cu_seqlens_q": ends, **TRITON}
    return lambda: (sparse_attn.physical_slots(positions, table, 64, **options),), (positions, table, ends)


CALLS = {
    "mla in splits": lambda: mla_call(1, 64),
    "mla": lambda: mla_call(sized(200, 3), 64),
    "mla of 656 bytes": lambda: mla_call(sized(5, 2), 16, cache="v32"),
    "mla of 584 bytes": lambda: mla_call(sized(5, 2), 16, cache="v4"),
    "mla of 288 bytes": lambda: mla_call(sized(5, 2), 16, cache="v41_fp4_by_page"),
    "gqa": gqa_call,
    "logits": lambda: index_call("index_logits", "bf16 bf16"),
    "logits of e4m3": lambda: index_call("index_logits", "e4m3 e4m3", sequences=sized(32, 2)),
    "lightning_topk": lambda: index_call("lightning_topk", "bf16 bf16", sequences=sized(32, 2)),
    "lightning_topk of e4m3": lambda: index_call("lightning_topk", "e4m3 e4m3", sequences=sized(64, 4)),
    "top-k": lambda: select_call(sized(100, 3), sized(9000, 50)),
    "top-k in segments": lambda: select_call(2, sized(131_072, 50)),
    "merge": merge_call,
    "write_kv 656": lambda: write_call("v32"),
    "write_kv 584": lambda: write_call("v4"),
    "write_kv 288": lambda: write_call("v41_fp4"),
    "write_index_k": lambda: write_call("index_k"),
    "quantise_index_q": quantise_call,
    "physical_slots": slots_call,
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_repeat_bit_for_bit(name):
    call, _ = CALLS[name]()
    first = [x.clone() for x in call()]
    for _ in range(4):
        assert_same_bits(call(), first)


@needs_cuda
@pytest.mark.parametrize("name", CALLS)
def test_calls_repeat_beside_a_busy_stream(name):
    call, _ = CALLS[name]()
    first = [x.clone() for x in call()]
    x = normal(2048, 2048, dtype=BF16)
    torch.cuda.synchronize()
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        for _ in range(50):
            x = (x @ x).clamp(-1, 1)
    for _ in range(4):
        assert_same_bits(call(), first)
    torch.cuda.synchronize()


@needs_cuda
@pytest.mark.parametrize("name", CALLS)
def test_graphs_follow_their_inputs(name):
    """A captured call, replayed after the contents of its inputs have changed."""
    call, inputs = CALLS[name]()
    call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    for seed in range(2):
        change(inputs, seed)
        graph.replay()
        replayed = [x.clone() for x in outputs]
        assert_same_bits(replayed, call())


@needs_cuda
@pytest.mark.parametrize("layer, cache_dtype", [(SparseMLA, BF16), (SparseMLA, E4M3), (SparseGQA, BF16)])
def test_captured_steps_of_a_layer_follow_their_inputs(layer, cache_dtype):
    """Replays with other hidden states and counts, against a cache whose lengths the host knows."""
    sizes = {"hidden_size": 256, "num_attention_heads": 16, "index_n_heads": 32, "index_topk": 128}
    if layer is SparseMLA:
        config = DSAConfig.deepseek_v32(**sizes, q_lora_rank=128, indexer_fp8=cache_dtype == E4M3)
    else:
        grouped = {"num_key_value_heads": 2, "head_dim": 64, "index_head_dim": 128}
        config = DSAConfig(**sizes, **grouped, indexer_rope="half")
    torch.manual_seed(0)
    layer = layer(config, dtype=BF16, device=DEVICE)
    on_host, captured = (
        DSACache(config, 1000, 3, dtype=cache_dtype, device=DEVICE, capturable=c) for c in (False, True)
    )
    hidden, boundaries = normal(4, 256, dtype=BF16), int32([0, 0, 0, 4])
    prompt, prompts = normal(900, 256, dtype=BF16), int32([0, 500, 500, 900])

    def step(cache):
        return layer(hidden, cache=cache, cu_seqlens_q=boundaries)

    for cache in (on_host, captured):
        layer(prompt, cache=cache, cu_seqlens_q=prompts)
    warming = torch.cuda.Stream()
    warming.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warming):
        step(captured)  # compiles
    torch.cuda.current_stream().wait_stream(warming)
    captured.truncate(400, sequence=2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(captured)
    for counts in ([1, 1, 2], [0, 4, 0], [4, 0, 0], [0, 2, 2]):
        hidden.normal_()
        boundaries.copy_(int32([0, *counts]).cumsum(0))
        graph.replay()
        error = relative_error(out, step(on_host))
        assert error < 2e-2, f"relative error {error:.3g} of {counts}"
        assert captured.lengths == on_host.lengths
        for cache in (on_host, captured):
            cache.truncate(cache.lengths[0] - 1)  # a draft is rejected; replays see it


def change(tensors, seed):
    """Other contents of the same kind: everything moves along one dimension; indices stay indices."""
    for tensor in tensors:
        dim = 0 if tensor.shape[0] > 1 else -1
        numbers = tensor.view(torch.uint8) if tensor.dtype == E4M3 else tensor  # torch cannot roll e4m3
        numbers.copy_(numbers.roll(1 + seed, dim))


@needs_cuda
@pytest.mark.parametrize("name", CALLS)
def test_calls_do_not_wait_for_the_gpu(name):
    call, _ = CALLS[name]()
    call()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
