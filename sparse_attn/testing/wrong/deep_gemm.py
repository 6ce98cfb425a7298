"""Mistakes in DeepGEMM's functions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import formats
from . import Mistakes, after, before, drop, only_if, pages_in_order, refuse, variants

INF = float("inf")
ONES = 0x7F7F7F7F  # four ue8m0 scales of 1

MQA: Mistakes = {
    "mqa_sums_weighted_relus": {
        "no relu": lambda right, a: right(**a) - right(**{**a, "q": _negated(a["q"])}),
        "weights lose their sign": before(lambda a: {"weights": a["weights"].abs()}),
        "the scale of a key has no effect": before(
            lambda a: {"kv": (a["kv"][0], torch.ones_like(a["kv"][1]))}
        ),
        "all keys have the first one's scale": before(
            lambda a: {"kv": (a["kv"][0], a["kv"][1][:1].expand_as(a["kv"][1]).contiguous())}
        ),
    },
    "mqa_cleans_what_a_query_does_not_see": {
        "every query sees from key 0 on": before(
            lambda a: {"cu_seq_len_k_start": torch.zeros_like(a["cu_seq_len_k_start"])}
        ),
        "the end is seen too": before(lambda a: {"cu_seq_len_k_end": a["cu_seq_len_k_end"] + 1}),
        "an empty range sees a key": before(
            lambda a: {"cu_seq_len_k_end": a["cu_seq_len_k_end"].maximum(a["cu_seq_len_k_start"] + 1)}
        ),
        "what is not seen is 0": after(lambda a, r: r.masked_fill(r == -INF, 0.0)),
        "what is not seen is the lowest float": after(lambda a, r: r.clamp(min=torch.finfo(r.dtype).min)),
    },
    "mqa_may_leave_logits_undefined": {
        "rows that are not cleaned begin at the first key": after(
            lambda a, r: r if a["clean_logits"] else _rolled(r, a["cu_seq_len_k_start"])
        ),
    },
    "mqa_compresses_rows": {
        "rows are cut, not compressed": lambda right, a: right(**{**a, "max_seqlen_k": 0})[
            :, : a["max_seqlen_k"] or None
        ],
        "compressed rows begin a key late": after(lambda a, r: r.roll(-1, 1) if a["max_seqlen_k"] else r),
    },
    "mqa_rounds_logits_to_bf16": {
        "logits are fp32 always": after(lambda a, r: r.float()),
    },
    "mqa_takes_bf16_weights": {
        "bf16 weights are refused": before(lambda a: refuse(a["weights"].dtype == torch.bfloat16)),
    },
    "mqa_reads_fp4": {
        "the high nibble of a key first": before(lambda a: {"kv": (_swapped(a["kv"][0]), a["kv"][1])}),
        "the first scale in the high byte": before(
            lambda a: {name: (a[name][0], _reversed(a[name][1])) for name in ("q", "kv")}
        ),
        "scales of fp4 queries have no effect": before(
            lambda a: {"q": (a["q"][0], torch.full_like(a["q"][1], ONES))}
        ),
    },
    "mqa_reads_fp4_of_64_values": {
        "two scales in the high bytes": before(
            lambda a: {name: (a[name][0], _rotated(a[name][1])) for name in ("q", "kv")}
        ),
        "the first of two scales for all 64 values": before(
            lambda a: {"kv": (a["kv"][0], _first_scale_twice(a["kv"][1]))}
        ),
        "the pad of two scales is multiplied too": after(
            lambda a, r: r * _pad_of_two_scales(a["q"][0], a["q"][1])[:, None]
        ),
        "only fp4 of 128 values": before(lambda a: refuse(a["q"][0].shape[-1] == 32)),
    },
    "mqa_refuses_what_contradicts_itself": {
        "compressed rows may be cleaned": before(
            lambda a: {"clean_logits": a["clean_logits"] and not a.get("max_seqlen_k")}
        ),
        "bf16 weights for fp32 logits are let pass": before(lambda a: {"weights": a["weights"].float()}),
    },
    "results_repeat_bit_for_bit": {
        "sums differ from run to run": after(lambda a, r: r * (1 + 1e-6 * torch.randn_like(r))),
    },
    "mqa_takes_any_size": {
        "only 32 or 64 heads": before(lambda a: refuse(a["weights"].shape[1] not in (32, 64))),
        "a reversed range is turned round": before(
            lambda a: {
                "cu_seq_len_k_start": a["cu_seq_len_k_start"].minimum(a["cu_seq_len_k_end"]),
                "cu_seq_len_k_end": a["cu_seq_len_k_start"].maximum(a["cu_seq_len_k_end"]),
            }
        ),
    },
    "mqa_never_reads_what_nobody_sees": {
        "keys that nobody sees are multiplied by zero": after(lambda a, r: r + 0 * a["kv"][0].float().sum()),
    },
}

PAGED: Mistakes = {
    "paged_follows_the_block_table": {
        "the scale of a key behind its values": before(lambda a: {"kv_cache": _by_token(a["kv_cache"])}),
        "the block table has no effect": before(lambda a: {"block_table": pages_in_order(a["block_table"])}),
        "weights are [next_n, batch, heads]": before(
            lambda a: {"weights": _by_next_n(a["weights"], len(a["context_lens"]))}
        ),
        "all queries of a sequence see what the last one sees": before(
            lambda a: {"context_lens": a["context_lens"][:, -1:].expand_as(a["context_lens"])}
        ),
        "every query sees a token less": before(lambda a: {"context_lens": a["context_lens"] - 1}),
    },
    "paged_is_max_context_len_wide": {
        "as wide as the block table": before(
            lambda a: {"max_context_len": a["block_table"].shape[1] * a["kv_cache"].shape[1]}
        ),
    },
    "paged_rounds_logits_to_bf16": {
        "logits are fp32 always": after(lambda a, r: r.float()),
    },
    "paged_reads_fp4": {
        "the high nibble of a key first": before(
            lambda a: {"kv_cache": _changed_fp4(a["kv_cache"], lambda k, s: (k << 4 | k >> 4, s))}
        ),
        "the first scale in the high byte": before(
            lambda a: {"kv_cache": _changed_fp4(a["kv_cache"], lambda k, s: (k, s.flip(-1)))}
        ),
        "scales of fp4 queries have no effect": before(
            lambda a: {"q": (a["q"][0], torch.full_like(a["q"][1], ONES))}
        ),
    },
    "paged_reads_fp4_of_64_values": {
        "two scales in the high bytes": before(
            lambda a: {"kv_cache": _changed_scales(a["kv_cache"], lambda s: s.roll(2, -1))}
        ),
        "the first of two scales for all 64 values": before(
            lambda a: {"kv_cache": _changed_scales(a["kv_cache"], lambda s: s[..., :1].expand_as(s))}
        ),
        "scales as two bytes per key": before(
            lambda a: {"kv_cache": _changed_scales(a["kv_cache"], _as_pairs)}
        ),
    },
    "paged_takes_indices": {
        "queries of one sequence share a length": only_if(
            "indices", lambda a: {"context_lens": a["context_lens"][a["indices"].long()]}
        ),
    },
    "paged_refuses_what_contradicts_itself": {
        "indices with several queries per sequence are let pass": drop("indices"),
        "weights of any shape are let pass": before(
            lambda a: {"weights": a["weights"].reshape(-1, a["weights"].shape[-1])}
        ),
        "lengths are broadcast": before(
            lambda a: {"context_lens": a["context_lens"].expand(-1, a["q"][0].shape[1])}
        ),
    },
    "paged_takes_lengths_of_sequences": {
        "every query sees its sequence's whole length": before(
            lambda a: {"context_lens": _whole(a["context_lens"], len(a["weights"]))}
        ),
    },
    "paged_cleans_what_a_query_does_not_see": {
        "what is not seen is 0": after(lambda a, r: r.masked_fill(r == -INF, 0.0)),
        "not cleaned beyond the block table": after(
            lambda a, r: _zero_from(r, a["block_table"].shape[1] * a["kv_cache"].shape[1])
        ),
    },
    "paged_takes_any_size": {
        "pages that do not exist become the last one": before(
            lambda a: {"block_table": a["block_table"].clamp(0, a["kv_cache"].shape[0] - 1)}
        ),
        "only pages of 64 tokens": before(lambda a: refuse(a["kv_cache"].shape[1] != 64)),
    },
    "paged_never_reads_what_nobody_sees": {
        "slots that nobody sees are multiplied by zero": after(
            lambda a, r: r + 0 * formats.index_k_views(a["kv_cache"][:, :, 0])[1].sum()
        ),
    },
}

METADATA: Mistakes = {
    "paged_metadata_has_its_shape": {
        "a row per multiprocessor": after(lambda a, r: r[1:]),
        "64-bit metadata": after(lambda a, r: r.long()),
    },
}


def _negated(q: Any) -> Any:
    values = q[0] if isinstance(q, tuple) else q
    negative = (values.view(torch.uint8) ^ 0x80).view(torch.float8_e4m3fn)
    return (negative, None) if isinstance(q, tuple) else negative


def _rolled(logits: Tensor, starts: Tensor) -> Tensor:
    return torch.stack([row.roll(-start) for row, start in zip(logits, starts.tolist(), strict=True)])


def _swapped(packed: Tensor) -> Tensor:
    packed = packed.view(torch.uint8)
    return packed << 4 | packed >> 4


def _reversed(scales: Tensor) -> Tensor:
    return scales[..., None].view(torch.uint8).flip(-1).view(torch.int32)[..., 0]


def _rotated(scales: Tensor) -> Tensor:
    return scales[..., None].view(torch.uint8).roll(2, -1).view(torch.int32)[..., 0]


def _first_scale_twice(scales: Tensor) -> Tensor:
    stored = scales[..., None].view(torch.uint8)
    return stored[..., :1].expand_as(stored).contiguous().view(torch.int32)[..., 0]


def _pad_of_two_scales(values: Tensor, scales: Tensor) -> Tensor:
    """Per query 1, or NaN if a pad holds it: of queries that have only two scales per head."""
    stored = scales[..., None].view(torch.uint8)[..., values.shape[-1] // 16 :]
    return formats.from_ue8m0(stored).flatten(1).sum(1) * 0 + 1


def _changed_scales(cache: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A cache of fp4 keys with other scales, ``[pages, page_size, 4]`` bytes."""
    cache = cache.clone()
    pages, page_size, _, size = cache.shape
    scales = cache.view(pages, -1)[:, page_size * (size - 4) :].unflatten(1, (page_size, 4))
    scales.copy_(change(scales.clone()))
    return cache


def _as_pairs(scales: Tensor) -> Tensor:
    """What a reader of two adjoining bytes per key finds, stored where it belongs."""
    pairs = scales.flatten(1).unflatten(1, (-1, 2))[:, : scales.shape[1]]
    return torch.cat([pairs, scales[..., 2:]], -1)


def _by_token(cache: Tensor) -> Tensor:
    """What a reader of 132 adjoining bytes per key finds, stored where it belongs."""
    tokens = cache[:, :, 0]
    return torch.cat([tokens[..., :128].flatten(1), tokens[..., 128:].flatten(1)], 1).view_as(cache)


def _by_next_n(weights: Tensor, batch: int) -> Tensor:
    return weights.view(-1, batch, weights.shape[1]).transpose(0, 1).reshape(weights.shape)


def _changed_fp4(cache: Tensor, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    cache = cache.clone()
    parts = formats.mxfp4_index_k_views(cache[:, :, 0])
    for part, changed in zip(parts, change(*(part.clone() for part in parts)), strict=True):
        part.copy_(changed)
    return cache


def _whole(lengths: Tensor, queries: int) -> Tensor:
    if lengths.dim() != 1:
        return lengths
    return lengths[:, None].expand(-1, queries // len(lengths)).contiguous()


def _zero_from(logits: Tensor, column: int) -> Tensor:
    logits[:, column:] = 0.0
    return logits


VARIANTS = [
    *variants(("fp8_mqa_logits", "fp8_fp4_mqa_logits"), MQA),
    *variants(("fp8_paged_mqa_logits", "fp8_fp4_paged_mqa_logits"), PAGED),
    *variants(("get_paged_mqa_logits_metadata",), METADATA),
]
