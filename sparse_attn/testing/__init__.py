"""Inputs, adversarial cases and comparisons for testing implementations of the public functions.

The inputs are hostile by default: rows that are not selected hold NaN, index rows contain invalid
entries of every kind, tensors may be non-contiguous. Comparisons take the fp64 reference as truth.

:mod:`sparse_attn.testing.conformance` tests modules that have FlashMLA's or DeepGEMM's functions.
:mod:`sparse_attn.testing.self_check` has one small check per op of this library.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import reference
from ..formats import dequantise
from ..reference import compute_dtype

INF, NAN = float("inf"), float("nan")
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
# Relative error of the arithmetic, which counts where rounding the output makes little or none.
ARITHMETIC_ERROR = {torch.float64: 1e-13, torch.float32: 2e-6}
# Hopper's tensor cores add the products of two e4m3 operands with 13 to 14 bits (docs/maths.md).
E4M3_PRODUCT_ERROR = 5e-5


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over norm of ``expected``, in fp64, over the finite entries."""
    expected = expected.double()
    finite = expected.isfinite()
    difference = (actual.double() - expected)[finite].norm()
    return (difference / expected[finite].norm().clamp(min=1e-30)).item()


def assert_close(
    actual: Tensor,
    expected: Tensor,
    factor: float = 1.2,
    terms: Tensor | None = None,
    arithmetic: float | None = None,
) -> None:
    """Same shape, same NaN and infinities, and an error of at most ``factor`` roundings to actual's dtype.

    The budget is ``factor`` times the error of rounding ``expected`` (fp64) to ``actual``'s dtype, plus
    the arithmetic error, by default that of the dtype of the computation. The latter is relative to
    ``expected``, or, where terms of a sum may cancel, to ``terms``: the sums of their magnitudes.
    """
    assert actual.shape == expected.shape, f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    expected = expected.double()
    for name, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = test(actual) != test(expected)
        assert not wrong.any(), (
            f"{name} differs in {int(wrong.sum())} places, first at {wrong.nonzero()[0].tolist()}"
        )
    rounding = relative_error(expected.to(actual.dtype), expected)
    if arithmetic is None:
        arithmetic = ARITHMETIC_ERROR[compute_dtype(actual.dtype)]
    arithmetic *= _amplification(terms, expected)
    budget = factor * rounding + arithmetic
    error = relative_error(actual, expected)
    assert error <= budget, f"relative error {error:.3g} exceeds the budget {budget:.3g} ({actual.dtype})"


def _amplification(terms: Tensor | None, expected: Tensor) -> float:
    finite = expected.isfinite()
    if terms is None or not finite.any():
        return 1.0
    return (terms[finite].norm() / expected[finite].norm().clamp(min=1e-30)).item()


def assert_logits_close(
    actual: Tensor,
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    ks: Tensor,
    ke: Tensor,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    block_table: Tensor | None = None,
) -> None:
    """``actual`` is :func:`sparse_attn.index_logits` of the rest, by :func:`assert_close`.

    Quantised operands come as the op takes them: values, and scales in fp32 or bytes of ue8m0. A GPU's
    product of two e4m3 operands gets a budget of its own.
    """
    both_e4m3 = q.dtype == k.dtype == torch.float8_e4m3fn
    arithmetic = E4M3_PRODUCT_ERROR if both_e4m3 and actual.is_cuda else None
    q, k = (
        dequantise(x.cpu(), None if scale is None else scale.cpu(), dtype=torch.float64)
        for x, scale in ((q, q_scale), (k, k_scale))
    )
    weights, ks, ke = weights.cpu().double(), ks.cpu(), ke.cpu()
    table = None if block_table is None else block_table.cpu()
    expected = reference.index_logits(q, k, weights, ks, ke, block_table=table)
    terms = reference.index_logits(q.abs(), k.abs(), weights.abs(), ks, ke, block_table=table)
    assert_close(actual.cpu(), expected, terms=terms, arithmetic=arithmetic)


def index_inputs(
    s_q: int,
    s_kv: int,
    heads: int = 4,
    d: int = 32,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Arguments of :func:`sparse_attn.index_logits`: ranges of every kind, NaN in keys nobody sees."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(s_q, heads, d, generator=g, dtype=torch.float64)
    k = torch.randn(s_kv, d, generator=g, dtype=torch.float64)
    weights = torch.randn(s_q, heads, generator=g, dtype=torch.float64)
    ks = torch.randint(-3, s_kv // 2 + 1, (s_q,), generator=g)
    ke = torch.randint(0, s_kv + 4, (s_q,), generator=g)  # some reversed, some beyond the keys
    position = torch.arange(s_kv)
    seen = ((position >= ks[:, None]) & (position < ke[:, None])).any(0)
    k[~seen] = float("nan")
    return {
        "q": q.to(device, dtype),
        "k": k.to(device, dtype),
        "weights": weights.to(device, compute_dtype(dtype)),
        "ks": ks.int().to(device),
        "ke": ke.int().to(device),
    }


def to_pages(k: Tensor, page_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Scatter keys ``[s_kv, ...]`` over shuffled pages; unused slots hold NaN, unused entries garbage.

    Returns:
        The paged cache ``[pages, page_size, ...]`` and its block table ``[1, max_pages]`` int32.
    """
    g = torch.Generator().manual_seed(seed)
    used = -(-k.shape[0] // page_size)
    pages = used + 3
    cache = torch.full((pages, page_size, *k.shape[1:]), float("nan"), dtype=k.dtype, device=k.device)
    table = torch.randperm(pages, generator=g)[:used].to(k.device)
    padded = torch.full((used * page_size, *k.shape[1:]), float("nan"), dtype=k.dtype, device=k.device)
    padded[: k.shape[0]] = k
    cache[table] = padded.unflatten(0, (used, page_size))
    garbage = torch.tensor([INT_MIN, -1, pages, INT_MAX], device=k.device)
    return cache, torch.cat([table, garbage])[None].int()


def selection_indices(
    s_q: int, s_kv: int, topk: int, *, device: torch.device | str = "cpu", seed: int = 0
) -> Tensor:
    """``[s_q, topk]`` int32 with valid, repeated and invalid entries; the last row has no valid one."""
    g = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, max(s_kv // 2, 1), (s_q, topk), generator=g)  # the other half stays unused
    invalid = torch.tensor([-1, INT_MIN, s_kv, s_kv + 1, INT_MAX])
    noise = invalid[torch.randint(0, len(invalid), (s_q, topk), generator=g)]
    indices = torch.where(torch.rand(s_q, topk, generator=g) < 0.25, noise, indices)
    if s_q:
        indices[-1] = noise[-1]
    return indices.int().to(device)


def poison_unused(cache: Tensor, *indices: Tensor) -> Tensor:
    """A copy of ``cache`` ``[s_kv, ...]`` whose rows that no index names hold NaN."""
    used = torch.zeros(cache.shape[0], dtype=torch.bool, device=cache.device)
    for index in indices:
        valid = index[(index >= 0) & (index < cache.shape[0])]
        used[valid.long()] = True
    poisoned = cache.clone()
    poisoned[~used] = float("nan")
    return poisoned


def mla_inputs(
    s_q: int,
    s_kv: int,
    h_q: int = 4,
    topk: int = 16,
    d_qk: int = 40,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Tensor]:
    """q, kv and indices of :func:`sparse_attn.sparse_mla`, NaN in every row that is not selected."""
    g = torch.Generator().manual_seed(seed)
    indices = selection_indices(s_q, s_kv, topk, device=device, seed=seed)
    kv = torch.randn(s_kv, d_qk, generator=g, dtype=torch.float64).to(device, dtype)
    return {
        "q": torch.randn(s_q, h_q, d_qk, generator=g, dtype=torch.float64).to(device, dtype),
        "kv": poison_unused(kv, indices),
        "indices": indices,
    }


def gqa_inputs(
    s_q: int,
    s_kv: int,
    h_q: int = 4,
    h_kv: int = 2,
    topk: int = 16,
    d: int = 32,
    d_v: int = 32,
    *,
    per_head: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Tensor]:
    """q, k, v and indices of :func:`sparse_attn.sparse_gqa`, NaN in every row that is not selected."""
    g = torch.Generator().manual_seed(seed)
    sets = h_kv if per_head else 1
    indices = selection_indices(s_q * sets, s_kv, topk, device=device, seed=seed)
    k = torch.randn(s_kv, h_kv, d, generator=g, dtype=torch.float64).to(device, dtype)
    v = torch.randn(s_kv, h_kv, d_v, generator=g, dtype=torch.float64).to(device, dtype)
    return {
        "q": torch.randn(s_q, h_q, d, generator=g, dtype=torch.float64).to(device, dtype),
        "k": poison_unused(k, indices),
        "v": poison_unused(v, indices),
        "indices": indices.view(s_q, h_kv, topk) if per_head else indices,
    }


def _every(value: float):
    return lambda noise, coin, g: torch.full_like(noise, value)


# What a kind makes of normal noise, uniform coins and the generator of both.
_LOGITS: dict[str, Callable[[Tensor, Tensor, torch.Generator], Tensor]] = {
    "gaussian": lambda noise, coin, g: noise,
    "zeros": _every(0.0),
    # what few index heads give: most scores exactly zero
    "relu_plateau": lambda noise, coin, g: torch.where(coin < 0.8, 0.0, noise.relu()),
    "signed_zeros": lambda noise, coin, g: torch.where(coin < 0.5, -0.0, 0.0),
    "constant": _every(-3.5),
    # neighbours in the last bits of the mantissa
    "one_bin": lambda noise, coin, g: (
        (torch.randint(0, 7, noise.shape, generator=g) + 0x3F800000).int().view(torch.float32)
    ),
    "few_values": lambda noise, coin, g: torch.randint(-2, 3, noise.shape, generator=g).float(),
    "ascending": lambda noise, coin, g: torch.arange(noise.shape[1]).float().expand_as(noise).clone(),
    "descending": lambda noise, coin, g: -torch.arange(noise.shape[1]).float().expand_as(noise),
    "nan_scattered": lambda noise, coin, g: torch.where(coin < 0.3, NAN, noise),
    "infinities": lambda noise, coin, g: torch.where(coin < 0.1, INF, torch.where(coin < 0.4, -INF, noise)),
    "all_minus_inf": _every(-INF),
    "all_nan": _every(NAN),
    # the k-th value occurs many times
    "boundary_ties": lambda noise, coin, g: torch.where(coin < 0.5, 1.0, noise),
}
ADVERSARIAL_LOGITS = tuple(_LOGITS)


def adversarial_logits(kind: str, s_q: int, s_kv: int, seed: int = 0) -> Tensor:
    """``[s_q, s_kv]`` fp32 rows of one of the :data:`ADVERSARIAL_LOGITS` kinds."""
    if kind not in _LOGITS:
        raise ValueError(f"kind: expected one of {', '.join(ADVERSARIAL_LOGITS)}, got {kind!r}")
    g = torch.Generator().manual_seed(seed)
    noise, coin = torch.randn(s_q, s_kv, generator=g), torch.rand(s_q, s_kv, generator=g)
    return _LOGITS[kind](noise, coin, g)
