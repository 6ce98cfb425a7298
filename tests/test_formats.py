"""Byte layouts: each byte where the format says, the right value for each code, views that copy nothing."""

import math
import struct
from itertools import pairwise

import pytest
import torch

from sparse_attn import formats
from sparse_attn.formats import unpack
from sparse_attn.testing import relative_error

NAN, INF = float("nan"), float("inf")
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# name: bytes per token, how to pack them, how many values, how many of them quantised, in groups of what
FORMATS = {
    "v32": (656, formats.pack_v32_kv, 576, 512, 128),
    "v4": (584, formats.pack_v4_kv, 512, 448, 64),
    "v41": (528, formats.pack_v41_kv, 512, 512, 32),
    "v41_by_page": (528, formats.pack_v41_by_page_kv, 512, 512, 32),
    "nope": (528, formats.pack_nope_kv, 512, 512, 128),
    "v41_fp4": (288, formats.pack_v41_fp4_kv, 512, 512, 16),
    "v41_fp4_by_page": (288, formats.pack_v41_fp4_by_page_kv, 512, 512, 16),
    "fp8_index": (132, formats.pack_index_k, 128, 128, 128),
    "mxfp4_index": (68, formats.pack_mxfp4_index_k, 128, 128, 32),
    "mxfp4_index_64": (36, formats.pack_mxfp4_index_k, 64, 64, 32),
}
PARAMETERS = "name, size, pack, width, quantised, group"
CASES = [pytest.param(name, *rest, id=name) for name, rest in FORMATS.items()]
E4M3_SCALES = ("v41_fp4", "v41_fp4_by_page")  # not powers of two
FP4_VALUES = (*E4M3_SCALES, "mxfp4_index", "mxfp4_index_64")
TOLERANCE = {name: 0.15 if name in FP4_VALUES else 0.04 for name in FORMATS}


def raw(packed):
    return bytes(packed.flatten().tolist())


# An independent reading of the bytes, in plain Python, one token at a time.


def e4m3(code):
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return NAN
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def e2m1(code):
    return (-1.0 if code & 8 else 1.0) * FP4[code & 7]


def ue8m0(byte):
    return NAN if byte == 255 else 2.0 ** (byte - 127)


def bf16(data):
    return [struct.unpack("<f", b"\0\0" + data[i : i + 2])[0] for i in range(0, len(data), 2)]


def nibbles(data):
    return [e2m1(code) for byte in data for code in (byte & 15, byte >> 4)]


def scaled(values, scales):
    group = len(values) // len(scales)
    return [value * scales[i // group] for i, value in enumerate(values)]


def read_token(name, page, page_size, t):
    """Token t of a page given as bytes, as a list of numbers."""

    def token(size):
        return page[size * t : size * (t + 1)]

    def behind(values, scales):
        """Where a page has ``values`` bytes per token and then ``scales`` bytes per token."""
        return token(values), page[values * page_size + scales * t :][:scales]

    if name in ("v32", "nope"):
        data = token(656 if name == "v32" else 528)
        return scaled([*map(e4m3, data[:512])], struct.unpack("<4f", data[512:528])) + bf16(data[528:])
    if name == "v4":
        data, scales = behind(576, 8)
        return scaled([*map(e4m3, data[:448])], [*map(ue8m0, scales[:7])]) + bf16(data[448:])
    if name in ("v41", "v41_by_page"):
        data, scales = (token(528)[:512], token(528)[512:]) if name == "v41" else behind(512, 16)
        return scaled([*map(e4m3, data)], [*map(ue8m0, scales)])
    if name in E4M3_SCALES:
        data, scales = (token(288)[:256], token(288)[256:]) if name == "v41_fp4" else behind(256, 32)
        return scaled(nibbles(data), [*map(e4m3, scales)])
    if name == "fp8_index":
        data, scale = behind(128, 4)
        return scaled([*map(e4m3, data)], struct.unpack("<f", scale))
    half = 64 if name == "mxfp4_index" else 32  # bytes of e2m1; a scale per 16 of them
    data, scales = behind(half, 4)
    return scaled(nibbles(data), [*map(ue8m0, scales[: half // 16])])


@pytest.mark.parametrize(PARAMETERS, CASES)
@pytest.mark.parametrize("page_size", [1, 3, 64])
def test_any_bytes_mean_what_an_independent_reading_says(
    name, size, pack, width, quantised, group, page_size
):
    pages = torch.randint(0, 256, (2, page_size, size), dtype=torch.uint8)
    unpacked = unpack(pages, torch.float64, name)
    assert unpacked.shape == (2, page_size, width)
    again = formats.dequantise(*formats.views(pages, name), dtype=torch.float64)
    assert torch.equal(again.nan_to_num(), unpacked.nan_to_num())
    for page in range(2):
        for t in {0, page_size // 2, page_size - 1}:
            expected = torch.tensor(read_token(name, raw(pages[page]), page_size, t), dtype=torch.float64)
            torch.testing.assert_close(unpacked[page, t], expected, rtol=0, atol=0, equal_nan=True)


def test_bytes_of_a_v32_token_by_hand():
    kv = torch.zeros(1, 576)
    kv[0, 0], kv[0, 130], kv[0, 511], kv[0, 512], kv[0, 575] = 2.0, -448.0, 900.0, 1.5, -3.0
    packed = formats.pack_v32_kv(kv)
    token = raw(packed)
    tiny = 2.0**-22  # 1e-4 / 448, rounded up
    assert struct.unpack("<4f", token[512:528]) == (2.0**-7, 1.0, tiny, 4.0)
    assert token[0] == 0x78  # 2 / 2 ** -7 = 256 = 2 ** 8: exponent 15, mantissa 0
    assert token[130] == 0xFE  # -448, the largest magnitude
    assert token[511] == 0x76  # 900 / 4 = 225, rounded to 224 = 1.75 * 2 ** 7
    assert struct.unpack("<2H", token[528:530] + token[654:656]) == (0x3FC0, 0xC040)  # bf16 of 1.5 and -3
    unpacked = unpack(packed)
    assert unpacked[0, [0, 130, 511, 512, 575]].tolist() == [2.0, -448.0, 896.0, 1.5, -3.0]


def test_bytes_of_a_v4_page_by_hand():
    kv = torch.zeros(2, 3, 512)
    kv[1, 2, 0], kv[1, 2, 64], kv[1, 2, 447], kv[1, 2, 448], kv[1, 2, 511] = 2.0, -448.0, 900.0, 1.5, -3.0
    pages = formats.pack_v4_kv(kv)
    assert formats.v4_page_bytes(3) == 2304 and pages.stride() == (2304, 584, 1)  # 4 x 576 >= 3 x 584 = 1752
    buffer = raw(pages.as_strided((2, 2304), (2304, 1)))
    token, scales = buffer[2304 + 2 * 576 : 2304 + 3 * 576], buffer[2304 + 3 * 576 + 16 : 2304 + 3 * 576 + 24]
    assert (token[0], token[64], token[447]) == (0x78, 0xFE, 0x76)
    assert struct.unpack("<2H", token[448:450] + token[574:576]) == (0x3FC0, 0xC040)
    assert list(scales) == [120, 127, 105, 105, 105, 105, 129, 0]  # 2 ** (byte - 127), and the pad
    assert sum(byte != 0 for byte in token) == 7  # 5 values; the two of bf16 take two bytes each
    assert all(set(buffer[start + 1752 : start + 2304]) == {0} for start in (0, 2304))  # the gap
    assert list(buffer[3 * 576 : 1752]) == 3 * [*[105] * 7, 0]


@pytest.mark.parametrize("page_size, stride", [(1, 1152), (2, 1728), (64, 37440), (72, 42048), (0, 0)])
def test_v4_pages_start_at_multiples_of_576(page_size, stride):
    assert formats.v4_page_bytes(page_size) == stride
    pages = formats.pack_v4_kv(torch.randn(3, page_size, 512))
    assert pages.shape == (3, page_size, 584)
    assert pages.stride(0) == stride or page_size == 0


@pytest.mark.parametrize("page_size, multiples", [(1, (1024, 512)), (2, (1536, 768)), (64, (33792, 18432))])
def test_other_pages_start_at_the_multiples_that_flashmla_reads(page_size, multiples):
    for name, stride in zip(("v41_by_page", "v41_fp4_by_page"), multiples, strict=True):
        fmt = formats.KV_FORMATS[name]
        pages = fmt.pack(torch.randn(3, page_size, 512))
        assert pages.shape == (3, page_size, fmt.bytes) and pages.stride(0) == stride
        gap = pages.as_strided((3, stride), (stride, 1))[:, page_size * fmt.bytes :]
        assert (gap == 0).all()


def test_bytes_of_v41_tokens_by_hand():
    kv = torch.zeros(512)
    kv[0], kv[32], kv[95], kv[511] = 2.0, -448.0, 900.0, -0.0
    scales = [120, 127, 129, *[105] * 13]
    token = raw(formats.pack_v41_kv(kv))
    assert (token[0], token[32], token[95], token[511]) == (0x78, 0xFE, 0x76, 0x80)
    assert list(token[512:]) == scales
    page = raw(formats.pack_v41_by_page_kv(torch.stack([torch.zeros(512), kv, torch.zeros(512)])[None]))
    assert page[512:1024] == token[:512] and not any(page[:512]) and not any(page[1024:1536])
    assert list(page[1536:]) == [*[105] * 16, *scales, *[105] * 16]


def test_bytes_of_a_nope_token_by_hand():
    kv = torch.zeros(512)
    kv[0], kv[130], kv[511] = 2.0, -448.0, 900.0
    token = raw(formats.pack_nope_kv(kv))
    assert (token[0], token[130], token[511]) == (0x78, 0xFE, 0x76)
    assert struct.unpack("<4f", token[512:]) == (2.0**-7, 1.0, 2.0**-22, 4.0)


def test_bytes_of_a_v41_fp4_token_by_hand():
    kv = torch.zeros(512)
    kv[:9] = torch.tensor([6.0, -0.5, 1.5, -6.0, 0.25, 0.75, 2.5, 3.5, -0.0])  # scale 1; four are ties
    kv[16] = 1.0  # 1 / 6 is nearest to 0.171875
    kv[32] = 6.3  # 1.05 is rounded down to 1: 6.3 saturates
    kv[48] = -1e4  # 1e4 / 6 saturates at 448
    token = raw(formats.pack_v41_fp4_kv(kv))
    assert list(token[:5]) == [0x97, 0xF3, 0x20, 0x64, 0x08]
    assert token[8] == 0x07 and token[16] == 0x07 and token[24] == 0x0F
    assert list(token[256:]) == [0x38, 0x23, 0x38, 0x7E, *[0x01] * 28]  # zeros: 2 ** -9
    page = raw(formats.pack_v41_fp4_by_page_kv(torch.stack([torch.zeros(512), kv, torch.zeros(512)])[None]))
    assert page[256:512] == token[:256] and not any(page[:256]) and not any(page[512:768])
    assert page[768:] == bytes([1] * 32) + token[256:] + bytes([1] * 32)
    unpacked = unpack(formats.pack_v41_fp4_kv(kv), format="v41_fp4")
    assert unpacked[:9].tolist() == [6.0, -0.5, 1.5, -6.0, 0.0, 1.0, 2.0, 4.0, 0.0]
    assert unpacked[[16, 32, 48]].tolist() == [1.03125, 6.0, -2688.0]


def test_index_keys_of_a_page_lie_before_its_scales():
    k = torch.randn(3, 4, 128)
    packed = formats.pack_index_k(k, power_of_two=False)
    for page in range(3):
        scales = struct.unpack("<4f", raw(packed[page])[512:528])
        for token in range(4):
            amax = k[page, token].abs().max().item()
            assert scales[token] == pytest.approx(amax / 448, rel=1e-6)
            values = read_token("fp8_index", raw(packed[page]), 4, token)
            assert values == unpack(packed, torch.float64)[page, token].tolist()
            assert max(map(abs, values)) == pytest.approx(amax, rel=1e-6)


def test_bytes_of_a_page_of_mxfp4_index_keys_by_hand():
    k = torch.zeros(2, 3, 128)
    k[1, 1, :4] = torch.tensor([6.0, -0.5, 2.5, -3.5])
    k[1, 1, 32], k[1, 1, 127] = 6.01, -3.0
    page = raw(formats.pack_mxfp4_index_k(k)[1])
    key = page[64:128]
    assert list(key[:2]) == [0x97, 0xE4]  # 2.5 is a tie and goes to 2, -3.5 to -4
    assert key[16] == 0x05 and key[63] == 0xF0  # 6.01 / 2 = 3; -3 / 0.5 = -6
    assert sum(byte != 0 for byte in page[:192]) == 4
    zero = 112  # 2 ** -15 is 1e-4 / 6, rounded up
    assert list(page[192:]) == [*[zero] * 4, 127, 128, zero, 126, *[zero] * 4]
    assert struct.unpack("<3i", page[192:])[1] == 126 << 24 | zero << 16 | 128 << 8 | 127


def test_bytes_of_mxfp4_index_keys_of_64_values_by_hand():
    k = torch.zeros(1, 2, 64)
    k[0, 1, :2], k[0, 1, 32], k[0, 1, 63] = torch.tensor([6.0, -0.5]), 6.01, -3.0
    page = raw(formats.pack_mxfp4_index_k(k)[0])
    key = page[32:64]
    assert key[0] == 0x97 and key[16] == 0x05 and key[31] == 0xB0  # 6.01 / 2 = 3; -3 / 2 = -1.5
    assert sum(byte != 0 for byte in page[:64]) == 3
    assert list(page[64:]) == [112, 112, 0, 0, 127, 128, 0, 0]  # two scales in an int32, and the pad


FIRST_SCALES = [("v32", 512), ("nope", 512), ("fp8_index", 128)]  # fp32


@pytest.mark.parametrize("name, first", [*FIRST_SCALES, ("v4", 576), ("v41", 512), ("v41_by_page", 512)])
def test_both_conventions_of_the_smallest_fp8_scale(name, first):
    """DeepSeek raises amax to 1e-4, FlashMLA amax / 448 to 1e-4; blocks of amax 0, 1e-3 and 1."""
    (_, pack, width, *_), expected = FORMATS[name], {}
    for amax in (0.0, 1e-3, 1.0):
        for min_scale in (formats.FP8_MIN_SCALE, formats.FLASH_MLA_MIN_SCALE):
            packed = raw(pack(torch.full((1, 1, width), amax), min_scale=min_scale))
            fp32 = (name, first) in FIRST_SCALES
            scale = struct.unpack("<f", packed[first : first + 4])[0] if fp32 else ue8m0(packed[first])
            expected[amax, min_scale] = scale
    assert [math.log2(scale) for scale in expected.values()] == [-22, -13, -18, -13, -8, -8]


@pytest.mark.parametrize("name, first", FIRST_SCALES)
def test_arbitrary_scales_are_the_quotient_in_fp32(name, first):
    _, pack, width, *_ = FORMATS[name]
    for amax, min_scale, expected in [
        (0.7, formats.FP8_MIN_SCALE, torch.tensor(0.7) / 448),
        (0.0, formats.FP8_MIN_SCALE, torch.tensor(1e-4) / 448),
        (1e-3, formats.FLASH_MLA_MIN_SCALE, torch.tensor(1e-4)),
    ]:
        packed = raw(pack(torch.full((1, 1, width), amax), power_of_two=False, min_scale=min_scale))
        assert packed[first : first + 4] == struct.pack("<f", expected.item())


def test_the_smallest_scale_of_mxfp4_keys():
    zeros = torch.zeros(1, 1, 128)
    assert raw(formats.pack_mxfp4_index_k(zeros))[64:] == bytes([112] * 4)
    assert raw(formats.pack_mxfp4_index_k(zeros, min_scale=2.0**-126))[64:] == bytes([1] * 4)
    with pytest.raises(ValueError, match="min_scale: expected a positive number, got 0"):
        formats.pack_mxfp4_index_k(zeros, min_scale=0)


def test_scales_are_rounded_up_to_powers_of_two_exactly():
    powers = torch.arange(1, 255, dtype=torch.uint8)
    exact = formats.from_ue8m0(powers)
    assert exact.tolist() == [2.0 ** (int(byte) - 127) for byte in powers]
    assert torch.equal(formats.to_ue8m0(exact), powers)
    assert torch.equal(formats.to_ue8m0(exact.nextafter(torch.tensor(INF))), powers + 1)
    assert torch.equal(formats.to_ue8m0(exact.nextafter(torch.tensor(0.0)))[1:], powers[1:])
    ends = formats.from_ue8m0(torch.tensor([0, 255], dtype=torch.uint8))
    assert ends[0] == 2.0**-127 and ends[1].isnan()
    assert formats.to_ue8m0(torch.tensor([INF, NAN, 2.0**-140])).tolist() == [255, 255, 1]
    just_above = torch.tensor([448.0]).nextafter(torch.tensor(INF)) * 2.0**-10
    assert formats.fp8_scale(just_above).item() == 2.0**-9  # a logarithm in fp32 would say 2 ** -10


def test_fp4_is_rounded_to_the_nearest_with_ties_to_even():
    codes = torch.arange(256, dtype=torch.uint8)
    assert formats.from_e2m1(codes[:, None]).tolist() == [[e2m1(c & 15), e2m1(c >> 4)] for c in range(256)]
    assert torch.equal(formats.to_e2m1(formats.from_e2m1(codes[:, None]))[:, 0], codes)
    edges = torch.tensor([*FP4, *((a + b) / 2 for a, b in pairwise(FP4)), 5.5, 7.0, INF])
    near = torch.cat([edges, edges.nextafter(torch.tensor(INF)), edges.nextafter(torch.tensor(0.0))])
    near = torch.cat([near, -near, torch.randn(101).abs() * 3, torch.zeros(1)])

    def nearest(x):
        return min(range(8), key=lambda code: (abs(min(abs(x), 6.0) - FP4[code]), code & 1))

    expected = [nearest(x) | (8 if math.copysign(1, x) < 0 else 0) for x in near.tolist()]
    packed = formats.to_e2m1(near)
    assert torch.stack([packed & 15, packed >> 4], -1).flatten().tolist() == expected


@pytest.mark.parametrize(PARAMETERS, CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_packing_rounds_to_the_nearest_under_the_scale(name, size, pack, width, quantised, group, dtype):
    """An independent packer: scales by logarithm, values by search among all that the type holds."""
    x = (torch.randn(2, 3, width) * torch.logspace(-2, 2, 6).view(2, 3, 1)).to(dtype)
    grid = map(e2m1, range(16)) if name in FP4_VALUES else map(e4m3, range(256))
    grid = torch.tensor(sorted(value for value in grid if value == value), dtype=torch.float64)
    blocks = x[..., :quantised].float().double().unflatten(-1, (-1, group))
    scale = blocks.abs().amax(-1, keepdim=True) / grid.max()
    if name in E4M3_SCALES:
        scale = scale.float().clamp(2.0**-9, 448).to(torch.float8_e4m3fn).double()
    else:
        scale = 2 ** scale.log2().ceil()
    normal = (blocks / scale).clamp(-grid.max(), grid.max())
    least = (normal[..., None] - grid).abs().amin(-1)
    unpacked = unpack(pack(x), torch.float64, name)
    error = (unpacked[..., :quantised].unflatten(-1, (-1, group)) / scale - normal).abs()
    torch.testing.assert_close(error, least, rtol=0, atol=1e-6)
    assert torch.equal(unpacked[..., quantised:], x[..., quantised:].bfloat16().double())  # RoPE


@pytest.mark.parametrize(PARAMETERS, CASES)
def test_what_was_rounded_once_is_kept(name, size, pack, width, quantised, group):
    x = torch.randn(5, 7, width) * 30
    once = unpack(pack(x), format=name)
    assert 1e-3 < relative_error(once, x) < TOLERANCE[name]
    if name not in E4M3_SCALES:
        assert torch.equal(unpack(pack(once), format=name), once)
    assert torch.equal(unpack(pack(x), torch.bfloat16, name), once.bfloat16())


@pytest.mark.parametrize("name", ["v32", "nope", "fp8_index"])
def test_arbitrary_scales_reach_the_largest_value(name):
    _, pack, width, *_ = FORMATS[name]
    x = torch.randn(5, 7, width)
    once = unpack(pack(x, power_of_two=False), format=name)
    assert 1e-3 < relative_error(once, x) < TOLERANCE[name]
    largest = once[..., :128].abs().amax(-1), x[..., :128].abs().amax(-1)
    torch.testing.assert_close(*largest, rtol=1e-6, atol=0)


@pytest.mark.parametrize(PARAMETERS, CASES)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_nan_and_infinity_show_in_their_block_alone(name, size, pack, width, quantised, group, bad):
    x = torch.randn(1, 2, width)
    x[0, 1, 3] = bad
    unpacked = unpack(pack(x), format=name)
    assert unpacked[0, 1, :group].isnan().all()
    assert unpacked[0, 1, group:].isfinite().all() and unpacked[0, 0].isfinite().all()


def gapped(size, pages=3, page_size=4, gap=64):
    """A cache of zeros whose pages are wider than needed, somewhere inside a larger buffer."""
    stride = page_size * size + gap
    buffer = torch.full((16 + pages * stride,), 0xFF, dtype=torch.uint8)
    return buffer.as_strided((pages, page_size, size), (stride, size, 1), 16).zero_()


@pytest.mark.parametrize(PARAMETERS, CASES)
def test_views_write_into_strided_pages_and_nowhere_else(name, size, pack, width, quantised, group):
    packed = pack(torch.randn(3, 4, width))
    cache = gapped(size)
    for part, source in zip(formats.views(cache, name), formats.views(packed, name), strict=True):
        assert part.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr()
        part.copy_(source)
    assert torch.equal(cache, packed)
    assert torch.equal(unpack(cache, format=name), unpack(packed, format=name))
    assert (cache.as_strided((16,), (1,), 0) == 0xFF).all()
    assert (cache.as_strided((3, 64), (4 * size + 64, 1), 16 + 4 * size) == 0xFF).all()


@pytest.mark.parametrize("name", ["v32", "v41", "nope", "v41_fp4"])
def test_formats_by_token_take_any_leading_shape(name):
    def unpack(packed):
        return formats.unpack(packed, format=name)

    size, pack, width, *_ = FORMATS[name]
    x = torch.randn(2, 3, 1, width)
    assert torch.equal(unpack(pack(x))[1, 2, 0], unpack(pack(x[1, 2, 0])))
    wide = torch.zeros(5, size + 4, dtype=torch.uint8)  # tokens apart
    wide[:, :size] = pack(torch.randn(5, width))
    assert torch.equal(unpack(wide[:, :size]), unpack(wide[:, :size].clone()))


def test_names_and_bytes_of_every_format():
    assert formats.FORMATS == formats.KV_FORMATS | formats.INDEX_K_FORMATS
    assert {name: fmt.bytes for name, fmt in formats.FORMATS.items()} == {n: x[0] for n, x in FORMATS.items()}
    for name, fmt in formats.FORMATS.items():
        assert (name, fmt.pack) == (fmt.name, FORMATS[name][1])


def test_formats_of_the_same_bytes_read_them_differently():
    """Garbage, were the wrong one taken: what a name is for."""
    for name, fmt in formats.KV_FORMATS.items():
        x = torch.randn(2, 8, fmt.width)
        for other, same_bytes in formats.KV_FORMATS.items():
            if same_bytes.bytes == fmt.bytes:
                error = relative_error(unpack(fmt.pack(x), format=other).nan_to_num(), x)
                assert error < 0.15 if other == name else error > 0.5


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.uint8)


@pytest.mark.parametrize(
    "function, argument, words",
    [
        ("v32_kv_views", zeros(2, 3, 655), r"packed: expected uint8 \[..., 656\], got uint8 \[2, 3, 655\]"),
        ("v41_kv_views", torch.zeros(2, 528), r"expected uint8 \[..., 528\], got float32 \[2, 528\]"),
        ("v4_kv_views", zeros(2, 584), r"uint8 \[pages, page_size, 584\], got uint8 \[2, 584\]"),
        ("v4_kv_views", zeros(2, 6, 584)[:, ::2], r"pages of adjoining bytes.*strides \(3504, 1168, 1\)"),
        ("mxfp4_index_k_views", zeros(2, 3, 72)[..., :68], "pages of adjoining bytes"),
        ("index_k_views", zeros(2, 132, 3).mT, "pages of adjoining bytes"),
        ("v32_kv_views", zeros(3, 657)[:, :656], "tokens of adjoining bytes, at multiples of 4"),
        ("v32_kv_views", zeros(657)[1:], "at multiples of 4 bytes.*from offset 1"),
        ("views", zeros(2, 3, 100), "cache: expected 656, 584, 528, 288, 132, 68 or 36 bytes per token"),
        ("unpack", zeros(2, 3, 100), "packed: expected 656, 584, 528, 288, 132, 68 or 36 bytes per token"),
        (
            "unpack",
            zeros(2, 3, 528),
            "^format: expected 'v41', 'v41_by_page' or 'nope', as packed has 528 bytes",
        ),
        ("views", zeros(2, 3, 288), "^format: expected 'v41_fp4' or 'v41_fp4_by_page', as cache .* got None"),
        ("v41_by_page_kv_views", zeros(2, 528), r"uint8 \[pages, page_size, 528\], got uint8 \[2, 528\]"),
        ("v41_fp4_by_page_kv_views", zeros(2, 6, 288)[:, ::2], "pages of adjoining bytes"),
        ("nope_kv_views", zeros(529)[1:], "at multiples of 4 bytes.*from offset 1"),
        ("pack_nope_kv", torch.zeros(2, 576), r"kv: expected shape \[..., 512\], got \[2, 576\]"),
        ("pack_v41_by_page_kv", torch.zeros(2, 512), r"kv: expected shape \[pages, page_size, 512\]"),
        ("pack_v32_kv", torch.zeros(2, 512), r"kv: expected shape \[..., 576\], got \[2, 512\]"),
        ("pack_v4_kv", torch.zeros(2, 512), r"kv: expected shape \[pages, page_size, 512\], got \[2, 512\]"),
        ("pack_index_k", torch.zeros(2, 3, 64), r"k: expected shape \[pages, page_size, 128\]"),
    ],
)
def test_wrong_arguments_are_named(function, argument, words):
    with pytest.raises(ValueError, match=words):
        getattr(formats, function)(argument)


@pytest.mark.parametrize(
    "size, name, words",
    [
        (656, "v41", "format: expected 'v32', as packed has 656 bytes per token, got 'v41'"),
        (528, "v32", "format: expected 'v41', 'v41_by_page' or 'nope', as packed has 528 .* got 'v32'"),
        (288, "V41_FP4", "format: expected 'v41_fp4' or 'v41_fp4_by_page', .* got 'V41_FP4'"),
        (132, 132, "format: expected 'fp8_index', as packed has 132 bytes per token, got 132"),
        (100, "v41", "packed: expected 656, 584, 528, 288, 132, 68 or 36 bytes per token"),
    ],
)
def test_wrong_names_of_formats(size, name, words):
    with pytest.raises(ValueError, match=words):
        unpack(zeros(2, 3, size), format=name)
