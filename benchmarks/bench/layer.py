"""Cases of a whole DeepSeek-V3.2-shaped layer: sparse against dense, decode and prefill."""

from functools import cache as once
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_attn import (
    DSACache,
    DSAConfig,
    SparseMLA,
    index_logits,
    lightning_topk,
    reference,
    select_topk,
    sparse_mla,
)
from sparse_attn.testing import assert_close, relative_error

from . import dense
from .attention import D_QK, D_V, attend, dense_mla, ranges, spread
from .case import Case, Cases, Functions, Sizes, decodes
from .limits import Work, attention_work, index_work, select_work
from .tensors import normal
from .timing import peak_memory

# Field of the record -> function whose median it holds.
FIELDS = {
    "sparse": "indexer + top-k + attend",
    "indexer": "indexer",
    "topk": "top-k",
    "attend": "attend",
    "dense_sdpa": "dense SDPA",
    "dense_gemm": "dense GEMM",
    "dense_own": "dense, own kernel",
    "layer": "layer",
}


def layer(sizes: Sizes, device: torch.device) -> Cases:
    """Indexer, top-k and attention, each alone and together, beside dense attention and the whole layer."""
    yield from decodes(sizes, "decode", partial(_decode, sizes, device))
    tokens, context = sizes.prefill
    yield context, f"prefill of {tokens}", partial(_prefill, sizes, device)


def _decode(sizes: Sizes, device: torch.device, batch: int, context: int) -> Case:
    module, cache = _layer(sizes, device), _filled_cache(sizes, device, batch, context)
    ke, _ = ranges(batch, context, device)
    q, functions, check = _sparse(module, cache, ke.long() - 1)
    tokens = normal(device, batch, module.config.hidden_size)
    boundaries = torch.arange(batch + 1, device=cache._lengths.device)

    def whole_layer() -> None:
        cache._lengths.fill_(context - 1)  # as if a prefill had written what is there
        module(tokens, cache=cache, cu_seqlens_q=boundaries)

    functions |= {"layer": whole_layer, **dense_mla(q, cache["kv"], module.config.softmax_scale)}
    return Case(functions, check, _work(sizes, 1, context) * batch)


def _prefill(sizes: Sizes, device: torch.device) -> Case:
    """The dense forms are per-head, unabsorbed attention, timed on some of the heads and scaled up."""
    (tokens, context), heads = sizes.prefill, min(sizes.dense_heads, sizes.heads)
    module, cache = _layer(sizes, device), _filled_cache(sizes, device, 1, context)
    scale = module.config.softmax_scale
    _, functions, check_parts = _sparse(module, cache, torch.arange(context - tokens, context, device=device))

    def check() -> dict[str, Any]:
        held = peak_memory(functions[FIELDS["sparse"]]) if device.type == "cpu" else None
        return {**check_parts(), "tokens": tokens, "peak_of_a_call": held}

    q, k = (normal(device, heads, n, 192) for n in (tokens, context))
    v = normal(device, heads, context, 128)
    wide = F.pad(v, (0, 64))  # flash attention needs k and v of one width
    peers: Functions = {"dense SDPA": lambda: dense.sdpa_causal(q, k, wide, scale)}
    if device.type == "cpu":
        peers["dense GEMM"] = lambda: dense.mha_causal(q, k, v, scale)
    work, shares = _work(sizes, tokens, context), dict.fromkeys(peers, heads / sizes.heads)
    return Case(functions | peers, check, work, shares=shares)


@once
def _layer(sizes: Sizes, device: torch.device) -> SparseMLA:
    hidden_size, q_lora_rank = sizes.hidden
    config = DSAConfig.deepseek_v32(
        hidden_size=hidden_size,
        q_lora_rank=q_lora_rank,
        num_attention_heads=sizes.heads,
        index_n_heads=sizes.index_heads,
        index_topk=sizes.topk,
    )
    return SparseMLA(config, dtype=torch.bfloat16, device=device)


def _filled_cache(sizes: Sizes, device: torch.device, batch: int, context: int) -> DSACache:
    """Random latents and index keys in place of a prefill of the whole context."""
    config, dtype = _layer(sizes, device).config, torch.bfloat16
    on_gpu = device.type == "cuda"  # whose clock captures a step
    cache = DSACache(config, context, batch, dtype=dtype, device=device, capturable=on_gpu)
    for name in ("kv", "index_k"):
        cache[name].normal_()
    return cache


def _sparse(module: SparseMLA, cache: DSACache, positions: Tensor) -> tuple[Tensor, Functions, Any]:
    """Queries at ``positions`` (of one sequence, or one per sequence), the functions on them, their check."""
    config, device = module.config, cache.device
    hidden = normal(device, len(positions), config.hidden_size)
    q, _, q_lora = module._project(hidden, positions)
    index_q, weights = module.indexer.queries(hidden, q_lora, positions)
    kv, keys, topk = cache["kv"].flatten(0, 1), cache["index_k"], config.index_topk
    # All index keys of a sequence are one page, as the layer itself reads them.
    table = torch.arange(cache.batch_size, dtype=torch.int32, device=device)[:, None]
    ke = (positions + 1).int()
    bounds = ke * 0, ke

    def score() -> Tensor:
        return index_logits(index_q, keys, weights, *bounds, block_table=table)

    def select() -> Tensor:
        return to_rows(lightning_topk(index_q, keys, weights, topk, *bounds, block_table=table))

    def to_rows(selected: Tensor) -> Tensor:
        return torch.where(selected < 0, -1, selected + cache.max_tokens * table)

    logits, indices = score(), select()
    attentions, check_attention = attend(q, kv, indices, config.softmax_scale)

    def check() -> dict[str, Any]:
        expected = to_rows(reference.select_topk(logits, topk, *bounds))
        assert torch.equal(indices, expected), "the selection differs from the reference's"
        error = 0.0
        for t in spread(len(q)):
            one = slice(t, t + 1)
            own = keys[t if cache.batch_size > 1 else 0]
            scored = (x.double() for x in (index_q[one], own, weights[one]))
            exact = reference.index_logits(*scored, *(x[one] for x in bounds))
            assert_close(logits[one], exact)
            error = max(error, relative_error(logits[one], exact))
        return {"errors": {"logits": error, **check_attention()["errors"]}}

    functions = {
        FIELDS["sparse"]: lambda: sparse_mla(q, kv, select(), softmax_scale=config.softmax_scale),
        "indexer": score,
        "top-k": lambda: select_topk(logits, topk, *bounds),
        **attentions,
    }
    return q, functions, check


def _work(sizes: Sizes, tokens: int, context: int) -> Work:
    topk = min(sizes.topk, context)
    attending = attention_work(tokens, topk, sizes.heads, D_QK, D_V, 2 * D_QK)
    return (
        index_work(tokens, context, sizes.index_heads, 128) + select_work(tokens, context, topk) + attending
    )


def fields(line: dict[str, Any]) -> dict[str, Any]:
    """A measured line with the medians in fields of their own, for README's table and the plots."""
    found = {f: line["seconds"][name]["median"] for f, name in FIELDS.items() if name in line["seconds"]}
    if "layer" in found and "sparse" in found:
        found["projections"] = found["layer"] - found["sparse"]
    if "peak_of_a_call" in line:
        found["peak_bytes"] = line["peak_of_a_call"]
    return {**line, **found}


def words(lines: list[dict[str, Any]]) -> list[str]:
    """Sentences on what the layer's table does not show, from lines with :func:`fields`."""
    said = ["Dense prefill is per-head attention. The projections are the same on both sides."]
    for line in lines:
        if "projections" in line:
            share = line["projections"] / line["layer"]
            said.append(f"{line['data']} at {line['context']:,}: {share:.0%} of the layer is projections.")
        if line["peak_bytes"]:
            said.append(f"{line['data']}: {line['peak_bytes'] / 2**20:.0f} MiB of extra memory.")
        if "errors" in line:
            errors = ", ".join(f"{name} {error:.2e}" for name, error in line["errors"].items())
            said.append(f"{line['data']} at {line['context']:,}: relative errors against fp64: {errors}.")
    return said
