"""Bytes of quantised values to fp32, exactly, and fp32 to bytes of e4m3."""

import triton
import triton.language as tl


@triton.jit
def from_e4m3(code, NATIVE_FP8: tl.constexpr):
    """fp32 of e4m3 bytes, NaN for the two codes that are NaN; NATIVE_FP8 is configs.has_native_fp8."""
    if NATIVE_FP8:
        return code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    # As fp32 the bits mean 2 ** -120 times as much, subnormals included.
    word = ((code.to(tl.int32) << 24) >> 4) & -0x78100000  # sign, 4 zeros, 7 bits
    x = word.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2 ** 120
    return tl.where(tl.abs(x) == 480.0, float("nan"), x)


@triton.jit
def from_ue8m0(exponent):
    """fp32 2 ** (exponent - 127) of bytes; 0 is a subnormal number, 255 is NaN."""
    bits = exponent.to(tl.uint32) << 23
    return tl.where((exponent == 0) | (exponent == 255), bits | (1 << 22), bits).to(tl.float32, bitcast=True)


@triton.jit
def from_e2m1(code):
    """[n, d] fp32 of e2m1 pairs [n, d / 2], the even one in the low nibble."""
    n: tl.constexpr = code.shape[0]
    d: tl.constexpr = 2 * code.shape[1]
    nibble = tl.join(code & 0xF, code >> 4).to(tl.uint32)  # [n, d / 2, 2]
    # As fp32 the bits mean 2 ** -126 times as much, the subnormal 0.5 included.
    x = ((nibble & 8) << 28 | (nibble & 7) << 22).to(tl.float32, bitcast=True) * 8.507059173023462e37
    return tl.reshape(x, [n, d])


@triton.jit
def scaled(value, scale):
    """fp32 values [n, d] times scales [n, groups], each for d / groups neighbours."""
    n: tl.constexpr = value.shape[0]
    d: tl.constexpr = value.shape[1]
    groups: tl.constexpr = scale.shape[1]
    return tl.reshape(tl.reshape(value, [n, groups, d // groups]) * scale[:, :, None], [n, d])


@triton.jit
def opaque(value):
    """The value itself, through a function that the compiler does not look into.

    Otherwise the compiler chooses the layout of tl.dot's operands for the bytes that they came from: more
    than twice the integer instructions, and a gather that the loop waits for instead of prefetching it.
    """
    return tl.map_elementwise(_same, value)


@triton.jit
def _same(x):
    return x


@triton.jit
def to_e4m3(x):
    """Bytes of the nearest e4m3 to fp32 x, ties to even, saturating; NaN stays NaN.

    Computed in integers: not every GPU has instructions for it, and all are to give the same bytes.
    """
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)  # 448, where NaN and infinities end too
    normal = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1) >> 20) - (120 << 3)
    # Below 2 ** -6, adding 2 ** 14 rounds to a multiple of 2 ** -9, which lands in the low bits.
    shifted = magnitude.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, subnormal, normal)
    code = tl.where(x == x, code, 0x7F)
    return (code | (bits >> 24) & 0x80).to(tl.uint8)


@triton.jit
def to_e2m1(x):
    """Codes of the nearest e2m1 to fp32 x, ties to even, saturating; NaN becomes 0."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    code = (magnitude > 0.25).to(tl.uint32) + (magnitude >= 0.75).to(tl.uint32)
    code += (magnitude > 1.25).to(tl.uint32) + (magnitude >= 1.75).to(tl.uint32)
    code += (magnitude > 2.5).to(tl.uint32) + (magnitude >= 3.5).to(tl.uint32)
    code += (magnitude > 5.0).to(tl.uint32)
    return (code | (bits >> 28) & 8).to(tl.uint8)


@triton.jit
def block_scale(x, largest, min_scale, POWER_OF_TWO: tl.constexpr):
    """Scales [n] of fp32 x [n, d]: max(amax / largest, min_scale), rounded up to a power of two on demand.

    A scale is NaN where a value is NaN or infinite.
    """
    # As integers, magnitudes have the same order, and NaN is above infinity.
    amax = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)  # [n]
    scale = tl.maximum(tl.div_rn(amax, largest), min_scale)
    if POWER_OF_TWO:
        bits = scale.to(tl.uint32, bitcast=True)
        scale = (((bits + 0x7FFFFF) >> 23) << 23).to(tl.float32, bitcast=True)
    return tl.where(amax < float("inf"), scale, float("nan"))  # of NaN too


@triton.jit
def quantise_e4m3(x, min_scale, POWER_OF_TWO: tl.constexpr):
    """Bytes of e4m3 [n, d] and scales [n] of fp32 x [n, d]."""
    scale = block_scale(x, 448.0, min_scale, POWER_OF_TWO)
    return to_e4m3(tl.div_rn(x, scale[:, None])), scale


@triton.jit
def quantise_e2m1(x, min_scale):
    """Pairs of e2m1 [n, d / 2], the even one in the low nibble, and e4m3 scales [n] of fp32 x [n, d]."""
    n: tl.constexpr = x.shape[0]
    d: tl.constexpr = x.shape[1]
    stored = to_e4m3(block_scale(x, 6.0, min_scale, False))
    code = to_e2m1(tl.div_rn(x, from_e4m3(stored, False)[:, None]))
    low, high = tl.split(tl.reshape(code, [n, d // 2, 2]))
    return low | high << 4, stored
