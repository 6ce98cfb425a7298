"""Mistakes in FlashMLA's functions."""

from collections.abc import Callable
from math import log
from typing import Any

import torch
from torch import Tensor

from ... import formats
from . import Arguments, Mistakes, after, before, drop, only_if, pages_in_order, refuse, variants

INF, NAN, LN_2 = float("inf"), float("nan"), log(2)

# FlashMLA's prefill: its results are (out, max_logits, lse)

PREFILL: Mistakes = {
    "prefill_attends_to_what_is_selected": {
        "lse in base 2": after(lambda a, r: (r[0], r[1], r[2] / LN_2)),
        "max_logits in base 2": after(lambda a, r: (r[0], r[1] / LN_2, r[2])),
        "max_logits and lse change places": after(lambda a, r: (r[0], r[2], r[1])),
        "the last columns are the value": before(
            lambda a: {name: a[name].roll(-64, -1) for name in ("q", "kv")}
        ),
        "RoPE columns do not score": before(
            lambda a: {"q": torch.cat([a["q"][..., :512], 0 * a["q"][..., 512:]], -1)}
        ),
    },
    "prefill_takes_d_qk_512": {
        "512 columns are taken for 448 and RoPE": before(
            lambda a: {"q": a["q"] * (torch.arange(a["q"].shape[-1], device=a["q"].device) < 448)}
        ),
    },
    "prefill_honours_sm_scale": {
        "max_logits without the scale": after(lambda a, r: (r[0], r[1] / a["sm_scale"], r[2])),
        "the scale is d_qk ** -0.5": before(lambda a: {"sm_scale": a["q"].shape[-1] ** -0.5}),
    },
    "prefill_counts_duplicates": {
        "duplicates count once": before(lambda a: {"indices": _without_duplicates(a["indices"])}),
    },
    "prefill_ignores_invalid_indices": {
        "indices from s_kv on become the last one": before(
            lambda a: {"indices": a["indices"].clamp(max=a["kv"].shape[0] - 1)}
        ),
        "negative indices count from the end": before(
            lambda a: {"indices": torch.where(a["indices"] < 0, a["indices"] % len(a["kv"]), a["indices"])}
        ),
        "the first invalid index ends a row": before(
            lambda a: {"indices": _up_to_the_first_invalid(a["indices"], a["kv"].shape[0])}
        ),
    },
    "prefill_of_empty_rows": {
        "lse of an empty row is -inf": after(lambda a, r: (r[0], r[1], torch.where(r[2] == INF, -INF, r[2]))),
        "max_logits of an empty row are the lowest float": after(
            lambda a, r: (r[0], r[1].clamp(min=torch.finfo(torch.float32).min), r[2])
        ),
        "out of an empty row is 0 / 0": after(
            lambda a, r: (r[0].masked_fill((r[2] == INF)[..., None], NAN), r[1], r[2])
        ),
    },
    "prefill_honours_topk_length": {
        "topk_length has no effect": drop("topk_length"),
        "topk_length is one too long": only_if(
            "topk_length", lambda a: {"topk_length": a["topk_length"] + 1}
        ),
    },
    "prefill_honours_attn_sink": {
        "attn_sink has no effect": drop("attn_sink"),
        "attn_sink in base 2": only_if("attn_sink", lambda a: {"attn_sink": a["attn_sink"] * LN_2}),
        "lse with the sink": after(
            lambda a, r: (r[0], r[1], torch.logaddexp(r[2], a["attn_sink"]) if "attn_sink" in a else r[2])
        ),
        "an infinite sink gives inf / inf": after(
            lambda a, r: (_nan_where_the_sink_is_infinite(a, r[0]), r[1], r[2])
        ),
    },
    "prefill_reads_strided_inputs": {
        "strides of q are ignored": before(lambda a: {"q": _as_if_contiguous(a["q"])}),
        "strides of kv are ignored": before(lambda a: {"kv": _as_if_contiguous(a["kv"])}),
        "strides of indices are ignored": before(lambda a: {"indices": _as_if_contiguous(a["indices"])}),
    },
    "prefill_never_reads_what_nobody_selects": {
        "rows that nobody selects are multiplied by zero": after(
            lambda a, r: (r[0] + 0 * a["kv"].sum(), r[1], r[2])
        ),
    },
    "results_repeat_bit_for_bit": {
        "sums differ from run to run": after(
            lambda a, r: (r[0] + 2**-10 * torch.randn_like(r[0]) * r[0], r[1], r[2])
        ),
    },
    "prefill_gives_base_2_on_request": {
        "return_log2_lse has no effect": drop("return_log2_lse"),
        "only lse is in base 2": after(
            lambda a, r: (r[0], r[1] * LN_2, r[2]) if a.get("return_log2_lse") else r
        ),
        "lse in base 2 with the sink": after(
            lambda a, r: (
                (r[0], r[1], torch.logaddexp2(r[2], a["attn_sink"] / LN_2)) if a.get("return_log2_lse") else r
            )
        ),
        "lse in base 2 of an empty row is -inf": after(
            lambda a, r: (*r[:2], torch.where(r[2] == INF, -INF, r[2])) if a.get("return_log2_lse") else r
        ),
    },
    "prefill_fills_out": {
        "out of the prefill is left as it is": drop("out"),
    },
    "prefill_takes_any_size": {
        "only 64 or 128 heads": before(lambda a: refuse(a["q"].shape[-2] not in (64, 128))),
    },
}

# FlashMLA's decode: its results are (out, lse)

DECODE: Mistakes = {
    "decode_reads_656_bytes_per_token": {
        "656: the scales in reverse": before(
            lambda a: {"k_cache": _scales_of_656(a["k_cache"], lambda s: s.flip(-1))}
        ),
        "656: the first scale for all": before(
            lambda a: {"k_cache": _scales_of_656(a["k_cache"], lambda s: s[..., :1].expand_as(s))}
        ),
    },
    "decode_reads_584_bytes_per_token": {
        "584: the scales of a token behind its values": before(
            lambda a: {"k_cache": _584_by_token(a["k_cache"])}
        ),
        "584: pages without padding": before(lambda a: {"k_cache": _as_if_contiguous(a["k_cache"])}),
    },
    "decode_reads_528_and_288_bytes_per_token": {
        "288: the high nibble first": before(lambda a: {"k_cache": _swap_nibbles(a["k_cache"], 288, 256)}),
    },
    "decode_reads_bf16_caches": {
        "bf16 caches are refused": before(
            lambda a: refuse(a["indices"] is not None and not a["is_fp8_kvcache"])
        ),
    },
    "decode_has_a_default_scale": {
        "the default scale is d_v ** -0.5": before(
            lambda a: {"softmax_scale": a.get("softmax_scale") or a["head_dim_v"] ** -0.5}
        ),
    },
    "decode_several_queries_per_sequence": {
        "lse is [batch, s_q, h_q]": after(lambda a, r: (r[0], r[1].transpose(1, 2))),
        "lse is [batch, s_q, h_q] under another shape": after(
            lambda a, r: (r[0], r[1].transpose(1, 2).reshape(r[1].shape))
        ),
        "all queries of a sequence share the first one's indices": before(
            lambda a: {"indices": a["indices"][:, :1].expand_as(a["indices"])}
        ),
        "query t takes the topk_length of sequence t % batch": lambda right, a: _with_lengths_in_turn(
            right, a
        ),
        "topk_length has no effect": drop("topk_length"),
    },
    "decode_of_empty_rows": {
        "lse of an empty row is -inf": after(lambda a, r: (r[0], torch.where(r[1] == INF, -INF, r[1]))),
    },
    "decode_honours_attn_sink": {
        "attn_sink has no effect": drop("attn_sink"),
    },
    "decode_joins_an_extra_cache": {
        "the extra cache has no effect": drop(
            "extra_k_cache", "extra_indices_in_kvcache", "extra_topk_length"
        ),
        "extra_topk_length has no effect": drop("extra_topk_length"),
        "the extra cache has a softmax of its own": lambda right, a: _two_softmaxes(right, a),
    },
    "decode_reuses_its_metadata": {
        "the indices of the first call are kept in the metadata": lambda right, a: _with_the_first_indices(
            right, a
        ),
    },
    "decode_needs_no_block_table": {
        "indices are positions, found through the block table": only_if(
            "block_table", lambda a: {"indices": _through_the_table(a)}
        ),
    },
    "decode_ignores_invalid_indices": {
        "indices beyond the cache become the last one": before(
            lambda a: {"indices": a["indices"].clamp(max=a["k_cache"].shape[:2].numel() - 1)}
        ),
    },
    "decode_never_reads_what_nobody_selects": {
        "slots that nobody selects are multiplied by zero": after(
            lambda a, r: (r[0] + 0 * _sum_of_cache(a["k_cache"]), r[1])
        ),
    },
    "decode_tells_quantised_caches": {
        "is_fp8_kvcache is False by default": before(
            lambda a: refuse("is_fp8_kvcache" not in a and a["k_cache"].dtype != torch.bfloat16)
        ),
        "is_fp8_kvcache is True by default": before(
            lambda a: refuse("is_fp8_kvcache" not in a and a["k_cache"].dtype == torch.bfloat16)
        ),
    },
    "decode_may_be_batch_invariant": {
        "a sum has another order in a batch": after(
            lambda a, r: (r[0], r[1] * (1 + 2**-20 * (len(a["q"]) > 1)))
        ),
    },
    "decode_takes_the_format_of_a_cache": {
        "bytes per token are believed whatever kv_format says": drop("kv_format"),
        "use_legacy does not change what 528 bytes mean": drop("use_legacy"),
        "528 bytes without RoPE are read as V4.1": only_if(
            "kv_format", lambda a: {"kv_format": "V41"} if a["kv_format"] == "V32_NO_ROPE" else {}
        ),
    },
    "decode_fills_out": {
        "out of the decode is left as it is": drop("out"),
        "out of the dense decode is left as it is": lambda right, a: (
            right(**a) if a.get("indices") is not None else drop("out")(right, a)
        ),
    },
    "decode_takes_any_size": {
        "only pages of 64 tokens": before(lambda a: refuse(a["k_cache"].shape[1] != 64)),
    },
    "dense_decode_follows_the_block_table": {
        "dense: the block table has no effect": only_if(
            "block_table", lambda a: {"block_table": pages_in_order(a["block_table"])}
        ),
        "dense: whole pages are attended to": only_if(
            "cache_seqlens", lambda a: {"cache_seqlens": (a["cache_seqlens"] + 63) // 64 * 64}
        ),
    },
    "dense_decode_may_be_causal": {
        "dense: causal has no effect": drop("causal"),
        "dense: every query sees a token less": before(
            lambda a: {"cache_seqlens": a["cache_seqlens"] - 1} if a.get("causal") else None
        ),
    },
    "dense_decode_reads_fp8": {
        "dense: every query sees a token at least": only_if(
            "cache_seqlens", lambda a: {"cache_seqlens": a["cache_seqlens"].clamp(min=a["q"].shape[1])}
        ),
    },
    "decode_refuses_what_contradicts_itself": {
        "causal with indices is let pass": before(
            lambda a: {"causal": False} if a.get("indices") is not None else None
        ),
        "num_splits is let pass": drop("num_splits"),
        "lengths without indices are let pass": before(
            lambda a: {"topk_length": None} if a.get("indices") is None else None
        ),
    },
}


def _without_duplicates(indices: Tensor) -> Tensor:
    equal = indices[..., :, None] == indices[..., None, :]
    repeated = equal.tril(-1).any(-1)  # equal to an earlier one
    return indices.masked_fill(repeated, -1)


def _up_to_the_first_invalid(indices: Tensor, s_kv: int) -> Tensor:
    invalid = (indices < 0) | (indices >= s_kv)
    return indices.masked_fill(invalid.cumsum(-1) > 0, -1)


def _nan_where_the_sink_is_infinite(arguments: Arguments, out: Tensor) -> Tensor:
    sink = arguments.get("attn_sink")
    return out if sink is None else out.masked_fill((sink == INF)[:, None], NAN)


def _as_if_contiguous(tensor: Tensor) -> Tensor:
    return tensor.as_strided(tensor.shape, torch.empty(tensor.shape, device="meta").stride())


def _scales_of_656(cache: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    if cache.shape[-1] != 656 or cache.dtype != torch.uint8:
        return cache
    cache = cache.clone()
    scales = formats.v32_kv_views(cache)[1]
    scales.copy_(change(scales.clone()))
    return cache


def _584_by_token(cache: Tensor) -> Tensor:
    """What a reader of 584 adjoining bytes per token finds, stored where it belongs."""
    if cache.shape[-1] != 584:
        return cache
    pages, page_size = cache.shape[:2]
    tokens = cache[:, :, 0]
    by_page = torch.cat([tokens[..., :576].flatten(1), tokens[..., 576:].flatten(1)], 1)
    return by_page.view(pages, page_size, 1, 584)


def _swap_nibbles(packed: Tensor, size: int, first: int) -> Tensor:
    if packed.shape[-1] != size or packed.dtype != torch.uint8:
        return packed
    values = packed[..., :first]
    return torch.cat([values << 4 | values >> 4, packed[..., first:]], -1)


def _with_lengths_in_turn(right: Callable[..., Any], arguments: Arguments) -> tuple[Tensor, Tensor]:
    if arguments.get("topk_length") is None:
        return right(**arguments)
    batch, s_q = arguments["q"].shape[:2]
    out, lse = right(
        **{
            **arguments,
            "q": arguments["q"].flatten(0, 1)[:, None],
            "indices": arguments["indices"].flatten(0, 1)[:, None],
            "topk_length": arguments["topk_length"].repeat(s_q),
        }
    )
    return out.view(batch, s_q, *out.shape[2:]), lse.view(batch, s_q, -1).transpose(1, 2)


def _two_softmaxes(right: Callable[..., Any], arguments: Arguments) -> tuple[Tensor, Tensor]:
    if arguments.get("extra_k_cache") is None:
        return right(**arguments)
    first = {name: value for name, value in arguments.items() if not name.startswith("extra")}
    second = {
        **first,
        "k_cache": arguments["extra_k_cache"],
        "indices": arguments["extra_indices_in_kvcache"],
        "topk_length": arguments.get("extra_topk_length"),
        "tile_scheduler_metadata": type(arguments["tile_scheduler_metadata"])(),
    }
    (out, lse), (more, more_lse) = right(**first), right(**second)
    return (out + more) / 2, torch.logaddexp(lse, more_lse)


def _with_the_first_indices(right: Callable[..., Any], arguments: Arguments) -> tuple[Tensor, Tensor]:
    metadata = arguments["tile_scheduler_metadata"]
    metadata.kept = getattr(metadata, "kept", arguments["indices"])
    return right(**{**arguments, "indices": metadata.kept})


def _through_the_table(arguments: Arguments) -> Tensor:
    indices, table = arguments["indices"], arguments["block_table"]
    page = table.gather(1, (indices.flatten(1).long() // 64).clamp(0, table.shape[1] - 1)).view_as(indices)
    return (page * 64 + indices % 64).int()


def _sum_of_cache(cache: Tensor) -> Tensor:
    parts = formats.views(cache[:, :, 0])
    return torch.stack([part.float().sum() for part in parts if part.dtype != torch.uint8]).sum()


VARIANTS = [
    *variants(("flash_mla_sparse_fwd",), PREFILL),
    *variants(("flash_mla_with_kvcache",), DECODE),
]
