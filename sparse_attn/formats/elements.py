"""What the formats are made of: stored types, blocks of values under a scale, and their place in memory."""

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

FP8_MAX = 448.0  # largest finite e4m3 value
FP4_MAX = 6.0  # largest e2m1 value
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the low three bits of a code; bit 3 is the sign

# A block of zeros still needs a scale. DeepSeek's model code and DeepGEMM raise the largest magnitude of
# a block to 1e-4 before they divide it; FlashMLA raises the quotient.
FP8_MIN_SCALE, FP4_MIN_SCALE = 1e-4 / FP8_MAX, 1e-4 / FP4_MAX
FLASH_MLA_MIN_SCALE = 1e-4


class Format(NamedTuple):
    """One byte layout.

    Attributes:
        name: what callers say where the bytes per token have several meanings.
        bytes: per token, the last dimension of a cache.
        width: values per token: d_qk, or index_head_dim.
        alignment: what the address of each page and token must be a multiple of, in bytes.
        views: the parts of a cache, the arguments of :func:`dequantise`.
        pack: values ``[..., width]`` to a new cache; its keywords choose other scales than the usual ones.
        by_page: whether the scales of a page lie together behind its values.
        page_multiple: by page: what other libraries want the distance of pages to be a multiple of, in bytes.
            ``pack`` makes it so; it is read at any distance.
    """

    name: str
    bytes: int
    width: int
    alignment: int
    views: Callable[[Tensor], tuple[Tensor, ...]]
    pack: Callable[..., Tensor]
    by_page: bool = False
    page_multiple: int = 1

    def page_bytes(self, page_size: int) -> int:
        """From one page of a new cache to the next: its bytes, up to a multiple of ``page_multiple``."""
        return -(-page_size * self.bytes // self.page_multiple) * self.page_multiple

    def check(self, packed: Tensor) -> None:
        """Raise ValueError unless ``packed`` is a cache of this format whose bytes can be viewed."""
        rank_fits = packed.dim() == 3 or not self.by_page
        if packed.dtype != torch.uint8 or packed.shape[-1:] != (self.bytes,) or not rank_fits:
            raise ValueError(
                f"packed: expected uint8 {self._shape(self.bytes)}, "
                f"got {str(packed.dtype).removeprefix('torch.')} {list(packed.shape)}"
            )
        self.check_in_place("packed", packed)

    def quantised(self, argument: str, x: Tensor, *, power_of_two: bool = True, min_scale: float) -> Tensor:
        """``x`` ``[..., width]``, the ``argument`` of a packer, as a new cache of this format.

        What no value needs, behind the scales of a token and between pages, is zero.
        """
        if x.shape[-1:] != (self.width,) or (self.by_page and x.dim() != 3):
            raise ValueError(f"{argument}: expected shape {self._shape(self.width)}, got {list(x.shape)}")
        if self.by_page:
            n, page_size, _ = x.shape
            buffer = torch.zeros(n, self.page_bytes(page_size), dtype=torch.uint8, device=x.device)
            packed = buffer[:, : page_size * self.bytes].unflatten(-1, (page_size, self.bytes))
        else:
            packed = torch.empty(*x.shape[:-1], self.bytes, dtype=torch.uint8, device=x.device)
        quantise(x, *self.views(packed), power_of_two=power_of_two, min_scale=min_scale)
        return packed

    def _shape(self, last: int) -> str:
        return f"[pages, page_size, {last}]" if self.by_page else f"[..., {last}]"

    def check_in_place(self, name: str, cache: Tensor) -> None:
        """Raise ValueError unless the bytes of ``cache`` lie where the format expects them.

        Pages may lie any distance apart; so may tokens, unless the format is by page.
        """
        *outer, last = cache.stride()
        offset = 0 if torch.compiler.is_compiling() else cache.storage_offset()  # the offset cannot be traced
        apart = last != 1 or (self.by_page and cache.shape[-2] > 1 and outer[-1] != self.bytes)
        if apart or any(step % self.alignment for step in (offset, *outer)):
            whole = "pages" if self.by_page else "tokens"
            raise ValueError(
                f"{name}: expected {whole} of adjoining bytes, at multiples of {self.alignment} bytes, to be "
                f"read in place; got strides {tuple(cache.stride())} from offset {offset}"
            )


def format_of(
    argument: str,
    cache: Tensor,
    formats: Mapping[Any, Format],
    name: str | None = None,
    *,
    named_by: str = "format",
) -> Format:
    """Which of ``formats`` a cache has: that of its bytes per token, or of those the one called ``name``.

    ``cache`` and ``name`` came as the arguments ``argument`` and ``named_by``.
    """
    size = cache.shape[-1] if cache.dim() else None
    fitting = [fmt for fmt in formats.values() if fmt.bytes == size]
    if not fitting:
        sizes = _either(dict.fromkeys(str(fmt.bytes) for fmt in formats.values()))
        raise ValueError(
            f"{argument}: expected {sizes} bytes per token (uint8) as the last dimension, "
            f"got shape {list(cache.shape)}"
        )
    meant = fitting if name is None else [fmt for fmt in fitting if fmt.name == name]
    if len(meant) != 1:
        names = _either(repr(fmt.name) for fmt in fitting)
        raise ValueError(
            f"{named_by}: expected {names}, as {argument} has {size} bytes per token, got {name!r}"
        )
    return meant[0]


def _either(choices: Iterable[str]) -> str:
    *others, last = choices
    return f"{', '.join(others)} or {last}" if others else last


def split_pages(pages: Tensor, value_bytes: int, scale_bytes: int) -> tuple[Tensor, Tensor]:
    """The values of a cache by page, ``value_bytes`` per token, and the scales that lie behind them."""
    n, page_size, size = pages.shape
    page, behind = pages.view(n, page_size * size), page_size * value_bytes
    values, scales = page.narrow(1, 0, behind), page.narrow(1, behind, page_size * scale_bytes)
    return values.view(n, page_size, value_bytes), scales.view(n, page_size, scale_bytes)


def fp8_scale(amax: Tensor, power_of_two: bool = True, min_scale: float = FP8_MIN_SCALE) -> Tensor:
    """The fp32 scale of e4m3 blocks whose largest magnitudes are ``amax``: ``max(amax / 448, min_scale)``.

    With ``power_of_two`` (ue8m0) it is rounded up to one, as DeepSeek's inference code does. A block that
    holds NaN or an infinity has the scale NaN.
    """
    return _block_scale(amax.float(), FP8_MAX, power_of_two, min_scale)


def quantise(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    rope: Tensor | None = None,
    *,
    power_of_two: bool = True,
    min_scale: float,
) -> None:
    """Write ``x`` ``[..., width]`` into the parts of a cache, whose dtypes say how; its end goes to ``rope``.

    Each of the ``b`` scales ``[..., b]`` (or ``[...]``: one) serves the same number of neighbouring values.
    """
    if rope is not None:
        x, x_rope = x.split([x.shape[-1] - rope.shape[-1], rope.shape[-1]], -1)
        rope.copy_(x_rope)
    scales = scales if scales.dim() == x.dim() else scales[..., None]
    blocks = _blocks(x.float(), scales.shape[-1])
    fp8 = values.dtype == torch.float8_e4m3fn
    scale = _block_scale(blocks.abs().amax(-1), FP8_MAX if fp8 else FP4_MAX, power_of_two, min_scale)
    if scales.dtype == torch.uint8:
        scales.copy_(to_ue8m0(scale))
    else:
        scales.copy_(to_e4m3(scale) if scales.dtype == torch.float8_e4m3fn else scale)
        scale = scales.float()  # values are divided by what is stored
    scaled = (blocks / scale[..., None]).flatten(-2)
    values.copy_(to_e4m3(scaled) if fp8 else to_e2m1(scaled))


def dequantise(
    values: Tensor, scales: Tensor | None, rope: Tensor | None = None, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``[..., width]`` in ``dtype`` from the parts of a cache: values times their scales, then ``rope``.

    Without scales the values mean themselves. Products are made in fp32 (fp64 for fp64), where all but
    those with an arbitrary fp32 scale are exact, and rounded to ``dtype`` once.
    """
    if scales is None:
        return values.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    scales = scales if scales.dim() == values.dim() else scales[..., None]
    scales = from_ue8m0(scales) if scales.dtype == torch.uint8 else scales
    values = from_e2m1(values) if values.dtype == torch.uint8 else values
    blocks = _blocks(values.to(wide), scales.shape[-1]) * scales.to(wide)[..., None]
    latent = blocks.flatten(-2).to(dtype)
    return latent if rope is None else torch.cat([latent, rope.to(dtype)], -1)


def to_ue8m0(x: Tensor) -> Tensor:
    """The bytes of the least powers of two that are not below positive fp32 ``x``, from 2 ** -126 on."""
    bits = x.view(torch.int32)  # from the bits: a logarithm would round powers of two and their neighbours
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    return exponent.clamp(max=255).to(torch.uint8)


def from_ue8m0(exponent: Tensor) -> Tensor:
    """fp32 ``2 ** (byte - 127)`` of uint8 bytes; 255 is NaN."""
    bits = exponent.int() << 23
    ends = (exponent == 0) | (exponent == 255)  # a subnormal number, and NaN instead of infinity
    return torch.where(ends, bits | 1 << 22, bits).view(torch.float32)


def to_e4m3(x: Tensor) -> Tensor:
    """Rounded to the nearest e4m3, ties to even, saturating; NaN stays NaN."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def to_e2m1(x: Tensor) -> Tensor:
    """``[..., n]`` floats to ``[..., n / 2]`` bytes: the nearest e2m1, ties to even, saturating."""
    code = torch.signbit(x).to(torch.uint8) << 3
    magnitude = x.abs()
    for below, (low, high) in enumerate(pairwise(E2M1)):
        middle = (low + high) / 2
        code += magnitude > middle if below % 2 == 0 else magnitude >= middle
    return code[..., ::2] | code[..., 1::2] << 4


def from_e2m1(packed: Tensor) -> Tensor:
    """``[..., n / 2]`` bytes to ``[..., n]`` fp32."""
    value = torch.tensor([*E2M1, *(-x for x in E2M1)], dtype=torch.float32, device=packed.device)
    pairs = torch.stack([value.repeat(16), value.repeat_interleave(16)], -1)  # [256, 2]: low, high nibble
    return pairs.index_select(0, packed.flatten().int()).view(*packed.shape[:-1], 2 * packed.shape[-1])


def _block_scale(amax: Tensor, largest: float, power_of_two: bool, min_scale: float) -> Tensor:
    if not min_scale > 0:
        raise ValueError(f"min_scale: expected a positive number, got {min_scale}")
    scale = (amax / largest).clamp(min=min_scale)
    scale = scale.masked_fill(scale.isinf(), float("nan"))
    return from_ue8m0(to_ue8m0(scale)) if power_of_two else scale


def _blocks(x: Tensor, blocks: int) -> Tensor:
    return x.unflatten(-1, (blocks, x.shape[-1] // blocks))
