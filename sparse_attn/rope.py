"""Rotations: position embedding in both pairings, with YaRN, and the Hadamard matrix before fp8."""

import functools
import math

import torch
from einops import rearrange
from torch import Tensor

from .config import DSAConfig, YaRN


def rope_cos_sin(positions: Tensor, dim: int, config: DSAConfig) -> tuple[Tensor, Tensor]:
    """cos and sin ``[tokens, dim / 2]`` in fp32 for integer ``positions`` ``[tokens]``."""
    frequencies = _frequencies(dim, config.rope_theta, config.rope_scaling, positions.device)
    angles = positions[:, None].float() * frequencies  # fp32 as in the models' own code
    scale = config.rope_scaling.rotation_scale if config.rope_scaling else 1.0
    return angles.cos() * scale, angles.sin() * scale


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, pairing: str) -> Tensor:
    """Rotate the leading ``2 * cos.shape[-1]`` dimensions of each head; the others pass through.

    Args:
        x: ``[tokens, heads, d]``.
        cos, sin: ``[tokens, dim / 2]`` from :func:`rope_cos_sin`.
        pairing: "interleaved" rotates dimensions (0, 1), (2, 3), ...; "half" rotates (0, dim / 2),
            (1, dim / 2 + 1), ...
    """
    dim = 2 * cos.shape[-1]
    rotated = x[..., :dim].to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = cos[:, None], sin[:, None]
    if pairing == "interleaved":
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    elif pairing == "half":
        first, second = rotated.chunk(2, dim=-1)
    else:
        raise ValueError(f"pairing: expected 'interleaved' or 'half', got {pairing!r}")
    parts = (first * cos - second * sin, first * sin + second * cos)
    rotated = torch.stack(parts, -1).flatten(-2) if pairing == "interleaved" else torch.cat(parts, -1)
    return torch.cat([rotated.to(x.dtype), x[..., dim:]], -1)


def hadamard_transform(x: Tensor) -> Tensor:
    """Multiply the last dimension, a power of two, by the orthonormal Sylvester-Hadamard matrix."""
    d = x.shape[-1]
    if d & (d - 1):
        raise ValueError(f"x: expected a power of two as last dimension, got {d}")
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    step = 1
    while step < d:
        y = rearrange(y, "... (n two step) -> ... n two step", two=2, step=step)
        first, second = y.unbind(-2)
        y = rearrange(torch.stack([first + second, first - second], -2), "... n two step -> ... (n two step)")
        step *= 2
    return (y * d**-0.5).to(x.dtype)


@functools.lru_cache(maxsize=32)  # by device too: a captured step cannot copy from the host
def _frequencies(dim: int, theta: float, yarn: YaRN | None, device: torch.device) -> Tensor:
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    if yarn is None:
        return frequencies.to(device)

    def correction_dim(rotations: float) -> float:
        """The dimension that makes this many rotations within the original context."""
        context = yarn.original_max_position_embeddings
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(correction_dim(yarn.beta_fast)), 0)
    high = min(math.ceil(correction_dim(yarn.beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / max(high - low, 0.001)
    interpolate = ramp.clamp(0, 1)  # 0: fast dimensions stay, 1: slow ones are stretched by factor
    return (frequencies * (1 - interpolate) + frequencies / yarn.factor * interpolate).to(device)
