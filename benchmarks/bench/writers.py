"""Cases of the writers: they put the new tokens of one layer into its caches."""

from functools import partial

import torch
from torch import Tensor

from sparse_attn import quantise_index_q, write_index_k, write_kv

from .case import Case, Cases, Sizes
from .limits import Work
from .tensors import normal
from .timing import eager

PAGE_SIZE = 64


def writers(sizes: Sizes, device: torch.device) -> Cases:
    """Norm, RoPE, Hadamard and fp8 in one pass, beside the same in torch."""
    tokens, _ = sizes.prefill
    yield tokens, "new tokens", partial(_writers, sizes.index_heads, tokens, device)


def _writers(heads: int, tokens: int, device: torch.device) -> Case:
    kv, k, q = (normal(device, tokens, *shape) for shape in ((576,), (128,), (heads, 128)))
    norm, weights = normal(device, 512), torch.randn(tokens, heads, device=device)
    angle = torch.randn(tokens, 32, device=device)
    turn = {"cos": angle.cos(), "sin": angle.sin()}
    slots = torch.randperm(tokens, device=device)
    n = -(-tokens // PAGE_SIZE)
    caches = [torch.zeros(n, PAGE_SIZE, size, dtype=torch.uint8, device=device) for size in (656, 132)]

    plain = torch.zeros(n, PAGE_SIZE, 576, dtype=torch.bfloat16, device=device)
    fp4 = torch.zeros(n, PAGE_SIZE, 288, dtype=torch.uint8, device=device)

    def latents(cache: Tensor, rows: Tensor, cache_format: str | None, backend: str = "auto") -> Tensor:
        options = {"norm_weight": norm, **turn, "pairing": "interleaved", "cache_format": cache_format}
        write_kv(rows, cache, slots, **options, backend=backend)
        return cache

    def keys(backend: str = "auto") -> Tensor:
        layer_norm = {"norm_weight": norm[:128], "norm_bias": norm[128:256]}
        write_index_k(k, caches[1], slots, **layer_norm, **turn, pairing="half", backend=backend)
        return caches[1]

    writes = {
        "write_kv": partial(latents, caches[0], kv, None),
        "write_kv, bf16": partial(latents, plain, kv, None),
        "write_kv, fp4": partial(latents, fp4, kv[:, :512], "v41_fp4"),
        "write_index_k": keys,
    }

    def check() -> None:
        for write in writes.values():  # another order of summation may round a few values to a neighbour
            ours, expected = write().clone(), write(backend="reference")
            assert (ours != expected).float().mean() < 1e-2, "the bytes differ from the reference's"

    functions = {
        **writes,
        "quantise_index_q": lambda: quantise_index_q(q, weights, **turn, pairing="half")[0],
        "write_kv, torch": eager(partial(writes["write_kv"], backend="reference")),
        "write_index_k, torch": eager(partial(keys, "reference")),
    }
    return Case(functions, check, Work(bytes=tokens * (2 * 576 + 656)))
