"""What FlashMLA's functions mean, as checks of any module with its signatures.

The truth is the fp64 reference over the same stored values. Sizes are such that FlashMLA itself takes them,
except in the checks of ``BEYOND``, which ask for what it does not promise.
"""

from math import log
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import formats, reference
from . import INT_MAX, INT_MIN, assert_close, poison_unused
from .arguments import int32, permutation, randint, randn, to_device

NAN, INF = float("nan"), float("inf")
H_Q, TOPK, D_V = 64, 128, 512
OUT_FACTOR = 3.0  # roundings to bf16: of the output, of the probabilities
LOGITS_TOLERANCE = 1e-3


def _attention(q: Tensor, segments: list, scale: float, attn_sink: Tensor | None, d_v: int = D_V):
    """out, lse and max_logits in fp64; a segment is (rows, indices, topk_length or None)."""
    (kv, indices, length), *extra = [(rows.double(), *rest) for rows, *rest in segments]
    inputs = q.double(), kv, indices, d_v, scale, length, attn_sink, *(extra[0] if extra else ())
    out, lse, max_logits = reference.sparse_mla(*inputs)
    return out, lse.masked_fill(lse == -INF, INF), max_logits


def _assert_same(out: Tensor, expected: Tensor, **logits: tuple[Tensor, Tensor]) -> None:
    assert_close(out.cpu(), expected, OUT_FACTOR)
    for name, (actual, right) in logits.items():
        assert actual.shape == right.shape, f"{name}: expected {list(right.shape)}, got {list(actual.shape)}"
        assert actual.dtype == torch.float32, f"{name}: dtype {actual.dtype}, expected float32"
        torch.testing.assert_close(
            *(actual.cpu().double(), right),
            rtol=LOGITS_TOLERANCE,
            atol=LOGITS_TOLERANCE,
            msg=lambda said, name=name: f"{name}: {said}",
        )


# Prefill


def _prefill(module: ModuleType, device: str, **changes: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Call it with inputs that ``changes`` replace, and compare with the definition."""
    arguments = {
        "q": randn(4, H_Q, 576).bfloat16(),
        "kv": randn(300, 1, 576, seed=1).bfloat16(),
        "indices": randint(0, 300, (4, 1, TOPK)),
        "sm_scale": 0.07,
        **changes,
    }
    sent = to_device(arguments, device)
    out, max_logits, lse = module.flash_mla_sparse_fwd(**sent)
    segment = arguments["kv"][:, 0], arguments["indices"][:, 0], arguments.get("topk_length")
    options = arguments["sm_scale"], arguments.get("attn_sink"), arguments.get("d_v", D_V)
    right, right_lse, right_max = _attention(arguments["q"], [segment], *options)
    _assert_in_place(out, sent)
    log2 = arguments.get("return_log2_lse")
    if log2 is False:
        assert max_logits is None and lse is None, "max_logits and lse: expected None"
        _assert_same(out, right)
    else:
        unit = log(2) if log2 else 1.0
        _assert_same(out, right, max_logits=(max_logits, right_max / unit), lse=(lse, right_lse / unit))
    return out, max_logits, lse


def _assert_in_place(out: Tensor, sent: dict[str, Any]) -> None:
    if "out" in sent:
        assert out.data_ptr() == sent["out"].data_ptr(), "out: expected the tensor that was given"


def prefill_attends_to_what_is_selected(module, device):
    """out, max_logits and lse of one softmax over the selected rows; natural logarithms."""
    _prefill(module, device)


def prefill_takes_d_qk_512(module, device):
    """Keys of 512 values, all of which are the value."""
    _prefill(module, device, q=randn(4, H_Q, 512).bfloat16(), kv=randn(300, 1, 512).bfloat16())


def prefill_honours_sm_scale(module, device):
    """The scale is the caller's, whatever d_qk is; it is in max_logits and lse too."""
    _prefill(module, device, sm_scale=0.021)


def prefill_counts_duplicates(module, device):
    """An index that is selected twice counts twice."""
    indices = randint(0, 300, (4, 1, TOPK))
    indices[..., 1::2] = indices[..., :1]
    _prefill(module, device, indices=indices)


def prefill_ignores_invalid_indices(module, device):
    """Negative indices and those from s_kv on are ignored, wherever they stand."""
    indices = randint(0, 300, (4, 1, TOPK))
    indices[..., ::3] = int32(-1, 300, 301, INT_MIN, INT_MAX, -300).repeat(8)[: len(range(0, TOPK, 3))]
    _prefill(module, device, indices=indices)


def prefill_of_empty_rows(module, device):
    """Of a query with nothing to attend to: out 0, max_logits -inf, lse +inf."""
    indices = randint(0, 300, (4, 1, TOPK))
    indices[1], indices[3] = -1, 300
    out, *_ = _prefill(module, device, indices=indices, attn_sink=randn(H_Q).float())
    assert not out[1].any() and not out[3].any(), "out of an empty row: expected zeros"


def prefill_honours_topk_length(module, device):
    """Only the first topk_length indices of a query count; with 0 its row is empty."""
    _prefill(module, device, topk_length=int32(1, 0, TOPK, 77))


def prefill_honours_attn_sink(module, device):
    """The sink scales out by exp(lse) / (exp(lse) + exp(sink)), and nothing else; it may be infinite."""
    sink = 4 * randn(H_Q).float()
    sink[:2] = torch.tensor([INF, -INF])
    out, *_ = _prefill(module, device, attn_sink=sink)
    assert not out[:, 0].any(), "out with a sink of +inf: expected zeros"


def prefill_reads_strided_inputs(module, device):
    """q and kv may be slices of wider tensors, with contiguous rows."""
    q, kv = randn(8, 2 * H_Q, 640).bfloat16(), randn(300, 3, 640, seed=1).bfloat16()
    indices = randint(0, 300, (4, 2, 2 * TOPK))
    _prefill(
        module, device, q=q[::2, :H_Q, 64:], kv=kv[:, 1:2, :576], indices=indices[:, 1:, TOPK:], sm_scale=0.05
    )


def prefill_never_reads_what_nobody_selects(module, device):
    """NaN in rows that no valid index within topk_length names reaches no result."""
    indices, length = randint(0, 300, (4, 1, TOPK)), int32(100, 5, 0, 64)
    indices[0, 0, :9] = int32(-1, 300, INT_MIN).repeat(3)
    cut = torch.where(torch.arange(TOPK) < length[:, None, None], indices, -1)
    kv = poison_unused(randn(300, 1, 576).bfloat16(), cut)
    _prefill(module, device, kv=kv, indices=indices, topk_length=length)


def prefill_gives_base_2_on_request(module, device):
    """``return_log2_lse``: max_logits and lse in base 2, +inf of an empty row stays; False: None for both."""
    indices = randint(0, 300, (4, 1, TOPK))
    indices[1] = -1
    for asked in (True, False, None):
        _prefill(module, device, indices=indices, attn_sink=randn(H_Q).float(), return_log2_lse=asked)


def prefill_fills_out(module, device):
    """``out``: the result is written into the caller's tensor, also one with gaps between its queries."""
    _prefill(module, device, out=torch.full((4, H_Q + 1, D_V), NAN).bfloat16()[:, :H_Q])


def prefill_takes_any_size(module, device):
    """Any number of heads and of indices, and any d_v up to d_qk; topk_length of any value."""
    for h_q, topk, d_v in ((1, 7, 512), (40, 65, 128)):
        _prefill(
            *(module, device),
            q=randn(3, h_q, 576).bfloat16(),
            indices=randint(0, 300, (3, 1, topk)),
            d_v=d_v,
            topk_length=int32(-3, INT_MAX, 4),
        )


# Decode

PAGE_SIZE, PAGES = 64, 5
FORMATS = {656: "v32", 584: "v4", 528: "v41", 288: "v41_fp4"}  # what FlashMLA reads bytes per token as


def _cache(
    size: int | None,
    pages: int = PAGES,
    page_size: int = PAGE_SIZE,
    seed: int = 0,
    d_qk: int = 576,
    name: str | None = None,
):
    """A cache of ``size`` bytes per token (None: bf16) as FlashMLA takes it, and its rows in fp64.

    ``name``: of its format, where that is not what FlashMLA's newest release reads the bytes as.
    """
    if size is None:
        cache = randn(pages, page_size, d_qk, seed=seed).bfloat16()
        rows = cache.double()
    else:
        fmt = formats.KV_FORMATS[name or FORMATS[size]]
        cache = fmt.pack(randn(pages, page_size, fmt.width, seed=seed))
        rows = formats.unpack(cache, torch.float64, fmt.name)
    return cache[:, :, None], rows.flatten(0, 1)


def _decode(module: ModuleType, device: str, rows, extra_rows=None, metadata=None, **changes: Any):
    """Sparse decode with inputs that ``changes`` replace, compared with the definition."""
    batch, s_q = changes["indices"].shape[:2]
    arguments = {
        "q": randn(batch, s_q, H_Q, rows.shape[1], seed=2).bfloat16(),
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": D_V,
        "softmax_scale": 0.07,
        "is_fp8_kvcache": changes["k_cache"].dtype != torch.bfloat16,
        **changes,
    }
    if arguments["is_fp8_kvcache"] is None:
        del arguments["is_fp8_kvcache"]
    metadata = metadata or module.get_mla_metadata()[0]
    sent = to_device(arguments, device)
    out, lse = module.flash_mla_with_kvcache(**sent, tile_scheduler_metadata=metadata)
    _assert_in_place(out, sent)

    def segment(rows, indices, length):
        length = None if length is None else length.repeat_interleave(s_q)
        return rows, indices.flatten(0, 1), length

    segments = [segment(rows, arguments["indices"], arguments.get("topk_length"))]
    if extra_rows is not None:
        names = "extra_indices_in_kvcache", "extra_topk_length"
        segments.append(segment(extra_rows, *(arguments.get(name) for name in names)))
    q, scale = arguments["q"], arguments["softmax_scale"]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    right, right_lse, _ = _attention(q.flatten(0, 1), segments, scale, arguments.get("attn_sink"))
    right_lse = right_lse.unflatten(0, (batch, s_q)).transpose(1, 2)
    _assert_same(out, right.unflatten(0, (batch, s_q)), lse=(lse, right_lse))
    return out, lse


def _plain_decode(module, device, size, batch=2, s_q=1, name=None, **changes):
    cache, rows = _cache(size, name=name)
    indices = randint(0, len(rows), (batch, s_q, TOPK))
    return _decode(module, device, rows, **{"k_cache": cache, "indices": indices, **changes})


def decode_reads_656_bytes_per_token(module, device):
    """DeepSeek-V3.2's cache: four fp32 scales per token, bf16 RoPE behind them."""
    _plain_decode(module, device, 656)


def decode_reads_584_bytes_per_token(module, device):
    """DeepSeek-V4's cache: the scales of a page behind all its values, pages padded to 576 bytes."""
    _plain_decode(module, device, 584)


def decode_reads_528_and_288_bytes_per_token(module, device):
    """DeepSeek-V4.1's caches, in fp8 and in fp4."""
    for size in (528, 288):
        _plain_decode(module, device, size)


def decode_reads_bf16_caches(module, device):
    """Sparse decode with ``is_fp8_kvcache=False``."""
    _plain_decode(module, device, None)


def decode_has_a_default_scale(module, device):
    """``softmax_scale`` of None is d_qk ** -0.5."""
    _plain_decode(module, device, 656, softmax_scale=None)


def decode_several_queries_per_sequence(module, device):
    """s_q > 1: indices are per query, topk_length is per sequence; lse is [batch, h_q, s_q]."""
    _plain_decode(module, device, 656, batch=3, s_q=2, topk_length=int32(1, TOPK, 64))


def decode_of_empty_rows(module, device):
    """out 0 and lse +inf, with a sink too; a topk_length of 0 counts."""
    indices = randint(0, PAGES * PAGE_SIZE, (3, 1, TOPK))
    indices[1] = -1
    out, _ = _plain_decode(
        *(module, device, 656),
        indices=indices,
        topk_length=int32(TOPK, TOPK, 0),
        attn_sink=randn(H_Q).float(),
    )
    assert not out[1:].any(), "out of an empty row: expected zeros"


def decode_honours_attn_sink(module, device):
    """As in the prefill; lse is without the sink."""
    sink = 4 * randn(H_Q).float()
    sink[:2] = torch.tensor([INF, -INF])
    _plain_decode(module, device, 656, attn_sink=sink)


def decode_joins_an_extra_cache(module, device):
    """A second cache with its own pages, indices and lengths, in one softmax with the first."""
    cache, rows = _cache(584)
    extra, extra_rows = _cache(584, pages=9, page_size=2, seed=5)
    _decode(
        *(module, device, rows, extra_rows),
        k_cache=cache,
        indices=randint(0, len(rows), (3, 2, TOPK)),
        topk_length=int32(TOPK, 3, 0),
        extra_k_cache=extra,
        extra_indices_in_kvcache=randint(0, len(extra_rows), (3, 2, TOPK), seed=1),
        extra_topk_length=int32(60, TOPK, 0),
        attn_sink=randn(H_Q).float(),
    )


def decode_reuses_its_metadata(module, device):
    """Calls of the same sizes and lengths may share the metadata."""
    metadata = module.get_mla_metadata()[0]
    for seed in range(2):
        indices = randint(0, PAGES * PAGE_SIZE, (2, 1, TOPK), seed=seed)
        _plain_decode(module, device, 656, indices=indices, metadata=metadata)


def decode_needs_no_block_table(module, device):
    """With indices, block_table and cache_seqlens may be None or anything: slots are physical."""
    _plain_decode(module, device, 656, block_table=torch.zeros(2, 3).int(), cache_seqlens=torch.ones(2).int())


def decode_ignores_invalid_indices(module, device):
    """Not only -1: every index outside the cache."""
    indices = randint(0, PAGES * PAGE_SIZE, (2, 1, TOPK))
    indices[..., ::3] = int32(-1, PAGES * PAGE_SIZE, INT_MIN, INT_MAX).repeat(12)[: len(range(0, TOPK, 3))]
    for size in (656, 584):
        _plain_decode(module, device, size, indices=indices)


def decode_never_reads_what_nobody_selects(module, device):
    """Codes, scales and RoPE values that are NaN, in slots that no valid index within topk_length names."""
    length, indices = int32(100, 5), randint(0, PAGES * PAGE_SIZE, (2, 1, TOPK))
    cut = torch.where(torch.arange(TOPK) < length[:, None, None], indices, -1)
    used = poison_unused(torch.zeros(PAGES * PAGE_SIZE), cut).isfinite().view(PAGES, PAGE_SIZE)
    for size in (656, 584):
        cache, rows = _cache(size)
        for part in formats.views(cache[:, :, 0]):
            stored = part.view(torch.uint8) if part.dtype != torch.uint8 else part
            stored[~used] = 0xFF
        _decode(module, device, rows, k_cache=cache, indices=indices, topk_length=length)


def decode_tells_quantised_caches(module, device):
    """Without ``is_fp8_kvcache`` the dtype of the cache tells it."""
    for size in (656, None):
        _plain_decode(module, device, size, is_fp8_kvcache=None)


def decode_may_be_batch_invariant(module, device):
    """``enable_batch_invariant``: a sequence alone has the bits that it has in a batch."""
    cache, rows = _cache(656)
    q, indices = randn(5, 1, H_Q, 576, seed=2).bfloat16(), randint(0, len(rows), (5, 1, TOPK))
    options = {"k_cache": cache, "enable_batch_invariant": True}
    out, lse = _decode(module, device, rows, q=q, indices=indices, **options)
    for i in range(5):
        one = slice(i, i + 1)
        alone, alone_lse = _decode(module, device, rows, q=q[one], indices=indices[one], **options)
        same = torch.equal(out[one], alone) and torch.equal(lse[one], alone_lse)
        assert same, f"sequence {i}: expected the bits that it has alone"


def decode_takes_the_format_of_a_cache(module, device):
    """``kv_format`` names it; one that has other bytes per token is refused, and so is an unknown name."""
    for size, name in ((656, "V32"), (584, "V4")):
        _plain_decode(module, device, size, kv_format=name)
    for size, name in ((528, "v41_by_page"), (288, "v41_fp4_by_page")):
        _plain_decode(module, device, size, name=name, kv_format="V41")
        _plain_decode(module, device, size, name=name, use_legacy=True)
    _plain_decode(module, device, 528, name="nope", kv_format="V32_NO_ROPE")
    for size, name in ((656, "V4"), (584, "V41"), (656, "v32")):
        try:
            _plain_decode(module, device, size, kv_format=name)
        except AssertionError:
            raise
        except Exception:  # of whatever kind
            continue
        raise AssertionError(f"{name} with {size} bytes per token: expected to be refused")


def decode_fills_out(module, device):
    """``out`` as in the prefill, of sparse and of dense decode."""
    _plain_decode(
        module, device, 656, s_q=2, out=torch.full((2, 2, H_Q + 1, D_V), NAN).bfloat16()[:, :, :H_Q]
    )
    _dense(module, device, None, s_q=2, causal=True, out=torch.full((3, 2, H_Q, D_V), NAN).bfloat16())


def decode_takes_any_size(module, device):
    """Any number of heads and indices, any page size, a strided q, and bytes of type uint8 as of fp8."""
    cache, rows = _cache(656, pages=7, page_size=5)
    q = randn(2, 3, 2 * 5, 700).bfloat16()[:, :, ::2, 3:579]
    indices = randint(0, 35, (2, 3, 9))
    out, _ = _decode(module, device, rows, q=q, k_cache=cache, indices=indices)
    same, _ = _decode(module, device, rows, q=q, k_cache=cache.view(torch.float8_e4m3fn), indices=indices)
    assert torch.equal(out, same), "out: expected the same whatever type the bytes have"


# Dense decode


def _dense(module: ModuleType, device: str, size: int | None, s_q: int, causal: bool, **changes: Any):
    cache, rows = _cache(size, pages=9)
    lengths, batch = int32(150, 64, 3), 3
    table = permutation(9).view(batch, 3)
    q = randn(batch, s_q, H_Q, 576, seed=2).bfloat16()
    where = {"block_table": table, "cache_seqlens": lengths, "head_dim_v": D_V}
    sent = to_device({"q": q, "k_cache": cache, **where, **changes}, device)
    out, lse = module.flash_mla_with_kvcache(
        **sent,
        tile_scheduler_metadata=module.get_mla_metadata()[0],
        causal=causal,
        is_fp8_kvcache=size is not None,
    )
    _assert_in_place(out, sent)
    slots = (table[:, :, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten(1).int()
    seen = lengths[:, None] + (torch.arange(1 - s_q, 1) if causal else torch.zeros(s_q)).int()
    segment = rows, slots.repeat_interleave(s_q, 0), seen.flatten().int()
    right, right_lse, _ = _attention(q.flatten(0, 1), [segment], 576**-0.5, None)
    right_lse = right_lse.unflatten(0, (batch, s_q)).transpose(1, 2)
    _assert_same(out, right.unflatten(0, (batch, s_q)), lse=(lse, right_lse))


def dense_decode_follows_the_block_table(module, device):
    """Without indices: every token of a sequence, through its pages, up to cache_seqlens."""
    _dense(module, device, None, s_q=1, causal=False)


def dense_decode_may_be_causal(module, device):
    """The last of s_q queries sees the whole sequence, each one before it one token less."""
    _dense(module, device, None, s_q=2, causal=True)
    _dense(module, device, None, s_q=2, causal=False)


def dense_decode_reads_fp8(module, device):
    """Dense decode with a quantised cache, and a query that sees nothing at all."""
    _dense(module, device, 656, s_q=4, causal=True)


# Of all functions


def results_repeat_bit_for_bit(module, device):
    """The same call gives the same bits."""
    (out, *_), (again, *_) = (_prefill(module, device) for _ in range(2))
    assert torch.equal(out, again), "out of the prefill: expected the same bits"
    (out, _), (again, _) = (_plain_decode(module, device, 656) for _ in range(2))
    assert torch.equal(out, again), "out of the decode: expected the same bits"


def decode_refuses_what_contradicts_itself(module, device):
    """Causal with indices; a sink, lengths or an extra cache without; num_splits; other metadata."""
    cache, _ = _cache(656)
    bf16, _ = _cache(None)
    table, lengths = randint(0, PAGES, (2, 2)), int32(9, 9)
    indices = randint(0, 99, (2, 1, TOPK))
    sparse = {"k_cache": cache, "is_fp8_kvcache": True, "indices": indices}
    dense = {"k_cache": bf16, "block_table": table, "cache_seqlens": lengths}
    calls = {
        "causal with indices": {**sparse, "causal": True},
        "num_splits that is not None": {**sparse, "num_splits": lengths},
        "metadata of another kind": {**sparse, "tile_scheduler_metadata": None},
        "is_fp8_kvcache with a bf16 cache": {**sparse, "k_cache": bf16},
        "topk_length without indices": {**dense, "topk_length": lengths},
        "an extra cache without indices": {**dense, "extra_k_cache": bf16},
        "dense decode without a block table": {**dense, "block_table": None},
    }
    for what, changes in calls.items():
        arguments = {
            "q": randn(2, 1, H_Q, 576).bfloat16(),
            "block_table": None,
            "cache_seqlens": None,
            "head_dim_v": D_V,
            "tile_scheduler_metadata": module.get_mla_metadata()[0],
            **changes,
        }
        try:
            module.flash_mla_with_kvcache(**to_device(arguments, device))
        except Exception:  # of whatever kind
            continue
        raise AssertionError(f"{what}: expected to be refused")


CHECKS = (
    prefill_attends_to_what_is_selected,
    prefill_takes_d_qk_512,
    prefill_honours_sm_scale,
    prefill_counts_duplicates,
    prefill_ignores_invalid_indices,
    prefill_of_empty_rows,
    prefill_honours_topk_length,
    prefill_honours_attn_sink,
    prefill_reads_strided_inputs,
    decode_reads_656_bytes_per_token,
    decode_reads_584_bytes_per_token,
    decode_has_a_default_scale,
    decode_several_queries_per_sequence,
    decode_of_empty_rows,
    decode_honours_attn_sink,
    decode_joins_an_extra_cache,
    decode_reuses_its_metadata,
    decode_needs_no_block_table,
    dense_decode_follows_the_block_table,
    dense_decode_may_be_causal,
    results_repeat_bit_for_bit,
    decode_refuses_what_contradicts_itself,
)
BEYOND = (
    prefill_never_reads_what_nobody_selects,
    prefill_gives_base_2_on_request,
    prefill_fills_out,
    prefill_takes_any_size,
    decode_reads_528_and_288_bytes_per_token,
    decode_reads_bf16_caches,
    decode_ignores_invalid_indices,
    decode_never_reads_what_nobody_selects,
    decode_tells_quantised_caches,
    decode_may_be_batch_invariant,
    decode_takes_the_format_of_a_cache,
    decode_fills_out,
    decode_takes_any_size,
    dense_decode_reads_fp8,
)
