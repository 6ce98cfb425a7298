"""write_kv, write_index_k and quantise_index_q: the bytes of the packers, in the right slots."""

import pytest
import torch
import torch.nn.functional as F

import sparse_attn
from sparse_attn import formats
from sparse_attn.formats.index_keys import INDEX_K
from sparse_attn.rope import apply_rope, hadamard_transform
from sparse_attn.testing import INT_MAX, INT_MIN

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
NAN, INF = float("nan"), float("inf")
FORMATS = {**formats.KV_FORMATS, "index_k": INDEX_K}
FREE_SCALES = ("v32", "nope", "index_k")  # need not be powers of two
CONVENTIONS = [
    {"power_of_two": power_of_two, **options}
    for options in ({}, {"min_scale": formats.FLASH_MLA_MIN_SCALE})
    for power_of_two in (True, False)
]
FORMS = [
    (name, options)
    for name in FORMATS
    for options in ([{}] if "fp4" in name else CONVENTIONS)
    if name in FREE_SCALES or options.get("power_of_two", True)
]
EVERY_FORMAT = pytest.mark.parametrize("name", list(FORMATS))
ROTATED = [name for name in FORMATS if name != "nope"]


def hostile_rows(tokens, width, dtype):
    """Rows of every magnitude, from far below the least scale; zeros, infinities and NaN."""
    rows = torch.randn(tokens, width) * torch.logspace(-9, 4, tokens)[:, None]
    rows[0] = 0
    rows[1, : width // 2] = -0.0
    rows[2, ::7] *= 1e-3
    rows[3, 5], rows[4, 9], rows[5, 3] = INF, -INF, NAN
    rows[6] = torch.finfo(torch.float32).max
    rows[7, ::3] = 1e-40 if dtype == torch.float32 else 6e-8  # subnormal but in bf16
    rows[8] = torch.randint(-12, 13, (width,)) / 4  # ties at every scale
    return rows.to(dtype)


def new_cache(name, pages, page_size, gap=0):
    """A cache of 0xAB, with ``gap`` bytes between its pages."""
    size = FORMATS[name].bytes
    stride = formats.v4_page_bytes(page_size) if name == "v4" else page_size * size
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


def write(name, rows, cache, slots, device, backend, **options):
    """Into a cache of that format, or of floats: "kv" or "k"."""
    function = sparse_attn.write_index_k if name in ("index_k", "k") else sparse_attn.write_kv
    if name in ("index_k", "k"):
        options = {"hadamard": False, **options}
    elif name != "kv":
        options["cache_format"] = name
    options = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    there = cache.to(device) if device != "cpu" else cache
    function(rows.to(device), there, slots.to(device), **options, backend=backend)
    if there is not cache:
        cache.copy_(there)


def quantised_q(q, weights, device, backend, **options):
    result = sparse_attn.quantise_index_q(q.to(device), weights.to(device), **options, backend=backend)
    return [x.cpu() for x in result]


@pytest.mark.parametrize("name, convention", FORMS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_bytes_are_those_of_the_packers(backend, device, name, dtype, convention):
    tokens, pages, page_size = 20, 5, 6
    fmt = FORMATS[name]
    rows = hostile_rows(tokens, fmt.width, dtype)
    slots = torch.randperm(pages * page_size)[:tokens]
    cache, buffer = new_cache(name, pages, page_size, gap=44)
    before, whole = cache.clone(), buffer.clone()
    write(name, rows, cache, slots, device, backend, **convention)
    options = {n: x for n, x in convention.items() if name in FREE_SCALES or n != "power_of_two"}
    expected = fmt.views(fmt.pack(rows[:, None], **options))
    written = torch.zeros(pages * page_size, dtype=torch.bool)
    written[slots] = True
    for part, source, old in zip(fmt.views(cache), expected, fmt.views(before), strict=True):
        part, source, old = (token_bytes(x) for x in (part, source, old))
        if part.shape[1] == 128:  # bf16, of which torch itself makes several NaN
            part, source = (x.view(torch.bfloat16).float().nan_to_num(7.0) for x in (part, source))
            old = old.view(torch.bfloat16).float().nan_to_num(7.0)
            assert torch.equal(part[slots], source)
        elif name != "v4" or part.shape[1] != 7:
            assert same_bytes(part[slots], source)
        else:
            assert torch.equal(part[slots], source)
        assert torch.equal(part[~written], old[~written])
    assert torch.equal(buffer[:, -44:], whole[:, -44:])


@pytest.mark.parametrize("name", ROTATED)
@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_rotated_bytes_are_those_of_the_packers(backend, device, name, pairing):
    """Rotations and a Hadamard matrix that fp32 computes exactly, in whatever order."""
    tokens, fmt = 9, FORMATS[name]
    rows = torch.randint(-40, 41, (tokens, fmt.width)).to(torch.bfloat16)
    cos, sin = rotation(tokens, 24 if name == "index_k" else 32, exact=True)
    x = rows.float()[:, None]
    if name == "index_k":
        expected = hadamard_transform(apply_rope(x, cos, sin, pairing))
    else:
        expected = torch.cat([x[..., :-64], apply_rope(x[..., -64:], cos, sin, pairing)], -1)
    cache, _ = new_cache(name, 1, tokens)
    options = {"hadamard": True} if name == "index_k" else {}
    slots = torch.arange(tokens, dtype=torch.int32)
    write(name, rows, cache, slots, device, backend, cos=cos, sin=sin, pairing=pairing, **options)
    for part, source in zip(fmt.views(cache), fmt.views(fmt.pack(expected)), strict=True):
        assert torch.equal(token_bytes(part), token_bytes(source))


def assert_quantised(actual, expected):
    """At most half a step of e4m3 apart: 1/16 of the value, or half the smallest step of the block."""
    step = expected.abs() / 16 + expected.abs().amax(-1, keepdim=True) * 2.0**-16
    wrong = (actual.double() - expected).abs() > 1.01 * step
    assert not wrong.any(), f"{int(wrong.sum())} values, first at {wrong.nonzero()[0].tolist()}"


def exact_latents(rows, weight, cos, sin, pairing):
    x = rows.double()
    x = torch.cat([F.rms_norm(x[:, :512], (512,), weight.double(), 1e-5), x[:, 512:]], 1)
    turned = apply_rope(x[:, None, -64:], cos.double(), sin.double(), pairing)[:, 0]
    return torch.cat([x[:, :-64], turned], 1)


@EVERY_FORMAT
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_latents_are_normalised_and_rotated(backend, device, name, dtype, pairing):
    if name == "index_k":
        return
    tokens, fmt = 7, FORMATS[name]
    rows = (torch.randn(tokens, fmt.width) * torch.logspace(-2, 2, tokens)[:, None]).to(dtype)
    weight = (torch.rand(512) + 0.5).to(dtype)
    cos, sin = rotation(tokens, 32)
    cache, _ = new_cache(name, 1, tokens)
    turn = {} if name == "nope" else {"cos": cos, "sin": sin, "pairing": pairing}
    write(name, rows, cache, torch.arange(tokens), device, backend, norm_weight=weight, eps=1e-5, **turn)
    if name == "nope":
        cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
    x = exact_latents(rows, weight, cos, sin, pairing)
    parts = fmt.views(cache)
    values = formats.dequantise(*parts, dtype=torch.float64)[0]
    if len(parts) == 3:
        torch.testing.assert_close(values[:, -64:], x[:, -64:], rtol=2.0**-8, atol=1e-5)  # bf16
        values, x = values[:, :-64], x[:, :-64]
    values, x = (y.unflatten(1, (parts[1].shape[2], -1)) for y in (values, x))
    if "fp4" not in name:
        return assert_quantised(values, x)
    # Half a step of e2m1 is at most 1/6 of the largest value, and saturation costs less.
    assert ((values - x).abs() <= 0.18 * x.abs().amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("width", [576, 512])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("stored", FLOATS)
def test_latents_in_caches_of_floats(backend, device, width, dtype, stored):
    """Each value is rounded once; layers interleaved in one allocation stay apart."""
    tokens, pages, page_size, layers = 7, 3, 4, 2
    rows, weight = torch.randn(tokens, width).to(dtype), torch.rand(512) + 0.5
    every = torch.full((pages, layers, page_size, width), 9.0, dtype=stored)
    slots = torch.tensor([5, -1, 0, 11, 12, 3, INT_MIN])
    for pairing in ("half", "interleaved"):
        cos, sin = rotation(tokens, 32)
        turn = {"cos": cos, "sin": sin, "pairing": pairing}
        write("kv", rows, every[:, 1], slots, device, backend, norm_weight=weight, eps=1e-5, **turn)
        assert (every[:, 0] == 9).all()
        flat, kept = every[:, 1].flatten(0, 1), [5, 0, 11, 3]
        exact = exact_latents(rows, weight, cos, sin, pairing)[[0, 2, 3, 5]]
        step = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 1e-6}[stored]
        torch.testing.assert_close(flat[kept].double(), exact, rtol=1.01 * step, atol=2e-6)
        others = torch.ones(pages * page_size, dtype=torch.bool)
        others[kept] = False
        assert (flat[others] == 9).all()
    plain, turned = torch.zeros(tokens, width, dtype=stored), torch.zeros(1, tokens, 1, width, dtype=stored)
    rows = torch.where(rows > 1, INF, rows)
    for cache in (plain, turned):
        write("kv", rows, cache, torch.arange(tokens, dtype=torch.int32), device, backend)
        assert torch.equal(cache.view(tokens, width), rows.to(stored))


@pytest.mark.parametrize("d, hadamard", [(128, True), (64, True), (128, False), (72, False), (34, False)])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("stored", FLOATS)
def test_index_keys_in_caches_of_floats(backend, device, d, hadamard, dtype, stored):
    tokens, pages, page_size = 6, 3, 4
    k, norm, bias = torch.randn(tokens, d).to(dtype), torch.rand(d) + 0.5, torch.randn(d).to(dtype)
    every = torch.full((pages, 2, page_size, d), 9.0, dtype=stored)
    slots = torch.tensor([5, -1, 0, 11, 12, 3], dtype=torch.int32)
    cos, sin = rotation(tokens, 16)
    for pairing in ("half", "interleaved"):
        options = {"norm_weight": norm, "norm_bias": bias, "hadamard": hadamard}
        turn = {"cos": cos, "sin": sin, "pairing": pairing}
        write("k", k, every[:, 1], slots, device, backend, **options, **turn)
        exact = F.layer_norm(k.double(), (d,), norm.double(), bias.double(), 1e-6)
        exact = apply_rope(exact[:, None], cos.double(), sin.double(), pairing)[:, 0]
        exact = hadamard_transform(exact) if hadamard else exact
        flat, kept = every[:, 1].flatten(0, 1), [5, 0, 11, 3]
        step = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 1e-6}[stored]
        torch.testing.assert_close(flat[kept].double(), exact[[0, 2, 3, 5]], rtol=1.01 * step, atol=2e-6)
        others = torch.ones(pages * page_size, dtype=torch.bool)
        others[kept] = False
        assert (flat[others] == 9).all() and (every[:, 0] == 9).all()


@pytest.mark.parametrize("name", list(FORMATS))
def test_many_tokens_on_several_threads(name):
    """More tokens than one thread takes at a time."""
    rows, before = torch.randn(150, FORMATS[name].width).bfloat16(), torch.get_num_threads()
    caches = [new_cache(name, 4, 40)[0] for _ in range(3)]
    for cache, threads in zip(caches, (1, 2, 5), strict=True):
        torch.set_num_threads(threads)
        write(name, rows, cache, torch.arange(150), "cpu", "cpu")
    torch.set_num_threads(before)
    assert torch.equal(caches[0], caches[1]) and torch.equal(caches[0], caches[2])
    written = formats.dequantise(*FORMATS[name].views(caches[0]))
    assert torch.allclose(written.flatten(0, 1)[:150], rows.float(), rtol=0.3, atol=0.5)


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_index_keys_and_queries_keep_their_scores(backend, device, dtype, pairing):
    """Keys and queries against fp64; the Hadamard matrix changes no score."""
    tokens, heads, d = 6, 11, 128
    k, q = torch.randn(tokens, d).to(dtype), torch.randn(tokens, heads, d).to(dtype)
    weights, norm, bias = torch.randn(tokens, heads), torch.rand(d) + 0.5, torch.randn(d)
    cos, sin = rotation(tokens, 32)
    cache, _ = new_cache("index_k", 2, 4)
    turn = {"cos": cos, "sin": sin, "pairing": pairing}
    options = {"norm_weight": norm, "norm_bias": bias, "hadamard": True, **turn}
    write("index_k", k, cache, torch.arange(tokens), device, backend, **options)
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


@EVERY_FORMAT
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_slots_that_do_not_exist_are_skipped(backend, device, name, dtype):
    rows = torch.randn(6, FORMATS[name].width)
    slots = torch.tensor([-1, 12, 5, INT_MIN, INT_MAX, 0]).to(dtype)
    cache, buffer = new_cache(name, 3, 4, gap=44)
    expected, expected_buffer = new_cache(name, 3, 4, gap=44)
    write(name, rows, cache, slots, device, backend)
    write(name, rows[[2, 5]], expected, slots[[2, 5]], device, backend)
    assert torch.equal(buffer, expected_buffer)
    assert (buffer != 0xAB).any()
    for n in (0, 3):
        write(name, rows[:n], cache, torch.full((n,), -1), device, backend)
    assert torch.equal(buffer, expected_buffer)


@pytest.mark.parametrize("name", ["v32", "index_k"])
def test_strided_rows_and_shapes_of_a_cache(backend, device, name):
    """Rows with gaps are torch's work on a CPU: only exact arithmetic gives the same bytes, so no norm."""
    spread = torch.randn(5, FORMATS[name].width, 2)
    cos, sin = rotation(5, 32, exact=True)
    options = {"cos": cos, "sin": sin, "pairing": "half"}
    slots = torch.tensor([7, 0, 3, 4, 1])
    cache, _ = new_cache(name, 2, 4)
    write(name, spread[..., 0].contiguous(), cache, slots, device, backend, **options)
    again, _ = new_cache(name, 2, 4)
    options.update(cos=torch.stack([cos, sin], -1)[..., 0], sin=torch.stack([cos, sin], -1)[..., 1])
    write(name, spread[..., 0], again, slots.repeat_interleave(2)[::2], device, backend, **options)
    assert torch.equal(cache, again)
    if name == "v32":
        for shape in ((2, 4, 1, 656), (8, 656)):
            again, _ = new_cache(name, 2, 4)
            write(name, spread[..., 0], again.view(shape), slots, device, backend, **options)
            assert torch.equal(cache, again)


def test_what_is_written_is_what_attention_reads(backend, device):
    rows = torch.randn(8, 576)
    cache, _ = new_cache("v32", 2, 4)
    write("v32", rows, cache, torch.randperm(8), device, backend)
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
PLAIN = torch.zeros(2, 4, 576)
NARROW = {"kv": KV[:, :512], "cache": torch.zeros(2, 4, 288, dtype=torch.uint8)}
LATENTS, KEYS = (torch.zeros(2, 4, size, dtype=torch.uint8) for size in (656, 132))


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"kv": KV[:, 1:]}, ValueError, r"kv: expected shape \[tokens, 576\], got \[3, 575\]"),
        ({"kv": KV.double()}, TypeError, "kv: expected dtype bfloat16 or float16 or float32, got float64"),
        (
            {"cache": LATENTS[..., :528]},
            ValueError,
            "cache_format: expected 'v41', 'v41_by_page' or 'nope', as cache has 528 bytes .* got None",
        ),
        (
            {"cache": LATENTS[..., :288], "cache_format": "v41"},
            ValueError,
            "cache_format: expected 'v41_fp4' or",
        ),
        ({"cache_format": "v4"}, ValueError, "cache_format: expected 'v32', as cache has 656 .* got 'v4'"),
        ({"cache": LATENTS[..., :583]}, ValueError, "cache: expected 656, 584, 528 or 288 bytes per token"),
        ({"cache": LATENTS[..., :584]}, ValueError, r"kv: expected shape \[tokens, 512\], got \[3, 576\]"),
        (
            {"cache": PLAIN.char()},
            *(TypeError, "cache: expected dtype uint8 or bfloat16 or float16 or float32, got int8"),
        ),
        ({"cache": PLAIN.double()}, TypeError, "cache: expected dtype .* got float64"),
        ({"cache": PLAIN[..., 1:]}, ValueError, "cache: expected 576 or 512 values per token"),
        ({"cache": PLAIN[0, 0]}, ValueError, r"cache: expected shape \[pages, page_size, 576\], got \[576\]"),
        (
            {"cache": PLAIN, "cache_format": "v32"},
            ValueError,
            "cache_format: expected None, as cache is float32",
        ),
        (
            {"cache": PLAIN, "min_scale": 1.0},
            ValueError,
            "min_scale: expected .*, as cache has float32, got 1.0",
        ),
        (
            {**NARROW, "cache_format": "v41_fp4", "power_of_two": False},
            *(ValueError, "power_of_two: expected True, as cache has 288 bytes per token, got False"),
        ),
        (
            {"kv": KV[:, :512], "cache": torch.zeros(2, 4, 528, dtype=torch.uint8), "cache_format": "nope"}
            | {**TURN, "pairing": "half"},
            *(ValueError, "cos: expected None, as the format 'nope' has no RoPE dimensions"),
        ),
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
        ({"cache": PLAIN}, ValueError, r"cache: expected shape .*index_head_dim=128\], got \[2, 4, 576\]"),
        ({"k": K[:, :96], "cache": PLAIN[..., :96]}, ValueError, "k: expected a power of two .* got 96"),
        (
            {"k": K[:, :9], "cache": PLAIN[..., :9], "hadamard": False},
            *(ValueError, "k: expected an even number as index_head_dim, got 9"),
        ),
        (
            {"cache": PLAIN[..., :128], "power_of_two": False},
            *(ValueError, "power_of_two: expected True, as cache has float32, got False"),
        ),
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
