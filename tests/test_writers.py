"""write_kv, write_index_k and quantise_index_q: the bytes of the packers, in the right slots."""

import os

import pytest
import torch
import torch.nn.functional as F

import sparse_attn
from sparse_attn import formats
from sparse_attn.rope import apply_rope, hadamard_transform
from sparse_attn.testing import INT_MAX, INT_MIN

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
NAN, INF = float("nan"), float("inf")
CONVENTIONS = [
    {"power_of_two": power_of_two, **options}
    for options in ({}, {"min_scale": formats.FLASH_MLA_MIN_SCALE})
    for power_of_two in (True, False)
]
FORMS = [
    (size, options)
    for size in (656, 584, 132)
    for options in CONVENTIONS
    if size != 584 or options["power_of_two"]
]
WIDTH = {656: 576, 584: 512, 132: 128}
FORMATS = {formats.FORMATS[name].bytes: formats.FORMATS[name] for name in ("v32", "v4", "fp8_index")}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=["triton"] if INTERPRETED else ["cpu"] + ["triton"] * torch.cuda.is_available())
def backend(request):
    """One CPU backend is enough: they all run the reference."""
    return request.param


def hostile_rows(tokens, width, dtype):
    """Rows of every magnitude, from far below the least scale; zeros, infinities and NaN."""
    rows = torch.randn(tokens, width) * torch.logspace(-9, 4, tokens)[:, None]
    rows[0] = 0
    rows[1, : width // 2] = 0
    rows[2, ::7] *= 1e-3
    rows[3, 5], rows[4, 9], rows[5, 3] = INF, -INF, NAN
    return rows.to(dtype)


def new_cache(size, pages, page_size, gap=0):
    """A cache of 0xAB, with ``gap`` bytes between its pages."""
    stride = formats.v4_page_bytes(page_size) if size == 584 else page_size * size
    buffer = torch.full((pages, stride + gap), 0xAB, dtype=torch.uint8)
    return buffer[:, : page_size * size].unflatten(1, (page_size, size)), buffer


def rotation(tokens, columns, exact=False):
    if exact:  # no angles, but products are exact in fp32
        pair = torch.tensor([[1.0, 0.5, 0.0, -1.0], [0.0, 2.0, 1.0, -0.5]])
        return pair[:, None].repeat(1, tokens, columns)[..., :columns]
    angles = torch.rand(tokens, columns) * 6
    return angles.cos(), angles.sin()


def same_bytes(one, other):
    """Whether they are equal, apart from the sign of a NaN code."""
    return torch.equal(*(torch.where(x & 0x7F == 0x7F, 0x7F, x) for x in (one, other)))


def token_bytes(part):
    """[slots, bytes] of a view on a cache."""
    return part.reshape(part.shape[0] * part.shape[1], -1).contiguous().view(torch.uint8)


def write(size, rows, cache, slots, device, backend, **options):
    function = sparse_attn.write_index_k if size == 132 else sparse_attn.write_kv
    if size == 132:
        options = {"hadamard": False, **options}
    options = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    there = cache.to(device) if device != "cpu" else cache
    function(rows.to(device), there, slots.to(device), **options, backend=backend)
    if there is not cache:
        cache.copy_(there)


def quantised_q(q, weights, device, backend, **options):
    result = sparse_attn.quantise_index_q(q.to(device), weights.to(device), **options, backend=backend)
    return [x.cpu() for x in result]


@pytest.mark.parametrize("size, convention", FORMS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_bytes_are_those_of_the_packers(backend, device, size, dtype, convention):
    tokens, pages, page_size = 20, 5, 6
    rows = hostile_rows(tokens, WIDTH[size], dtype)
    slots = torch.randperm(pages * page_size)[:tokens]
    cache, _ = new_cache(size, pages, page_size, gap=44)
    before = cache.clone()
    write(size, rows, cache, slots, device, backend, **convention)
    options = {n: x for n, x in convention.items() if size != 584 or n != "power_of_two"}
    expected = formats.views(FORMATS[size].pack(rows[:, None], **options))
    written = torch.zeros(pages * page_size, dtype=torch.bool)
    written[slots] = True
    for part, source, old in zip(formats.views(cache), expected, formats.views(before), strict=True):
        part, source, old = (token_bytes(x) for x in (part, source, old))
        assert same_bytes(part[slots], source)
        assert torch.equal(part[~written], old[~written])


@pytest.mark.parametrize("size", [656, 584, 132])
@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_rotated_bytes_are_those_of_the_packers(backend, device, size, pairing):
    """Rotations and a Hadamard matrix that fp32 computes exactly, in whatever order."""
    tokens, d = 9, WIDTH[size]
    rows = torch.randint(-40, 41, (tokens, d)).to(torch.bfloat16)
    columns = 24 if size == 132 else 32
    cos, sin = rotation(tokens, columns, exact=True)
    x = rows.float()[:, None]
    if size == 132:
        expected = hadamard_transform(apply_rope(x, cos, sin, pairing))
    else:
        expected = torch.cat([x[..., :-64], apply_rope(x[..., -64:], cos, sin, pairing)], -1)
    cache, _ = new_cache(size, 1, tokens)
    options = {"hadamard": True} if size == 132 else {}
    slots = torch.arange(tokens, dtype=torch.int32)
    write(size, rows, cache, slots, device, backend, cos=cos, sin=sin, pairing=pairing, **options)
    packed = FORMATS[size].pack(expected)
    for part, source in zip(formats.views(cache), formats.views(packed), strict=True):
        assert torch.equal(token_bytes(part), token_bytes(source))


def assert_quantised(actual, expected):
    """At most half a step of e4m3 apart: 1/16 of the value, or half the smallest step of the block."""
    step = expected.abs() / 16 + expected.abs().amax(-1, keepdim=True) * 2.0**-16
    wrong = (actual.double() - expected).abs() > 1.01 * step
    assert not wrong.any(), f"{int(wrong.sum())} values, first at {wrong.nonzero()[0].tolist()}"


@pytest.mark.parametrize("size", [656, 584])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_latents_are_normalised_and_rotated(backend, device, size, dtype, pairing):
    tokens, d = 7, WIDTH[size]
    rows = (torch.randn(tokens, d) * torch.logspace(-2, 2, tokens)[:, None]).to(dtype)
    weight = (torch.rand(512) + 0.5).to(dtype)
    cos, sin = rotation(tokens, 32)
    cache, _ = new_cache(size, 1, tokens)
    options = {"norm_weight": weight, "eps": 1e-5, "cos": cos, "sin": sin, "pairing": pairing}
    write(size, rows, cache, torch.arange(tokens), device, backend, **options)
    x = rows.double()
    x = torch.cat([F.rms_norm(x[:, :512], (512,), weight.double(), 1e-5), x[:, 512:]], 1)
    turned = apply_rope(x[:, None, -64:], cos.double(), sin.double(), pairing)[:, 0]
    values = formats.dequantise(*formats.views(cache), dtype=torch.float64)[0]
    torch.testing.assert_close(values[:, -64:], turned, rtol=2.0**-8, atol=1e-5)  # bf16
    blocks = 128 if size == 656 else 64
    assert_quantised(*(y[:, :-64].unflatten(1, (-1, blocks)) for y in (values, x)))


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_index_keys_and_queries_keep_their_scores(backend, device, dtype, pairing):
    """Keys and queries against fp64; the Hadamard matrix changes no score."""
    tokens, heads, d = 6, 11, 128
    k, q = torch.randn(tokens, d).to(dtype), torch.randn(tokens, heads, d).to(dtype)
    weights, norm, bias = torch.randn(tokens, heads), torch.rand(d) + 0.5, torch.randn(d)
    cos, sin = rotation(tokens, 32)
    cache, _ = new_cache(132, 2, 4)
    turn = {"cos": cos, "sin": sin, "pairing": pairing}
    options = {"norm_weight": norm, "norm_bias": bias, "hadamard": True, **turn}
    write(132, k, cache, torch.arange(tokens), device, backend, **options)
    turn.update(cos=cos.to(device), sin=sin.to(device))
    codes, folded = quantised_q(q, weights, device, backend, **turn)
    assert codes.dtype == torch.float8_e4m3fn and codes.shape == q.shape
    assert folded.dtype == torch.float32 and folded.shape == weights.shape

    cos, sin = cos.double(), sin.double()
    exact_k = F.layer_norm(k.double(), (d,), norm.double(), bias.double(), 1e-6)
    exact_k = apply_rope(exact_k[:, None], cos, sin, pairing)[:, 0]
    exact_q = apply_rope(q.double(), cos, sin, pairing)
    stored = formats.unpack(cache, torch.float64).flatten(0, 1)[:tokens]
    assert_quantised(stored, hadamard_transform(exact_k))
    scale = (folded / weights)[..., None].double()
    assert_quantised(codes.double() * scale, hadamard_transform(exact_q))
    ranges = torch.zeros(tokens, dtype=torch.int32), torch.full((tokens,), tokens, dtype=torch.int32)
    logits = sparse_attn.index_logits(codes, cache, folded, *ranges)[:, :tokens]
    exact = sparse_attn.index_logits(exact_q, exact_k, weights.double(), *ranges)
    assert (logits - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("d", [16, 32, 128])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_query_bytes(backend, device, d, convention):
    q = hostile_rows(21, d, torch.bfloat16).view(3, 7, d)
    weights = torch.randn(3, 7)
    codes, folded = quantised_q(q, weights, device, backend, hadamard=False, **convention)
    scale = formats.fp8_scale(q.float().abs().amax(-1), **convention)
    expected = formats.to_e4m3(q.float() / scale[..., None])
    assert same_bytes(codes.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(folded.nan_to_num(9.0), (weights * scale).nan_to_num(9.0))


def test_every_rounding_to_e4m3(backend, device):
    """Every value, the midpoint of each two, and numbers just beside it, at a scale of one."""
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (values[1:] + values[:-1]) / 2
    beside = middles * (1 + 2.0**-20), middles * (1 - 2.0**-20)
    x = torch.cat([values, middles, *beside, torch.tensor([2.0**-30])])
    x = torch.cat([x, -x])
    rows = torch.zeros(-(-len(x) // 127), 1, 128)
    padded = F.pad(x, (0, rows.shape[0] * 127 - len(x))).view(-1, 1, 127)
    rows[..., 1:], rows[..., 0] = padded, 448.0
    ones = torch.ones(rows.shape[:2])
    codes, folded = quantised_q(rows, ones, device, backend, hadamard=False, power_of_two=False)
    assert (folded == 1).all()
    assert torch.equal(codes.view(torch.uint8), formats.to_e4m3(rows).view(torch.uint8))


@pytest.mark.parametrize("size", [656, 584, 132])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_slots_that_do_not_exist_are_skipped(backend, device, size, dtype):
    rows = torch.randn(6, WIDTH[size])
    slots = torch.tensor([-1, 12, 5, INT_MIN, INT_MAX, 0]).to(dtype)
    cache, buffer = new_cache(size, 3, 4, gap=44)
    expected, expected_buffer = new_cache(size, 3, 4, gap=44)
    write(size, rows, cache, slots, device, backend)
    write(size, rows[[2, 5]], expected, slots[[2, 5]], device, backend)
    assert torch.equal(buffer, expected_buffer)
    assert (buffer != 0xAB).any()
    for n in (0, 3):
        write(size, rows[:n], cache, torch.full((n,), -1), device, backend)
    assert torch.equal(buffer, expected_buffer)


@pytest.mark.parametrize("size", [656, 132])
def test_strided_rows_and_shapes_of_a_cache(backend, device, size):
    d = WIDTH[size]
    spread = torch.randn(5, d, 2)
    cos, sin = rotation(5, 32)
    weight = torch.randn(512 if size == 656 else d)
    options = {"cos": cos, "sin": sin, "pairing": "half", "norm_weight": weight}
    if size == 132:
        options["norm_bias"] = torch.randn(d)
    slots = torch.tensor([7, 0, 3, 4, 1])
    cache, _ = new_cache(size, 2, 4)
    write(size, spread[..., 0].contiguous(), cache, slots, device, backend, **options)
    again, _ = new_cache(size, 2, 4)
    options.update(cos=torch.stack([cos, sin], -1)[..., 0], sin=torch.stack([cos, sin], -1)[..., 1])
    write(size, spread[..., 0], again, slots.repeat_interleave(2)[::2], device, backend, **options)
    assert torch.equal(cache, again)
    if size == 656:
        for shape in ((2, 4, 1, 656), (8, 656)):
            again, _ = new_cache(size, 2, 4)
            write(size, spread[..., 0], again.view(shape), slots, device, backend, **options)
            assert torch.equal(cache, again)


def test_what_is_written_is_what_attention_reads(backend, device):
    rows = torch.randn(8, 576)
    cache, _ = new_cache(656, 2, 4)
    write(656, rows, cache, torch.randperm(8), device, backend)
    q, indices = torch.randn(1, 2, 576), torch.arange(8, dtype=torch.int32)[None]
    out = sparse_attn.sparse_mla(q, cache, indices)
    expected = sparse_attn.sparse_mla(q, rows, indices)
    assert (out - expected).norm() < 0.05 * expected.norm()


def test_queries_into_the_callers_buffers(backend, device):
    q, weights = torch.randn(3, 5, 64, device=device), torch.randn(3, 5, device=device)
    code_buffer = torch.zeros(3, 64, 5, dtype=torch.float8_e4m3fn, device=device).mT
    out = code_buffer, torch.zeros(5, 3, device=device).T
    result = sparse_attn.quantise_index_q(q, weights, out=out, backend=backend)
    assert result[0] is out[0] and result[1] is out[1]
    codes, folded = sparse_attn.quantise_index_q(q, weights, backend=backend)
    assert torch.equal(out[0].float(), codes.float()) and torch.equal(out[1], folded)
    empty = sparse_attn.quantise_index_q(q[:0], weights[:0], backend=backend)
    assert empty[0].shape == (0, 5, 64) and empty[1].shape == (0, 5)


KV, K, COS = (torch.zeros(3, width) for width in (576, 128, 32))
TURN, WIDE_TURN = {"cos": COS, "sin": COS}, {"cos": K[:, :65], "sin": K[:, :65], "pairing": "half"}
SLOTS = torch.zeros(3, dtype=torch.int64)
LATENTS, KEYS = (torch.zeros(2, 4, size, dtype=torch.uint8) for size in (656, 132))


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"kv": KV[:, 1:]}, ValueError, r"kv: expected shape \[tokens, 576\], got \[3, 575\]"),
        ({"kv": KV.double()}, TypeError, "kv: expected dtype bfloat16 or float16 or float32, got float64"),
        ({"cache": LATENTS[..., :528]}, ValueError, "cache: expected 656 or 584 bytes per token .* 528"),
        ({"cache": LATENTS[..., :584]}, ValueError, r"kv: expected shape \[tokens, 512\], got \[3, 576\]"),
        ({"cache": LATENTS.char()}, TypeError, "cache: expected dtype uint8, got int8"),
        ({"cache": None}, TypeError, "cache: expected a tensor .* got NoneType"),
        ({"slots": SLOTS[1:]}, ValueError, r"slots: expected shape \[tokens=3\], got \[2\]"),
        ({"slots": SLOTS.short()}, TypeError, "slots: expected dtype int32 or int64, got int16"),
        ({"norm_weight": torch.ones(576)}, ValueError, r"norm_weight: expected shape \[512\], got \[576\]"),
        ({"cos": COS}, ValueError, "cos and sin: expected both or neither"),
        (TURN, ValueError, "pairing: expected 'half' or 'interleaved' with cos, got None"),
        ({"cos": COS[:, 1:], "sin": COS}, ValueError, r"cos: expected shape \[tokens=3, 32\], got \[3, 31\]"),
        ({"min_scale": 0.0}, ValueError, "min_scale: expected a positive number, got 0.0"),
        (
            {"kv": KV[:, :512], "cache": torch.zeros(2, 4, 584, dtype=torch.uint8), "power_of_two": False},
            *(ValueError, "power_of_two: expected True, as cache has 584 bytes per token"),
        ),
        ({"backend": "triton"}, ValueError, "backend: 'triton' needs cuda tensors"),
    ],
)
def test_wrong_latents_are_refused(monkeypatch, change, error, words):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(error, match=words):
        sparse_attn.write_kv(**{"kv": KV, "cache": LATENTS, "slots": SLOTS, **change})


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"k": K[:, 1:]}, ValueError, r"k: expected shape \[tokens, 128\], got \[3, 127\]"),
        ({"cache": KEYS[0]}, ValueError, r"cache: expected shape \[pages, page_size, 132\], got \[4, 132\]"),
        ({"cache": KEYS[:, ::2]}, ValueError, "cache: expected pages of adjoining bytes"),
        ({"norm_weight": torch.ones(128)}, ValueError, "norm_weight and norm_bias: expected both or neither"),
        (WIDE_TURN, ValueError, "cos: expected at most 64 columns, got 65"),
    ],
)
def test_wrong_index_keys_are_refused(change, error, words):
    with pytest.raises(error, match=words):
        sparse_attn.write_index_k(**{"k": K, "cache": KEYS, "slots": SLOTS, **change})


def test_wrong_index_queries_are_refused():
    q, weights = torch.zeros(2, 3, 48), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="q: expected a power of two from 16 on as index_head_dim, got 48"):
        sparse_attn.quantise_index_q(q, weights)
    with pytest.raises(TypeError, match="weights: expected dtype float32, got bfloat16"):
        sparse_attn.quantise_index_q(q[..., :32], weights.bfloat16())
    with pytest.raises(TypeError, match="out: expected the pair"):
        sparse_attn.quantise_index_q(q[..., :32], weights, out=q)
