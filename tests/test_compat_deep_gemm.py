"""compat.deep_gemm beyond the conformance suite: same bits as the functions that it calls; its errors."""

import inspect

import pytest
import torch
from torch import zeros

from sparse_attn import formats, index_logits
from sparse_attn.compat import deep_gemm

FP8, INF = torch.float8_e4m3fn, float("inf")
PARAMETERS = {
    "fp8_mqa_logits": "q kv weights cu_seq_len_k_start cu_seq_len_k_end clean_logits max_seqlen_k",
    "fp8_fp4_mqa_logits": "q kv weights cu_seq_len_k_start cu_seq_len_k_end clean_logits max_seqlen_k "
    "logits_dtype",
    "fp8_paged_mqa_logits": "q kv_cache weights context_lens block_table schedule_meta max_context_len "
    "clean_logits indices",
    "fp8_fp4_paged_mqa_logits": "q kv_cache weights context_lens block_table schedule_meta max_context_len "
    "clean_logits logits_dtype indices",
    "get_paged_mqa_logits_metadata": "context_lens block_kv num_sms indices",
    "get_num_sms": "",
}


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture
def contiguous():
    """Keyword arguments of contiguous logits: 5 queries of 3 heads, 40 keys."""
    g = torch.Generator().manual_seed(0)
    return {
        "q": (torch.randn(5, 3, 64, generator=g).to(FP8), None),
        "kv": (torch.randn(40, 64, generator=g).to(FP8), torch.rand(40, generator=g)),
        "weights": torch.randn(5, 3, generator=g),
        "cu_seq_len_k_start": int32(0, 3, 30, 40, 9),
        "cu_seq_len_k_end": int32(40, 20, 40, 40, 8),
    }


@pytest.fixture
def paged():
    """Keyword arguments of paged logits: 3 sequences, 2 queries each, 3 heads, pages of 4."""
    g = torch.Generator().manual_seed(0)
    return {
        "q": (torch.randn(3, 2, 3, 128, generator=g).to(FP8), None),
        "kv_cache": formats.pack_index_k(torch.randn(9, 4, 128, generator=g))[:, :, None],
        "weights": torch.randn(6, 3, generator=g),
        "context_lens": int32(12, 5, 1),
        "block_table": torch.randperm(9, generator=g).view(3, 3).int(),
        "schedule_meta": deep_gemm.get_paged_mqa_logits_metadata(int32(12, 5, 1), 4, deep_gemm.get_num_sms()),
        "max_context_len": 12,
    }


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_have_their_names_and_order(name):
    assert list(inspect.signature(getattr(deep_gemm, name)).parameters) == PARAMETERS[name].split()


def test_contiguous_logits_have_the_bits_of_index_logits(contiguous):
    logits = deep_gemm.fp8_fp4_mqa_logits(**contiguous)
    (q, _), (k, scale), *rest = contiguous.values()
    assert torch.equal(logits, index_logits(q, k, *rest, k_scale=scale))
    assert torch.isneginf(logits[3:]).all()  # nothing is seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_made_a_few_at_a_time(contiguous, dtype, monkeypatch):
    options = {"clean_logits": False, "logits_dtype": dtype}
    for width in (40, 7, 60):
        whole = deep_gemm.fp8_fp4_mqa_logits(**contiguous, **options, max_seqlen_k=width)
        with monkeypatch.context() as patch:
            patch.setattr(deep_gemm, "WORKSPACE_BYTES", 2 * 4 * 40)
            parts = deep_gemm.fp8_fp4_mqa_logits(**contiguous, **options, max_seqlen_k=width)
        assert torch.equal(whole, parts)
        plain = deep_gemm.fp8_fp4_mqa_logits(**contiguous, logits_dtype=dtype)
        seen = min(17, width)
        assert torch.equal(whole[1, :seen], plain[1, 3 : 3 + seen])
        assert torch.isneginf(whole[:, 40:]).all()


def test_paged_logits_are_made_a_few_sequences_at_a_time(paged, monkeypatch):
    whole = deep_gemm.fp8_fp4_paged_mqa_logits(**paged, logits_dtype=torch.bfloat16)
    monkeypatch.setattr(deep_gemm, "WORKSPACE_BYTES", 1)
    parts = deep_gemm.fp8_fp4_paged_mqa_logits(**paged, logits_dtype=torch.bfloat16)
    assert torch.equal(whole, parts)
    assert torch.equal(whole, deep_gemm.fp8_fp4_paged_mqa_logits(**paged).bfloat16())


def test_paged_logits_have_the_bits_of_index_logits(paged):
    logits = deep_gemm.fp8_fp4_paged_mqa_logits(**paged)
    ends = int32(11, 12, 4, 5, 0, 1)
    inputs = paged["q"][0].flatten(0, 1), paged["kv_cache"][:, :, 0], paged["weights"], 0 * ends, ends
    assert torch.equal(logits, index_logits(*inputs, block_table=paged["block_table"]))


def test_no_keys_and_no_queries(contiguous, paged):
    empty = {**contiguous, "kv": (zeros(0, 64).to(FP8), zeros(0))}
    assert deep_gemm.fp8_fp4_mqa_logits(**empty).shape == (5, 0)
    shifted = deep_gemm.fp8_fp4_mqa_logits(**empty, clean_logits=False, max_seqlen_k=4)
    assert shifted.shape == (5, 4) and torch.isneginf(shifted).all()
    nobody = {
        "q": (zeros(0, 2, 3, 128).to(FP8), None),
        "weights": zeros(0, 3),
        "context_lens": zeros(0).int(),
        "block_table": zeros(0, 3).int(),
    }
    for dtype in (torch.float32, torch.bfloat16):
        logits = deep_gemm.fp8_fp4_paged_mqa_logits(**{**paged, **nobody}, logits_dtype=dtype)
        assert logits.shape == (0, 12) and logits.dtype == dtype
    assert deep_gemm.fp8_fp4_paged_mqa_logits(**{**paged, "max_context_len": 0}).shape == (6, 0)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("pad", [0, 127, 255])  # ue8m0 of a tiny number, of 1 (DeepGEMM's own) and NaN
def test_fp4_keys_and_queries_of_both_widths(d, pad):
    """The bits of index_logits, contiguous and paged; what lies above two scales has no effect."""
    weights, lengths, table = (
        torch.randn(4, 3),
        int32(8, 12, 3, 9).view(2, 2),
        int32(2, 0, 3, 1, 4, 0).view(2, 3),
    )
    cache = formats.pack_mxfp4_index_k(torch.randn(5, 4, d))
    keys, scales = cache.flatten(1).split([2 * d, 16], 1)  # of pages of 4 keys
    scales.unflatten(1, (4, 4))[..., d // 32 :] = pad
    values, stored = zeros(4, 3, d // 2).byte(), torch.full((4, 3, 4), pad, dtype=torch.uint8)
    q = torch.randn(4, 3, d)
    formats.quantise(q, values, stored[..., : d // 32], min_scale=formats.FP4_MIN_SCALE)
    q_scale = stored.view(torch.int32)[..., 0]

    inputs = values, cache, weights, int32(0, 0, 0, 0), lengths.flatten()
    expected = index_logits(*inputs, q_scale=q_scale, block_table=table)
    assert expected[0, :8].isfinite().all() and expected[0, :8].any()
    where = lengths, table, deep_gemm.get_paged_mqa_logits_metadata(lengths, 4, deep_gemm.get_num_sms()), 12
    pair = values.view(2, 2, 3, d // 2), q_scale.view(2, 2, 3)
    logits = deep_gemm.fp8_fp4_paged_mqa_logits(pair, cache[:, :, None], weights, *where, clean_logits=True)
    assert torch.equal(logits, expected)

    page = keys[2].view(4, d // 2), scales[2].view(4, 4).clone().view(torch.int32)[:, 0]
    ends = torch.full((4,), 4).int()
    logits = deep_gemm.fp8_fp4_mqa_logits((values.char(), q_scale), page, weights, 0 * ends, ends)
    assert torch.equal(logits[0], expected[0, :4])


@pytest.mark.parametrize("d", [32, 64])
def test_paged_keys_of_another_width(d):
    """68 bytes per key are 64 fp8 values here, although an fp4 cache also has 68 bytes per key."""
    keys, scales = torch.randn(2, 4, d).to(FP8), torch.rand(2, 4)
    parts = [part.view(torch.uint8).flatten(1) for part in (keys, scales)]
    cache = torch.cat(parts, 1).view(2, 4, 1, d + 4)
    q, weights, lengths = torch.randn(1, 2, 3, d).to(FP8), torch.randn(2, 3), int32(5, 8)[None]
    where = lengths, int32(1, 0)[None], zeros(2, 2).int(), 8
    logits = deep_gemm.fp8_paged_mqa_logits(q, cache, weights, *where)
    contiguous = keys.flip(0).flatten(0, 1), scales.flip(0).flatten()
    expected = deep_gemm.fp8_mqa_logits(q[0], contiguous, weights, 0 * lengths[0], lengths[0])
    torch.testing.assert_close(logits, expected)


def test_pages_may_have_any_distance(paged):
    logits = deep_gemm.fp8_fp4_paged_mqa_logits(**paged)
    apart = torch.full((9, 700), 0xFF, dtype=torch.uint8)
    view = apart[:, 4 : 4 + 4 * 132].view(9, 4, 1, 132)
    view.copy_(paged["kv_cache"])
    assert torch.equal(deep_gemm.fp8_fp4_paged_mqa_logits(**{**paged, "kv_cache": view}), logits)
    odd = zeros(9, 4 * 132 + 1, dtype=torch.uint8)[:, : 4 * 132].view(9, 4, 1, 132)
    message = "kv_cache: expected pages of adjoining bytes at multiples of 4 bytes"
    with pytest.raises(ValueError, match=message):
        deep_gemm.fp8_fp4_paged_mqa_logits(**{**paged, "kv_cache": odd})


CONTIGUOUS_ERRORS = [
    ({"q": zeros(5, 3, 64).to(FP8)}, TypeError, r"q: expected the pair \(values, scales\), got Tensor"),
    ({"q": (zeros(5, 3, 64), None)}, TypeError, "q: expected dtype float8_e4m3fn, got float32"),
    ({"q": (zeros(5, 3, 64).char(), zeros(5, 3))}, TypeError, r"q\[1\]: expected dtype int32"),
    ({"q": (zeros(5, 3, 32).char(), zeros(5, 3).int())}, ValueError, r"kv\[0\]: expected shape .*d/2=32\]"),
    ({"kv": (zeros(40, 32).to(FP8), zeros(40))}, ValueError, r"kv\[0\]: expected shape \[s_kv, d=64\]"),
    ({"kv": (zeros(40, 64).to(FP8), zeros(4, 10))}, ValueError, r"kv\[1\]: expected shape \[s_kv=40\]"),
    ({"weights": zeros(5, 4)}, ValueError, r"weights: expected shape \[s_q=5, heads=3\]"),
    ({"weights": zeros(5, 3).bfloat16()}, TypeError, "weights: expected dtype float32, got bfloat16"),
    ({"cu_seq_len_k_start": int32(0)}, ValueError, r"cu_seq_len_k_start: expected shape \[s_q=5\]"),
    ({"cu_seq_len_k_end": zeros(5).long()}, TypeError, "cu_seq_len_k_end: expected dtype int32"),
    ({"max_seqlen_k": 9}, ValueError, "clean_logits: expected False with max_seqlen_k"),
    ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k: expected an int of at least 0, got -1"),
    ({"logits_dtype": torch.float16}, TypeError, "logits_dtype: expected float32 or bfloat16"),
]


@pytest.mark.parametrize("changes, error, message", CONTIGUOUS_ERRORS)
def test_what_is_wrong_is_named(contiguous, changes, error, message):
    with pytest.raises(error, match=message):
        deep_gemm.fp8_fp4_mqa_logits(**{**contiguous, **changes})


PAGED_ERRORS = [
    ({"kv_cache": zeros(9, 4, 132).byte()}, ValueError, r"kv_cache: expected shape .* 1, 132\]"),
    ({"weights": zeros(3, 2, 3)}, ValueError, r"weights: expected shape \[tokens=6, heads=3\]"),
    ({"context_lens": int32(1, 2)}, ValueError, r"context_lens: expected shape \[batch=3\]"),
    ({"context_lens": zeros(3, 1).int()}, ValueError, r"context_lens: expected shape \[batch=3, next_n=2\]"),
    ({"block_table": zeros(2, 3).int()}, ValueError, r"block_table: expected shape \[batch=3, max_pages\]"),
    ({"schedule_meta": zeros(3).int()}, ValueError, r"schedule_meta: expected shape \[num_sms\+1, 2\]"),
    ({"max_context_len": 2.5}, ValueError, "max_context_len: expected an int of at least 0, got 2.5"),
    ({"indices": int32(0, 1, 2)}, ValueError, "indices: expected None with next_n=2"),
]


@pytest.mark.parametrize("changes, error, message", PAGED_ERRORS)
def test_what_is_wrong_with_pages_is_named(paged, changes, error, message):
    with pytest.raises(error, match=message):
        deep_gemm.fp8_fp4_paged_mqa_logits(**{**paged, **changes})


def test_metadata():
    metadata = deep_gemm.get_paged_mqa_logits_metadata(int32(5, 6), 64, 3, indices=int32(0, 0))
    assert metadata.shape == (4, 2) and metadata.dtype == torch.int32
    for arguments, message in {
        (int32(5), 0, 3): "block_kv: expected an int of at least 1",
        (int32(5), 64, 0): "num_sms: expected an int of at least 1",
    }.items():
        with pytest.raises(ValueError, match=message):
            deep_gemm.get_paged_mqa_logits_metadata(*arguments)
    assert deep_gemm.get_num_sms() >= 1
