"""Quantised caches in use: the functions read them in place and give the same results as on their values."""

import pytest
import torch

import sparse_attn
from sparse_attn import formats, reference
from sparse_attn.ops import attention
from sparse_attn.ops.backends import native
from sparse_attn.ops.backends import torch as torch_backend
from sparse_attn.testing import INT_MAX, INT_MIN, assert_close, assert_logits_close, index_inputs, mla_inputs

LATENT, KEYS = list(formats.KV_FORMATS), list(formats.INDEX_K_FORMATS)
BY_TOKEN = [name for name, fmt in formats.KV_FORMATS.items() if not fmt.by_page]
FORMATS = formats.FORMATS


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.uint8)


@pytest.fixture
def backend(backend):
    if backend == "triton":
        pytest.skip("the Triton kernels are tested in tests/interpreted and tests/test_index.py")
    return backend


def hostile_cache(name, values, page_size, gap=0, **options):
    """``values`` ``[s_kv, width]`` in pages of a cache where each byte that no value needs is 0xFF.

    Tokens whose values are NaN are not needed either: their codes are NaN, and so are their scales.
    """
    pages = -(-len(values) // page_size)
    padded = values.new_full((pages * page_size, values.shape[1]), float("nan"))
    padded[: len(values)] = values
    used = ~padded.isnan().any(-1).view(pages, page_size)
    fmt = FORMATS[name]
    packed = fmt.pack(padded.nan_to_num().view(pages, page_size, -1), **options)
    buffer = torch.full((pages, fmt.page_bytes(page_size) + gap), 0xFF, dtype=torch.uint8)
    cache = buffer[:, : page_size * fmt.bytes].unflatten(1, (page_size, fmt.bytes))
    for part, source in zip(fmt.views(cache), fmt.views(packed), strict=True):
        part[used] = source[used]
    return cache


def values_of(cache, name):
    return formats.unpack(cache, torch.float64, name)


def attend(backend, inputs, kv, **options):
    """The output on quantised caches; it and lse are compared with the fp64 reference on their values."""
    q, indices = inputs["q"], inputs["indices"]
    out, lse = sparse_attn.sparse_mla(q, kv, indices, **options, return_lse=True, backend=backend)
    for name, cache in (("kv", kv), ("extra_kv", options.get("extra_kv"))):
        if cache is not None:
            fmt = options.pop(f"{name}_format", None)
            options[name] = cache.double() if fmt is None else values_of(cache, fmt).flatten(0, 1)
    options |= {"indices": indices, "return_lse": True, "backend": "reference"}
    expected, expected_lse = sparse_attn.sparse_mla(q.double(), **options)
    assert_close(out, expected)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    return out


def latent_inputs(name, s_kv, seed=0, dtype=torch.bfloat16):
    return mla_inputs(3, s_kv, h_q=5, topk=16, d_qk=FORMATS[name].width, dtype=dtype, seed=seed)


@pytest.mark.parametrize("page_size, pages", [(1, 50), (7, 9), (64, 2)])
@pytest.mark.parametrize("name", LATENT)
def test_attention_over_a_quantised_cache(backend, name, page_size, pages):
    inputs = latent_inputs(name, page_size * pages)
    attend(backend, inputs, hostile_cache(name, inputs["kv"], page_size), kv_format=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", LATENT)
def test_queries_of_every_dtype(backend, dtype, name):
    inputs = latent_inputs(name, 40, dtype=dtype)
    options = {"power_of_two": False} if name in ("v32", "nope") else {}
    attend(backend, inputs, hostile_cache(name, inputs["kv"], 8, **options), kv_format=name)


CODES = torch.arange(256, dtype=torch.uint8)


def every(dtype):
    """Finite bytes of a part of a cache: all e4m3 and ue8m0 that fp32 can hold in products; all e2m1."""
    return CODES[(CODES & 0x7F) != 0x7F] if dtype == torch.float8_e4m3fn else CODES


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", LATENT)
def test_every_code_and_scale(backend, name, dtype):
    """One selected token per query: out is that token's value, bit for bit."""
    fmt = FORMATS[name]
    cache = hostile_cache(name, torch.zeros(240, fmt.width), 8)
    values, scales, *_ = fmt.views(cache)
    codes = every(values.dtype)
    values.view(torch.uint8).copy_(codes.roll(3).repeat(3)[: values.shape[-1]])
    if scales.dtype == torch.float32:
        scales.flatten(0, 1)[:] = torch.exp2(torch.arange(240.0)[:, None] % 16 * 7 - 60) * torch.tensor(
            [1.0, 0.7, 3.0, 0.0]
        )
    else:  # of ue8m0 those whose products bf16 and fp32 hold as normal numbers
        usable = every(scales.dtype)[27:240] if scales.dtype == torch.uint8 else every(scales.dtype)
        for group in range(scales.shape[-1]):
            scales.view(torch.uint8)[..., group] = usable.roll(11 * group).repeat(2)[:240].view(30, 8)
    expected = values_of(cache, name).flatten(0, 1)
    q, indices = torch.zeros(240, 1, fmt.width, dtype=dtype), torch.arange(240, dtype=torch.int32)[:, None]
    out = sparse_attn.sparse_mla(q, cache, indices, kv_format=name, backend=backend)
    assert torch.equal(out[:, 0], expected[:, :512].float().to(dtype))


@pytest.mark.parametrize("name", LATENT)
def test_pages_apart_and_the_shapes_of_a_cache(backend, name):
    inputs = latent_inputs(name, 40)
    options = {"attn_sink": torch.randn(5), "topk_length": torch.tensor([16, 3, 0], dtype=torch.int32)}
    options["kv_format"] = name
    cache = hostile_cache(name, inputs["kv"], 8)
    out = attend(backend, inputs, cache, **options)
    call = {**options, "indices": inputs["indices"], "backend": backend}
    apart = hostile_cache(name, inputs["kv"], 8, gap=44)
    assert apart.stride(0) == cache.stride(0) + 44
    shapes = [apart, cache[:, :, None], apart[:, :, None]]
    if name in BY_TOKEN:
        size = FORMATS[name].bytes
        shapes += [cache.reshape(40, size), torch.cat([cache, cache], -1).view(40, -1)[:, :size]]
    for shape in shapes:
        assert torch.equal(sparse_attn.sparse_mla(inputs["q"], shape, **call), out)


@pytest.mark.parametrize("name", LATENT)
def test_the_bytes_and_their_format_reach_an_op_in_place(name, monkeypatch):
    inputs = latent_inputs(name, 40)
    cache = hostile_cache(name, inputs["kv"], 8, gap=44)
    q, indices, seen = inputs["q"], inputs["indices"], []
    monkeypatch.setattr(attention, "call", lambda _, a, backend: seen.append(a))
    unambiguous = [fmt.bytes for fmt in formats.KV_FORMATS.values()].count(FORMATS[name].bytes) == 1
    sparse_attn.sparse_mla(q, cache, indices, kv_format=None if unambiguous else name)
    sparse_attn.sparse_mla(q, cache[:, :, None], indices, kv_format=name)
    extra = {"extra_kv": cache, "extra_indices": indices, "extra_kv_format": name}
    sparse_attn.sparse_mla(q, q[:, 0], indices, **extra)
    assert [(a.kv_format, a.extra_kv_format) for a in seen] == [(name, None), (name, None), (None, name)]
    for kv in (seen[0].kv, seen[1].kv, seen[2].extra_kv):
        assert kv.data_ptr() == cache.data_ptr()
        assert (kv.shape, kv.stride()) == (cache.shape, cache.stride())
    if name in BY_TOKEN:
        size = FORMATS[name].bytes
        rows = zeros(40, size + 4)[:, :size]
        sparse_attn.sparse_mla(q, rows, indices, kv_format=name)
        assert seen[3].kv.data_ptr() == rows.data_ptr()
        assert (seen[3].kv.shape, seen[3].kv.stride(0)) == ((40, 1, size), size + 4)  # pages of one token


@pytest.mark.parametrize("name", LATENT)
def test_hostile_indices(backend, name):
    inputs = latent_inputs(name, 40)
    inputs["kv"].nan_to_num_()
    inputs["kv"][[0, 39]] = float("nan")
    cache = hostile_cache(name, inputs["kv"], 8)
    indices = torch.tensor([[INT_MIN, 38, -1, 1, 40, 1, INT_MAX, 41]] * 3, dtype=torch.int32)
    indices[1] = torch.tensor([INT_MIN, INT_MAX, -1, 40] * 2)
    out = attend(backend, {**inputs, "indices": indices}, cache, kv_format=name)
    assert (out[1] == 0).all() and out[0].isfinite().all()


@pytest.mark.parametrize(
    "first, second",
    [
        *(("v32", "v32"), ("v32", None), (None, "v32"), ("v4", "v4"), ("v4", None), (None, "v41_fp4")),
        *(("v41", "v41_fp4"), ("v41_fp4", "v41"), ("v41_by_page", "v41_fp4_by_page"), ("nope", "v41")),
        *(("v41", "v41_by_page"), ("v41_fp4_by_page", "v41_fp4"), (None, "nope")),
    ],
)
def test_two_segments_of_any_two_formats(backend, first, second):
    name = first or second
    one, two = latent_inputs(name, 40, seed=1), latent_inputs(name, 32, seed=2)
    caches = [
        part["kv"] if form is None else hostile_cache(form, part["kv"], 8, gap=44)
        for form, part in ((first, one), (second, two))
    ]
    length = torch.tensor([9, 0, 16], dtype=torch.int32)
    extra = {"extra_kv": caches[1], "extra_indices": two["indices"], "extra_topk_length": length}
    names = {"kv_format": first, "extra_kv_format": second}
    attend(backend, one, caches[0], **extra, **names, attn_sink=torch.randn(5))


@pytest.mark.parametrize(
    "name, shape",
    [
        (name, shape)
        for name in LATENT
        for shape in [(0, 8), (3, 0), (0, 0), *([(0,)] if name in BY_TOKEN else [])]
    ],
)
def test_caches_without_a_slot(backend, name, shape):
    cache = zeros(*shape, FORMATS[name].bytes)
    for s_q in (0, 2):
        q, indices = torch.randn(s_q, 3, FORMATS[name].width), torch.zeros(s_q, 4, dtype=torch.int32)
        options = {"kv_format": name, "return_lse": True, "backend": backend}
        out, lse = sparse_attn.sparse_mla(q, cache, indices, **options)
        assert out.shape == (s_q, 3, 512)
        assert (out == 0).all() and torch.isneginf(lse).all()


@pytest.fixture
def dequantised(monkeypatch):
    """(values, scales and so on) of every call of dequantise, in a test whose work torch does."""
    calls, dequantise = [], formats.dequantise

    def recording(*parts, dtype):
        calls.append(parts)
        return dequantise(*parts, dtype=dtype)

    monkeypatch.setattr(reference, "dequantise", recording)
    with native.use(None):
        yield calls


@pytest.mark.parametrize("name", LATENT)
def test_torch_dequantises_selected_rows_in_bounded_chunks(name, monkeypatch, dequantised):
    s_q, topk, pages, width = 12, 512, 400, FORMATS[name].width
    monkeypatch.setattr(torch_backend, "GATHER_BYTES", 3 * topk * width * 4)
    indices, cache = (
        torch.randint(0, pages * 64, (s_q, topk), dtype=torch.int32),
        zeros(pages, 64, FORMATS[name].bytes),
    )
    sparse_attn.sparse_mla(torch.randn(s_q, 2, width), cache, indices, kv_format=name)
    counts = [values.shape[:-1].numel() for values, *_ in dequantised]
    assert counts == [3 * topk] * 4
    assert sum(counts) < pages * 64


def scored(backend, inputs, k, table, name):
    """Logits of quantised keys, compared with the fp64 reference on their values; selections are theirs."""
    options = {"k": k, "block_table": table, "backend": backend}
    logits = sparse_attn.index_logits(**inputs, **options)
    for topk, memory in ((5, {}), (7, {"workspace_bytes": 1})):
        indices = sparse_attn.lightning_topk(**inputs, **options, topk=topk, **memory)
        assert torch.equal(indices, sparse_attn.select_topk(logits, topk, inputs["ks"], inputs["ke"]))
    if table is None:
        table = torch.arange(len(k), dtype=torch.int32)[None]
    assert_logits_close(logits, **inputs, k=values_of(k, name), block_table=table)
    return logits


def key_inputs(name, s_q=4, dtype=torch.bfloat16):
    inputs = index_inputs(s_q, 48, 8, FORMATS[name].width, dtype=dtype)
    inputs["ke"].clamp_(max=48)
    return inputs, inputs.pop("k")


@pytest.mark.parametrize("page_size", [1, 7, 64])
@pytest.mark.parametrize("name", KEYS)
def test_scores_of_quantised_index_keys(backend, name, page_size):
    inputs, k = key_inputs(name)
    cache = hostile_cache(name, k, page_size, gap=44)
    n = len(cache)
    order = torch.randperm(n)
    shuffled = torch.full((n, cache.stride(0)), 0xFF, dtype=torch.uint8)
    shuffled[order] = cache.as_strided(shuffled.shape, (cache.stride(0), 1))
    size = FORMATS[name].bytes
    shuffled = shuffled[:, : page_size * size].unflatten(1, (page_size, size))
    table = torch.cat([order, torch.tensor([INT_MIN, -1, n, INT_MAX])])[None].int()
    logits = scored(backend, inputs, shuffled, table, name)
    in_order = scored(backend, inputs, cache, None, name)
    assert torch.equal(in_order, logits[:, : n * page_size])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name, options", [("fp8_index", {"power_of_two": False}), ("mxfp4_index", {})])
def test_index_queries_of_every_dtype(backend, dtype, name, options):
    inputs, k = key_inputs(name, dtype=dtype)
    scored(backend, inputs, hostile_cache(name, k, 8, **options), torch.tensor([[5, 0, 3]]).int(), name)


@pytest.mark.parametrize("name", KEYS)
def test_a_block_table_row_serves_consecutive_queries(backend, name):
    inputs, k = key_inputs(name, 6)
    cache = hostile_cache(name, k.nan_to_num(), 8)
    table = torch.tensor([[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [-1, 0, 9, 0, 1, 1]], dtype=torch.int32)
    scored(backend, inputs, cache, table, name)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)])
@pytest.mark.parametrize("name", KEYS)
def test_no_keys(backend, name, shape):
    cache = zeros(*shape, FORMATS[name].bytes)
    for s_q in (0, 2):
        bounds = torch.full((2, s_q), 5, dtype=torch.int32).unbind()
        inputs = torch.randn(s_q, 3, FORMATS[name].width), cache, torch.randn(s_q, 3)
        assert sparse_attn.index_logits(*inputs, *bounds, backend=backend).shape == (s_q, 0)
        assert sparse_attn.lightning_topk(*inputs, 2, *bounds, backend=backend).tolist() == [[-1, -1]] * s_q


def test_torch_dequantises_a_block_of_keys_at_a_time(dequantised):
    ks, ke = torch.tensor([[64], [64 + 2500]], dtype=torch.int32)
    sparse_attn.index_logits(torch.randn(1, 2, 128), zeros(100, 64, 68), torch.randn(1, 2), ks, ke)
    of_keys = [len(values) for values, scales in dequantised if scales is not None]
    assert of_keys == [2048, 452]


def compiled(q, kv, other, indices, index_q, k, weights, ks, ke):
    plain = other[..., :512].to(q.dtype)
    apart = torch.stack([plain, plain], 1)[:, 0]
    return (
        sparse_attn.sparse_mla(q, kv, indices),
        sparse_attn.sparse_mla(q, other, indices, kv_format="v41_by_page"),
        sparse_attn.sparse_mla(
            q, apart, indices, extra_kv=other, extra_indices=indices, extra_kv_format="v41"
        ),
        sparse_attn.lightning_topk(index_q, k, weights, 5, ks, ke),
    )


def test_compiled_functions_give_the_same_results():
    function = torch.compile(compiled, fullgraph=True, dynamic=True, backend="aot_eager")
    for pages in (5, 9):
        inputs, k = key_inputs("mxfp4_index")
        latent = latent_inputs("v4", 8 * pages)
        arguments = (
            *(
                latent["q"],
                hostile_cache("v4", latent["kv"], 8),
                torch.randint(0, 100, (pages, 8, 528)).byte(),
            ),
            latent["indices"],
            *(
                inputs["q"],
                hostile_cache("mxfp4_index", k, 8, gap=44),
                inputs["weights"],
                inputs["ks"],
                inputs["ke"],
            ),
        )
        for actual, expected in zip(function(*arguments), compiled(*arguments), strict=True):
            assert torch.equal(actual, expected)


Q512, Q576 = torch.zeros(1, 2, 512), torch.zeros(1, 2, 576)
INDICES = torch.zeros(1, 3, dtype=torch.int32)
V32, V4 = zeros(4, 8, 656), zeros(4, 8, 584)


def extra(cache):
    return {"extra_kv": cache, "extra_indices": INDICES}


@pytest.mark.parametrize(
    "q, kv, options, words",
    [
        (Q576, zeros(4, 8, 655), {}, r"kv: expected 656, 584, 528 or 288 bytes .* \[4, 8, 655\]"),
        (Q576, zeros(4, 8, 132), {}, "kv: expected 656, 584, 528 or 288 bytes"),
        (Q576, zeros(4, 8, 2, 656), {}, r"kv: expected shape \[pages, page_size, 1, 656\], got"),
        (Q512, zeros(8, 584), {}, r"kv: expected shape \[pages, page_size, 584\], got \[8, 584\]"),
        (Q576[..., :64], V32, {"d_v": 64}, "q: expected d_qk=576, as kv has 656 .* 64"),
        (Q576, V4, {}, "q: expected d_qk=512, as kv has 584 bytes per token, got 576"),
        (Q512, V32, {}, "q: expected d_qk=576, as kv has 656 bytes per token, got 512"),
        (
            Q512,
            zeros(4, 8, 288),
            {"d_v": 448, "kv_format": "v41_fp4"},
            "d_v: expected 512, as kv is quantised, got 448",
        ),
        (Q576, V32, {"d_v": 576}, "d_v: expected 512, as kv is quantised, got 576"),
        (Q512, zeros(4, 16, 584)[:, ::2], {}, "kv: expected pages of adjoining bytes.* strides"),
        (Q512, zeros(4, 8, 600)[..., :584], {}, "kv: expected pages of adjoining bytes"),
        (Q512, zeros(4, 584, 8).mT, {}, "kv: expected pages of adjoining bytes"),
        (Q512, zeros(4, 8, 1056)[..., ::2], {"kv_format": "v41"}, "kv: expected tokens of adjoining bytes"),
        (
            Q512,
            zeros(4, 8, 528),
            {},
            "^kv_format: expected 'v41', 'v41_by_page' or 'nope', as kv has 528 .* None",
        ),
        (Q512, zeros(4, 8, 288), {"kv_format": "v41"}, "^kv_format: expected 'v41_fp4' or 'v41_fp4_by_page'"),
        (Q576, V32, {"kv_format": "nope"}, "^kv_format: expected 'v32', as kv has 656 .* got 'nope'"),
        (
            Q512,
            V4[..., :512].float(),
            {"kv_format": "v4"},
            "^kv_format: expected None, as kv is float32 .* 'v4'",
        ),
        (Q512, V4, {"extra_kv_format": "v4"}, "^extra_kv_format: expected None without extra_kv"),
        (
            Q512,
            V4,
            extra(zeros(4, 8, 528)),
            "^extra_kv_format: expected 'v41', 'v41_by_page' or 'nope', as extra_kv",
        ),
        (Q512, zeros(32, 528), {"kv_format": "v41_by_page"}, r"kv: expected shape \[pages, page_size, 528\]"),
        (
            Q576,
            zeros(4, 8, 528),
            {"kv_format": "nope"},
            "q: expected d_qk=512, as kv has 528 bytes per token",
        ),
        (Q576, zeros(4, 8, 657)[..., :656], {}, "kv: .*at multiples of 4 bytes"),
        (Q512, zeros(4 * 8 * 584 + 1)[1:].view(4, 8, 584), {}, "at multiples of 2 .* offset 1"),
        (Q512, V4.to("meta"), {}, "kv: expected device cpu, got meta"),
        (Q512, V4.char(), {}, r"kv: expected shape .*d_qk=512\], got \[4, 8, 584\]"),
        (
            Q512,
            V4,
            extra(V32),
            "q: expected d_qk=576, as extra_kv has 656 bytes per token, got 512",
        ),
        (Q512, V4, extra(zeros(8, 576)), "extra_kv: expected 656, 584, 528 or 288 bytes"),
    ],
)
def test_wrong_latent_caches(q, kv, options, words):
    with pytest.raises(ValueError, match=words):
        sparse_attn.sparse_mla(q, kv, INDICES, **options)


def test_an_extra_cache_of_another_dtype():
    with pytest.raises(TypeError, match="extra_kv: expected dtype float32, got bfloat16"):
        sparse_attn.sparse_mla(Q512, V4, INDICES, **extra(torch.zeros(8, 512).bfloat16()))


@pytest.mark.parametrize(
    "d, k, words",
    [
        (128, zeros(4, 8, 131), r"k: expected 132, 68 or 36 bytes per token .* got shape \[4, 8, 131\]"),
        (128, V32, "k: expected 132, 68 or 36 bytes per token"),
        (128, zeros(8, 68), r"k: expected shape \[pages, page_size, 68\], got \[8, 68\]"),
        (64, zeros(4, 8, 68), "q: expected index_head_dim=128, as k has 68 bytes per token, got 64"),
        (128, zeros(4, 16, 68)[:, ::2], "k: expected pages of adjoining bytes"),
        (128, zeros(4, 8 * 132 + 2)[:, :-2].unflatten(1, (8, 132)), "k: .* at multiples of 4 bytes"),
    ],
)
def test_wrong_index_keys(d, k, words):
    inputs = index_inputs(1, 8, 2, d)
    inputs["k"] = k
    with pytest.raises(ValueError, match=words):
        sparse_attn.index_logits(**inputs)
    with pytest.raises(ValueError, match=words):
        sparse_attn.lightning_topk(**inputs, topk=2)
