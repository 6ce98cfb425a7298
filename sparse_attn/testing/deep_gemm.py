"""What DeepGEMM's indexer logits mean, as checks of any module with its signatures.

The truth is the fp64 reference over the same stored values. Sizes are such that DeepGEMM itself takes them,
except in the checks of ``BEYOND``; fp4, bf16 weights and ``indices`` it takes on Blackwell only. Logits that
a call leaves undefined are not looked at.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import formats, reference
from . import INT_MAX, INT_MIN, relative_error
from .arguments import int32, permutation, randint, randn, to_device

INF = float("inf")
HEADS, D, S_KV, PAGE_SIZE = 32, 128, 300, 64
BUDGET = {torch.float32: 1e-3, torch.bfloat16: 5e-3}  # tensor cores round sums of fp8 products to few bits


def _fp8(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn)


def _fp4(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packed e2m1 (int8), a ue8m0 per 32 values in an int32, and what both mean, in fp64; a pad is NaN."""
    values = torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=torch.uint8)
    stored = torch.full((*x.shape[:-1], 4), 255, dtype=torch.uint8)
    scales = stored[..., : x.shape[-1] // 32]
    formats.quantise(x, values, scales, min_scale=formats.FP4_MIN_SCALE)
    meant = formats.dequantise(values, scales, dtype=torch.float64)
    return values.view(torch.int8), stored.view(torch.int32)[..., 0], meant


def _uneven(*shape: int, seed: int = 0) -> Tensor:
    """Blocks of 32 values of very different size."""
    blocks = randn(*shape[:-1], shape[-1] // 32, 1, seed=seed + 100)
    return (randn(*shape, seed=seed).unflatten(-1, (-1, 32)) * (2 * blocks).exp2()).flatten(-2)


def _assert_logits(actual: Tensor, expected: Tensor, dtype: torch.dtype, cleaned: bool, seen: Tensor) -> None:
    assert list(actual.shape) == list(expected.shape), (
        f"logits: expected shape {list(expected.shape)}, got {list(actual.shape)}"
    )
    assert actual.dtype == dtype, f"logits: expected {dtype}, got {actual.dtype}"
    actual = actual.cpu().double()
    if cleaned:
        wrong = torch.isneginf(actual) == seen
        assert not wrong.any(), (
            f"-inf: wrong in {int(wrong.sum())} places, first {wrong.nonzero()[0].tolist()}"
        )
    error = relative_error(actual[seen], expected[seen])
    assert error <= BUDGET[dtype], f"relative error {error:.3g} exceeds the budget {BUDGET[dtype]:.3g}"


# Contiguous keys


def _mqa(module: ModuleType, device: str, fp4: bool = False, s_q: int = 6, **changes: Any) -> Tensor:
    """Call it with inputs that ``changes`` replace, and compare with the definition."""
    heads, d = changes.pop("heads", HEADS), changes.pop("d", D)
    if fp4:
        (q, q_scale, q_meant), (k, k_scale, k_meant) = (
            _fp4(_uneven(s_q, heads, d)),
            _fp4(_uneven(S_KV, d, seed=1)),
        )
    else:
        q, q_scale, k = _fp8(randn(s_q, heads, d)), None, changes.pop("k", None)
        k = _fp8(randn(S_KV, d, seed=1)) if k is None else k
        k_scale = randn(len(k), seed=2).exp().float()
        q_meant, k_meant = q.double(), (k.double() * k_scale.double()[:, None]).nan_to_num()
    arguments = {
        "q": (q, q_scale),
        "kv": (k, k_scale),
        "weights": randn(s_q, heads, seed=3).float(),
        "cu_seq_len_k_start": int32(0, 0, 17, 250, 299, 40)[:s_q],
        "cu_seq_len_k_end": int32(S_KV, 1, 170, 300, 300, 40)[:s_q],
        "clean_logits": True,
        "max_seqlen_k": 0,
        **changes,
    }
    dtype = arguments.setdefault("logits_dtype", torch.float32)
    function = module.fp8_fp4_mqa_logits
    sent = to_device(arguments, device)
    if not fp4 and dtype == torch.float32:  # the older function is the same
        function, sent["q"] = module.fp8_mqa_logits, sent["q"][0]
        del sent["logits_dtype"]
    logits = function(**sent)
    ks, ke = arguments["cu_seq_len_k_start"], arguments["cu_seq_len_k_end"]
    weights = arguments["weights"].double()
    expected = reference.index_logits(q_meant, k_meant, weights, ks, ke)
    if arguments["max_seqlen_k"]:
        position = ks[:, None].long() + torch.arange(arguments["max_seqlen_k"])
        expected = torch.nn.functional.pad(expected, (0, 1), value=-INF)
        expected = expected.gather(1, position.clamp(max=len(k)))
    _assert_logits(logits, expected, dtype, arguments["clean_logits"], expected > -INF)
    return logits


def mqa_sums_weighted_relus(module, device):
    """relu before the weight, which may be negative; each key has its scale."""
    full = torch.zeros(6).int(), torch.full((6,), S_KV).int()
    _mqa(module, device, cu_seq_len_k_start=full[0], cu_seq_len_k_end=full[1])


def mqa_cleans_what_a_query_does_not_see(module, device):
    """-inf outside [start, end), for ranges of every kind, empty ones too."""
    _mqa(module, device)


def mqa_may_leave_logits_undefined(module, device):
    """``clean_logits=False``: within the range nothing changes."""
    _mqa(module, device, clean_logits=False)


def mqa_compresses_rows(module, device):
    """With ``max_seqlen_k`` row t begins at the first key of query t."""
    _mqa(
        *(module, device),
        cu_seq_len_k_end=int32(120, 1, 137, 300, 300, 40),
        clean_logits=False,
        max_seqlen_k=120,
    )


def mqa_rounds_logits_to_bf16(module, device):
    """``logits_dtype`` of bf16, whole and compressed rows."""
    _mqa(module, device, logits_dtype=torch.bfloat16)
    _mqa(module, device, logits_dtype=torch.bfloat16, clean_logits=False, max_seqlen_k=300)


def mqa_takes_bf16_weights(module, device):
    """For bf16 logits."""
    weights = randn(6, HEADS, seed=3).bfloat16()
    _mqa(module, device, weights=weights, logits_dtype=torch.bfloat16)


def mqa_reads_fp4(module, device):
    """Two e2m1 in a byte, the first in the low bits; four ue8m0 in an int32, the first in the low byte."""
    _mqa(module, device, fp4=True)


def mqa_reads_fp4_of_64_values(module, device):
    """32 bytes, and two ue8m0 in the low bytes of the int32; the bytes above them are never read."""
    _mqa(module, device, fp4=True, d=64)


def mqa_refuses_what_contradicts_itself(module, device):
    """Cleaning compressed rows; fp8 queries with fp4 keys; bf16 weights for fp32 logits."""
    q, k, scale = _fp8(randn(6, HEADS, D)), _fp8(randn(S_KV, D)), torch.ones(S_KV)
    packed, packed_scale, _ = _fp4(_uneven(S_KV, D))
    ends = torch.zeros(6).int(), torch.full((6,), S_KV).int()
    right = {
        "q": (q, None),
        "kv": (k, scale),
        "weights": randn(6, HEADS).float(),
        "cu_seq_len_k_start": ends[0],
        "cu_seq_len_k_end": ends[1],
        "clean_logits": False,
    }
    calls = {
        "max_seqlen_k with clean_logits": {"max_seqlen_k": S_KV, "clean_logits": True},
        "fp8 queries with fp4 keys": {"kv": (packed, packed_scale)},
        "bf16 weights for fp32 logits": {"weights": right["weights"].bfloat16()},
        "logits in fp16": {"logits_dtype": torch.float16},
        "ends of another number of queries": {"cu_seq_len_k_end": ends[1][:5]},
    }
    _assert_refused(module.fp8_fp4_mqa_logits, device, right, calls)


def _assert_refused(function, device: str, right: dict[str, Any], calls: dict[str, dict[str, Any]]) -> None:
    function(**to_device(right, device))
    for what, changes in calls.items():
        try:
            function(**to_device({**right, **changes}, device))
        except Exception:  # of whatever kind
            continue
        raise AssertionError(f"{what}: expected to be refused")


def mqa_takes_any_size(module, device):
    """Any number of heads and any d; ranges that are reversed or reach beyond the keys."""
    for heads, d in ((1, 128), (3, 40), (128, 64)):
        _mqa(
            *(module, device),
            heads=heads,
            d=d,
            cu_seq_len_k_start=int32(0, 200, 5, -7, INT_MIN, 299),
            cu_seq_len_k_end=int32(INT_MAX, 100, 5, 9, 300, 1000),
        )


def mqa_never_reads_what_nobody_sees(module, device):
    """NaN in keys outside every range reaches no result."""
    k = _fp8(randn(S_KV, D, seed=1))
    k.view(torch.uint8)[170:250] = 0x7F
    for options in ({}, {"clean_logits": False, "max_seqlen_k": 200}):
        _mqa(
            *(module, device),
            k=k,
            cu_seq_len_k_start=int32(0, 0, 17, 250, 299, 40),
            cu_seq_len_k_end=int32(100, 1, 170, 300, 300, 40),
            **options,
        )


# A paged cache


def _paged(
    module: ModuleType,
    device: str,
    *,
    batch: int = 3,
    next_n: int = 2,
    heads: int = HEADS,
    d: int = D,
    page_size: int = PAGE_SIZE,
    fp4: bool = False,
    **changes: Any,
) -> Tensor:
    """Call it with inputs that ``changes`` replace, and compare with the definition."""
    pages = 4 * batch
    if fp4:
        q, q_scale, q_meant = _fp4(_uneven(batch, next_n, heads, d))
        cache = formats.pack_mxfp4_index_k(_uneven(pages, page_size, d, seed=1))
        cache.flatten(1)[:, page_size * d // 2 :].unflatten(1, (-1, 4))[..., d // 32 :] = 255  # a pad is NaN
    else:
        q, q_scale = _fp8(randn(batch, next_n, heads, d)), None
        q_meant = q.double()
        keys = randn(pages, page_size, d, seed=1) * randn(pages, page_size, 1, seed=2).exp()
        cache = formats.pack_index_k(keys, power_of_two=False)
    cache = changes.pop("cache", cache)
    table = permutation(pages).view(batch, 4)
    lengths = randint(1, 4 * page_size, (batch, next_n))
    arguments = {
        "q": (q, q_scale),
        "kv_cache": cache[:, :, None],
        "weights": randn(batch * next_n, heads, seed=3).float(),
        "context_lens": lengths,
        "block_table": table,
        "max_context_len": 4 * page_size,
        "clean_logits": False,
        **changes,
    }
    dtype = arguments.setdefault("logits_dtype", torch.float32)
    sent = to_device(arguments, device)
    hints = {"indices": sent["indices"]} if "indices" in sent else {}
    sent["schedule_meta"] = _metadata(module, sent["context_lens"], page_size, **hints)
    function = module.fp8_fp4_paged_mqa_logits
    if not fp4 and dtype == torch.float32:
        function, sent["q"] = module.fp8_paged_mqa_logits, sent["q"][0]
        del sent["logits_dtype"]
    logits = function(**sent)

    seen = arguments["context_lens"]
    if seen.dim() == 1:
        seen = seen[:, None] + torch.arange(1 - next_n, 1)
    width, table = arguments["max_context_len"], arguments["block_table"].long()
    meant = formats.unpack(cache, torch.float64).nan_to_num()
    exists = (table >= 0) & (table < pages)
    expected = []
    for b in range(batch):
        keys = meant[torch.where(exists[b], table[b], 0)].flatten(0, 1)
        ks, ke = torch.zeros(next_n).int(), seen[b].clamp(max=width).int()
        weights = arguments["weights"][b * next_n : (b + 1) * next_n].double()
        rows = reference.index_logits(q_meant[b], keys, weights, ks, ke)
        expected.append(rows.masked_fill(~exists[b].repeat_interleave(page_size), -INF))
    expected = torch.nn.functional.pad(torch.cat(expected), (0, width), value=-INF)[:, :width]
    _assert_logits(logits, expected, dtype, arguments["clean_logits"], expected > -INF)
    return logits


def _metadata(module: ModuleType, context_lens: Tensor, page_size: int, **hints: Tensor) -> Tensor:
    sizes = {"block_kv": page_size, "num_sms": module.get_num_sms()}
    return module.get_paged_mqa_logits_metadata(context_lens=context_lens, **sizes, **hints)


def paged_follows_the_block_table(module, device):
    """Each sequence through its pages; each of next_n queries with its own length and weights."""
    _paged(module, device)


def paged_is_max_context_len_wide(module, device):
    """Also where that ends within a page."""
    _paged(module, device, max_context_len=200, context_lens=int32(200, 1, 64, 65, 199, 8).view(3, 2))


def paged_rounds_logits_to_bf16(module, device):
    """``logits_dtype`` of bf16."""
    _paged(module, device, logits_dtype=torch.bfloat16)


def paged_reads_fp4(module, device):
    """The mxfp4 cache of 68 bytes per key, and queries in fp4."""
    _paged(module, device, fp4=True)


def paged_reads_fp4_of_64_values(module, device):
    """The mxfp4 cache of 36 bytes per key: 32 of values, and an int32 with two scales."""
    _paged(module, device, fp4=True, d=64)


def paged_takes_indices(module, device):
    """Which queries belong to one sequence: a hint for scheduling that changes no result."""
    lengths = int32(64, 30, 200).view(3, 1)
    _paged(module, device, next_n=1, indices=int32(0, 1, 1), context_lens=lengths)


def paged_metadata_has_its_shape(module, device):
    """int32 [num_sms + 1, 2], on the device of the lengths."""
    sms = module.get_num_sms()
    assert isinstance(sms, int) and sms >= 1, f"get_num_sms: expected a positive int, got {sms!r}"
    lengths = torch.ones(3, 2, dtype=torch.int32, device=device)
    metadata = _metadata(module, lengths, PAGE_SIZE)
    found = list(metadata.shape), metadata.dtype, metadata.device
    assert found == ([sms + 1, 2], torch.int32, lengths.device), f"metadata: got {found}"


def paged_refuses_what_contradicts_itself(module, device):
    """Tables, lengths and weights of other sizes than q's; fp8 queries with an fp4 cache."""
    q = _fp8(randn(3, 2, HEADS, D))
    cache = formats.pack_index_k(randn(12, PAGE_SIZE, D))[:, :, None]
    lengths = torch.full((3, 2), 9).int()
    right = {
        "q": (q, None),
        "kv_cache": cache,
        "weights": randn(6, HEADS).float(),
        "context_lens": lengths,
        "block_table": torch.zeros(3, 4).int(),
        "schedule_meta": _metadata(module, to_device(lengths, device), PAGE_SIZE),
        "max_context_len": 200,
    }
    calls = {
        "a block table of another batch": {"block_table": torch.zeros(2, 4).int()},
        "context_lens of another next_n": {"context_lens": torch.full((3, 1), 9).int()},
        "weights [batch, next_n, heads]": {"weights": randn(3, 2, HEADS).float()},
        "fp8 queries with an fp4 cache": {
            "kv_cache": formats.pack_mxfp4_index_k(randn(12, 64, D))[:, :, None]
        },
        "metadata of another shape": {"schedule_meta": torch.zeros(4).int()},
        "indices with next_n of 2": {"indices": int32(0, 1, 2)},
    }
    _assert_refused(module.fp8_fp4_paged_mqa_logits, device, right, calls)


def paged_takes_lengths_of_sequences(module, device):
    """``context_lens`` [batch]: query j of next_n sees length - next_n + j + 1 tokens."""
    for next_n in (1, 3):
        _paged(module, device, next_n=next_n, context_lens=int32(150, 64, 2), clean_logits=True)


def paged_cleans_what_a_query_does_not_see(module, device):
    """``clean_logits=True``: -inf from a query's length on, also beyond the block table."""
    _paged(module, device, clean_logits=True)
    _paged(module, device, clean_logits=True, max_context_len=300, context_lens=int32(150, 64, 0))
    _paged(module, device, clean_logits=True, logits_dtype=torch.bfloat16, max_context_len=300)


def paged_takes_any_size(module, device):
    """Any page size and number of heads; pages that do not exist hold nothing."""
    table = permutation(12).view(3, 4)
    table[0, 3], table[1, 1], table[2, 0] = INT_MAX, -1, 12
    for page_size, heads in ((1, 1), (5, 33), (256, 128)):
        _paged(
            *(module, device),
            page_size=page_size,
            heads=heads,
            block_table=table,
            clean_logits=True,
        )


def paged_never_reads_what_nobody_sees(module, device):
    """NaN in slots beyond the lengths and in unused pages reaches no result."""
    cache = formats.pack_index_k(randn(12, PAGE_SIZE, D, seed=1), power_of_two=False)
    table = permutation(12).view(3, 4)
    unseen = torch.ones(12, PAGE_SIZE, dtype=torch.bool)
    unseen[table[:, 0].long(), :40] = False
    keys, scales = formats.index_k_views(cache)
    keys.view(torch.uint8)[unseen] = 0xFF
    scales[unseen] = float("nan")
    _paged(module, device, cache=cache, context_lens=int32(40, 3, 7, 40, 1, 1).view(3, 2))


def results_repeat_bit_for_bit(module, device):
    """The same call gives the same bits."""
    for call in (_mqa, _paged):
        logits, again = (call(module, device, clean_logits=call is _mqa) for _ in range(2))
        seen = logits.isfinite()
        assert torch.equal(logits[seen], again[seen]), "logits: expected the same bits"


CHECKS = (
    mqa_sums_weighted_relus,
    mqa_cleans_what_a_query_does_not_see,
    mqa_may_leave_logits_undefined,
    mqa_compresses_rows,
    mqa_rounds_logits_to_bf16,
    mqa_takes_bf16_weights,
    mqa_reads_fp4,
    mqa_reads_fp4_of_64_values,
    mqa_refuses_what_contradicts_itself,
    paged_follows_the_block_table,
    paged_is_max_context_len_wide,
    paged_rounds_logits_to_bf16,
    paged_reads_fp4,
    paged_reads_fp4_of_64_values,
    paged_takes_indices,
    paged_metadata_has_its_shape,
    results_repeat_bit_for_bit,
    paged_refuses_what_contradicts_itself,
)
BEYOND = (
    mqa_takes_any_size,
    mqa_never_reads_what_nobody_sees,
    paged_takes_lengths_of_sequences,
    paged_cleans_what_a_query_does_not_see,
    paged_takes_any_size,
    paged_never_reads_what_nobody_sees,
)
