"""compat.flash_mla beyond the conformance suite: same bits as the functions that it calls; its errors."""

import functools
import inspect
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import zeros

from sparse_attn import formats, sparse_mla
from sparse_attn.compat import flash_mla
from sparse_attn.testing import INT_MAX, INT_MIN

PARAMETERS = {
    "flash_mla_sparse_fwd": "q kv indices sm_scale d_v attn_sink topk_length * "
    "out use_legacy return_log2_lse",
    "flash_mla_with_kvcache": "q k_cache block_table cache_seqlens head_dim_v tile_scheduler_metadata "
    "num_splits softmax_scale causal is_fp8_kvcache indices attn_sink extra_k_cache "
    "extra_indices_in_kvcache topk_length extra_topk_length * enable_batch_invariant kv_format use_legacy "
    "descale_q descale_k out",
    "get_mla_metadata": "args kwargs",
}


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture
def decode():
    """Keyword arguments of a sparse decode that is right: 2 sequences, 2 queries each, 4 heads."""
    g = torch.Generator().manual_seed(0)
    return {
        "q": torch.randn(2, 2, 4, 576, generator=g).bfloat16(),
        "k_cache": formats.pack_v32_kv(torch.randn(3, 8, 1, 576, generator=g)),
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": 512,
        "tile_scheduler_metadata": flash_mla.get_mla_metadata()[0],
        "is_fp8_kvcache": True,
        "indices": torch.randint(-2, 26, (2, 2, 9), generator=g).int(),
    }


@pytest.fixture
def dense():
    """Keyword arguments of a dense decode that is right; the last page of each table row is garbage."""
    g = torch.Generator().manual_seed(0)
    pages = torch.randperm(6, generator=g).view(3, 2).int()
    return {
        "q": torch.randn(3, 2, 4, 40, generator=g),
        "k_cache": torch.randn(7, 5, 1, 40, generator=g),
        "block_table": torch.cat([pages, int32(INT_MAX, INT_MIN, 7)[:, None]], 1),
        "cache_seqlens": int32(10, 3, 1),
        "head_dim_v": 32,
        "tile_scheduler_metadata": flash_mla.FlashMLASchedMeta(),
        "causal": True,
    }


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_have_their_names_and_order(name):
    parameters = inspect.signature(getattr(flash_mla, name)).parameters.values()
    keyword_only = {p.name for p in parameters if p.kind == p.KEYWORD_ONLY}
    positional, _, others = PARAMETERS[name].partition(" * ")
    assert [p.name for p in parameters] == [*positional.split(), *others.split()]
    assert keyword_only == set(others.split())


def test_nothing_of_theirs_is_imported_or_replaced(monkeypatch):
    assert "flash_mla" not in sys.modules and "deep_gemm" not in sys.modules
    monkeypatch.setitem(sys.modules, "flash_mla", flash_mla)  # as compat/__init__.py tells users to
    from flash_mla import FlashMLASchedMeta, flash_mla_with_kvcache

    assert flash_mla_with_kvcache is flash_mla.flash_mla_with_kvcache
    assert FlashMLASchedMeta is flash_mla.FlashMLASchedMeta


def test_prefill_gives_the_bits_of_sparse_mla():
    q, kv = torch.randn(3, 5, 40), torch.randn(20, 1, 40)
    indices, sink = torch.randint(-1, 21, (3, 1, 6)).int(), torch.randn(5)
    options = {"d_v": 32, "attn_sink": sink, "topk_length": int32(6, 2, 0)}
    out, max_logits, lse = flash_mla.flash_mla_sparse_fwd(q, kv, indices, 0.3, **options)
    returns = {"return_lse": True, "return_max_logits": True}
    plain = sparse_mla(q, kv[:, 0], indices[:, 0], softmax_scale=0.3, **options, **returns)
    assert torch.equal(out, plain[0]) and torch.equal(max_logits, plain[2])
    assert torch.equal(lse[:2], plain[1][:2]) and torch.isposinf(lse[2]).all()


def test_prefill_in_base_2_and_without_statistics():
    q, kv, indices = torch.randn(3, 5, 40), torch.randn(20, 1, 40), torch.randint(0, 20, (3, 1, 6)).int()
    indices[1] = -1
    call = functools.partial(flash_mla.flash_mla_sparse_fwd, q, kv, indices, 0.3, 32)
    out, max_logits, lse = call()
    for use_legacy in (None, False, True):
        again, *natural = call(use_legacy=use_legacy)
        assert torch.equal(again, out) and torch.equal(natural[1], lse)
        again, max_2, lse_2 = call(use_legacy=use_legacy, return_log2_lse=True)
        assert torch.equal(again, out) and torch.isposinf(lse_2[1]).all() and torch.isneginf(max_2[1]).all()
        torch.testing.assert_close(lse_2[::2].exp2(), lse[::2].exp())
        torch.testing.assert_close(max_2[::2].exp2(), max_logits[::2].exp())
        again, *nothing = call(use_legacy=use_legacy, return_log2_lse=False)
        assert torch.equal(again, out) and nothing == [None, None]
    with pytest.raises(TypeError, match="return_log2_lse: expected a bool, got int"):
        call(return_log2_lse=2)
    with pytest.raises(TypeError, match="use_legacy: expected a bool, got str"):
        call(use_legacy="yes")
    with pytest.raises(TypeError, match="positional"):  # an out of vLLM's fork, a use_legacy of SGLang's
        call(None, None, torch.empty(3, 5, 32))


def test_the_callers_out_is_filled(decode, dense):
    """Of every dtype, and with gaps; nothing beside it is written."""
    for dtype in (torch.bfloat16, torch.float64):
        q, kv = torch.randn(3, 5, 40).to(dtype), torch.randn(20, 1, 40).to(dtype)
        inputs = q, kv, torch.randint(0, 20, (3, 1, 6)).int(), 0.3, 32
        buffer = torch.full((3, 5, 40), 7.0, dtype=dtype)
        out, max_logits, lse = flash_mla.flash_mla_sparse_fwd(*inputs, out=buffer[..., :32])
        right = flash_mla.flash_mla_sparse_fwd(*inputs)
        assert all(torch.equal(*pair) for pair in zip((out, max_logits, lse), right, strict=True))
        assert out.data_ptr() == buffer.data_ptr() and (buffer[..., 32:] == 7).all()
    for arguments, d_v in ((decode, 512), (dense, 32)):
        dense["causal"] = arguments is dense
        (right, right_lse), shape = flash_mla.flash_mla_with_kvcache(**arguments), arguments["q"].shape
        buffer = torch.full((*shape[:2], shape[2] + 1, d_v), 7.0, dtype=arguments["q"].dtype)
        out, lse = flash_mla.flash_mla_with_kvcache(**arguments, out=buffer[:, :, 1:])
        assert out.data_ptr() == buffer[:, :, 1:].data_ptr() and (buffer[:, :, 0] == 7).all()
        assert torch.equal(out, right) and torch.equal(lse, right_lse)


def test_the_dtype_of_a_cache_tells_whether_it_is_quantised(decode, dense):
    """As FlashMLA's releases call it: False was the default until 30 September 2026, True since."""
    del decode["is_fp8_kvcache"]
    out, _ = flash_mla.flash_mla_with_kvcache(**decode)
    assert torch.equal(out, flash_mla.flash_mla_with_kvcache(**decode, is_fp8_kvcache=True)[0])
    right = flash_mla.flash_mla_with_kvcache(**dense)[0]
    assert torch.equal(right, flash_mla.flash_mla_with_kvcache(**dense, is_fp8_kvcache=False)[0])


@pytest.mark.parametrize("use_legacy", [None, True])
@pytest.mark.parametrize("kv_format", [None, "V32"])
def test_a_format_that_bytes_tell_may_be_named(decode, kv_format, use_legacy):
    right = flash_mla.flash_mla_with_kvcache(**decode)
    named = flash_mla.flash_mla_with_kvcache(**decode, kv_format=kv_format, use_legacy=use_legacy)
    assert all(torch.equal(*pair) for pair in zip(right, named, strict=True))


NAMES = [  # kv_format, use_legacy, bytes per token of both caches: what sparse_mla is told
    (None, None, (656, 528), ("v32", "v41")),
    (None, False, (528, 288), ("v41", "v41_fp4")),
    (None, True, (528, 288), ("v41_by_page", "v41_fp4_by_page")),
    (None, True, (584, 584), ("v4", "v4")),
    ("V41", None, (528, 288), ("v41_by_page", "v41_fp4_by_page")),
    ("V32_NO_ROPE", True, (528, None), ("nope", None)),
    (None, None, (100, None), (None, None)),  # sparse_mla says what it reads
]


@pytest.mark.parametrize("kv_format, use_legacy, sizes, names", NAMES)
def test_what_the_formats_are_called(kv_format, use_legacy, sizes, names):
    caches = [None if size is None else zeros(3, 8, 1, size).byte() for size in sizes]
    assert flash_mla._layouts(kv_format, use_legacy, *caches) == names


def test_decode_gives_the_bits_of_sparse_mla(decode):
    out, lse = flash_mla.flash_mla_with_kvcache(**decode, topk_length=int32(9, 4))
    rows = decode["q"].flatten(0, 1), decode["k_cache"], decode["indices"].flatten(0, 1)
    plain, plain_lse = sparse_mla(*rows, topk_length=int32(9, 9, 4, 4), return_lse=True)
    assert out.shape == (2, 2, 4, 512) and torch.equal(out.flatten(0, 1), plain)
    assert lse.shape == (2, 4, 2) and torch.equal(lse.transpose(1, 2).flatten(0, 1), plain_lse)


def test_dense_decode_in_parts_gives_the_same_bits(dense, monkeypatch):
    whole = flash_mla.flash_mla_with_kvcache(**dense)
    held = []

    def counted(indices, table, page_size):
        held.append(len(indices))
        return physical_slots(indices, table, page_size)

    physical_slots = flash_mla.physical_slots
    monkeypatch.setattr(flash_mla, "physical_slots", counted)
    monkeypatch.setattr(flash_mla, "DENSE_INDEX_BYTES", 2 * 4 * 2 * 15)  # enough for two sequences
    parts = flash_mla.flash_mla_with_kvcache(**dense)
    assert held == [2, 1]
    assert all(torch.equal(*pair) for pair in zip(whole, parts, strict=True))


def test_dense_decode_of_hostile_lengths(dense):
    """A length of 0, a negative one, one beyond the table: the query attends to the tokens that exist."""
    with pytest.raises(ValueError, match="head_dim_v: expected an int of at least 1, got -1"):
        flash_mla.flash_mla_with_kvcache(**{**dense, "head_dim_v": -1})
    dense["causal"] = False
    out, lse = flash_mla.flash_mla_with_kvcache(**{**dense, "cache_seqlens": int32(0, INT_MAX, -5)})
    assert not out[[0, 2]].any() and torch.isposinf(lse[[0, 2]]).all()
    everything, all_lse = flash_mla.flash_mla_with_kvcache(**{**dense, "cache_seqlens": int32(0, 10, 0)})
    assert torch.equal(out[1], everything[1]) and torch.equal(lse[1], all_lse[1])


def test_no_sequences():
    inputs = zeros(0, 2, 4, 40), torch.randn(2, 4, 1, 40), zeros(0, 2).int(), zeros(0).int()
    out, lse = flash_mla.flash_mla_with_kvcache(*inputs, 32, flash_mla.FlashMLASchedMeta())
    assert out.shape == (0, 2, 4, 32) and lse.shape == (0, 4, 2)


def test_metadata_belongs_to_one_configuration(decode):
    with pytest.raises(ValueError, match="causal"):
        flash_mla.flash_mla_with_kvcache(**{**decode, "causal": True})
    flash_mla.flash_mla_with_kvcache(**decode)  # the refused call changed nothing
    flash_mla.flash_mla_with_kvcache(**decode, topk_length=int32(1, 2))  # lengths are no part of it
    with pytest.raises(ValueError, match=r"tile_scheduler_metadata: expected calls of one configuration"):
        flash_mla.flash_mla_with_kvcache(**{**decode, "indices": decode["indices"][..., :5]})
    with pytest.raises(ValueError, match=r"tile_scheduler_metadata: expected calls of one configuration"):
        flash_mla.flash_mla_with_kvcache(**decode, enable_batch_invariant=True)
    assert flash_mla.get_mla_metadata(int32(1), 2, 1, num_heads_q=64, topk=2048)[1] is None


ERRORS = [
    ({"q": zeros(4, 4, 576)}, ValueError, r"q: expected shape \[batch, s_q, h_q, d_qk\]"),
    ({"k_cache": zeros(3, 8, 2, 656).byte()}, ValueError, r"k_cache: expected shape .* got \[3, 8, 2, 656\]"),
    ({"k_cache": zeros(3, 8, 1, 576)}, TypeError, "k_cache: expected dtype uint8 or int8 or float8_e4m3fn"),
    ({"is_fp8_kvcache": False}, ValueError, r"k_cache: expected shape \[pages, page_size, 1, d_qk=576\]"),
    ({"indices": zeros(2, 9).int()}, ValueError, r"indices: expected shape \[batch=2, s_q=2, topk\]"),
    ({"indices": zeros(2, 2, 9)}, TypeError, "indices: expected dtype int32"),
    ({"topk_length": int32(1, 2, 3, 4)}, ValueError, r"topk_length: expected shape \[batch=2\]"),
    ({"num_splits": int32(1)}, ValueError, "num_splits: expected None"),
    ({"descale_q": torch.ones(2)}, ValueError, "descale_q: expected None, got Tensor"),
    ({"descale_k": torch.ones(2)}, ValueError, "descale_k: expected None, got Tensor"),
    ({"enable_batch_invariant": "V41"}, TypeError, "enable_batch_invariant: expected a bool, got str"),
    ({"use_legacy": 1}, TypeError, "use_legacy: expected a bool, got int"),
    ({"kv_format": "v32"}, ValueError, "kv_format: expected one of None, 'V32', .*'V41', got 'v32'"),
    ({"kv_format": "V4"}, ValueError, r"kv_format: 'V4' means caches of 584 bytes.* uint8 \[3, 8, 1, 656\]"),
    ({"kv_format": "V41"}, ValueError, "kv_format: 'V41' means caches of 528 or 288 bytes"),
    ({"kv_format": "V32", "use_legacy": False}, ValueError, "kv_format: expected None with use_legacy=False"),
    ({"out": zeros(2, 4, 512)}, ValueError, r"out: expected shape \[batch=2, s_q=2, h_q=4, head_dim_v=512\]"),
    ({"out": zeros(2, 2, 4, 512)}, TypeError, "out: expected dtype bfloat16, got float32"),
    ({"out": zeros(2, 3, 4, 512).bfloat16()[:, :2]}, ValueError, "out: expected all queries at one distance"),
    ({"tile_scheduler_metadata": None}, TypeError, "tile_scheduler_metadata: expected what get_mla_metadata"),
    ({"causal": True}, ValueError, "causal: expected False with indices"),
    ({"indices": None}, TypeError, "block_table: expected a tensor"),
    ({"indices": None, "attn_sink": zeros(4)}, ValueError, "attn_sink: expected None without indices"),
    ({"extra_topk_length": int32(1, 1)}, ValueError, "extra_topk_length: expected None"),
    ({"head_dim_v": 128}, ValueError, "d_v: expected 512"),
]


@pytest.mark.parametrize("changes, error, message", ERRORS)
def test_what_is_wrong_is_named(decode, changes, error, message):
    with pytest.raises(error, match=message):
        flash_mla.flash_mla_with_kvcache(**{**decode, **changes})


def test_prefill_wants_one_kv_head():
    q, kv, indices = zeros(3, 4, 40), zeros(20, 2, 40), zeros(3, 1, 6).int()
    with pytest.raises(ValueError, match=r"kv: expected shape \[s_kv, 1, d_qk=40\], got \[20, 2, 40\]"):
        flash_mla.flash_mla_sparse_fwd(q, kv, indices, 0.1)
    with pytest.raises(ValueError, match=r"indices: expected shape \[s_q=3, 1, topk\], got \[3, 6\]"):
        flash_mla.flash_mla_sparse_fwd(q, kv[:, :1], indices[:, 0], 0.1)


def test_the_benchmark_compares_equals():
    script = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "compat.py"))
    for name, functions in script["cases"]():
        results = [function() for function in functions.values()]
        assert all(torch.equal(results[0], other) for other in results), name
