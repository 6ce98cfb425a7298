"""Byte layouts: each byte where the format says, values through pack and unpack, fp8 caches in use."""

import struct

import pytest
import torch

import sparse_attn
from sparse_attn import formats
from sparse_attn.testing import assert_close, index_inputs, mla_inputs, relative_error

FP8_BACKENDS = ["reference", "cpu"]  # the Triton kernels do not read fp8 caches


def test_v32_bytes_of_one_token_by_hand():
    kv = torch.zeros(1, 576)
    kv[0, 0], kv[0, 130], kv[0, 511], kv[0, 512], kv[0, 575] = 2.0, -448.0, 900.0, 1.5, -3.0
    packed = formats.pack_v32_kv(kv)
    raw = bytes(packed[0].tolist())
    tiny = 2.0**-22  # ceil of 1e-4 / 448
    assert struct.unpack("<4f", raw[512:528]) == (2.0**-7, 1.0, tiny, 4.0)
    assert raw[0] == 0x78  # 2 / 2 ** -7 = 256 = 2 ** 8: exponent 15, mantissa 0
    assert raw[130] == 0xFE  # -448, the largest magnitude
    assert raw[511] == 0x76  # 900 / 4 = 225, rounded to 224 = 1.75 * 2 ** 7
    assert struct.unpack("<2H", raw[528:530] + raw[654:656]) == (0x3FC0, 0xC040)  # bf16 of 1.5 and -3
    unpacked = formats.unpack_v32_kv(packed)
    assert unpacked[0, [0, 130, 511, 512, 575]].tolist() == [2.0, -448.0, 896.0, 1.5, -3.0]


def test_index_keys_of_a_page_lie_before_its_scales():
    k = torch.randn(3, 4, 128)
    packed = formats.pack_index_k(k, power_of_two=False)
    for page in range(3):
        raw = bytes(packed[page].flatten().tolist())
        scales = struct.unpack("<4f", raw[512:528])
        for token in range(4):
            amax = k[page, token].abs().max().item()
            assert scales[token] == pytest.approx(amax / 448, rel=1e-6)
            values = torch.tensor(list(raw[128 * token : 128 * token + 128]), dtype=torch.uint8)
            values = values.view(torch.float8_e4m3fn).float() * scales[token]
            assert torch.equal(values, formats.unpack_index_k(packed)[page, token])


@pytest.mark.parametrize("power_of_two", [True, False])
def test_round_trips_stay_within_fp8(power_of_two):
    kv, k = torch.randn(5, 7, 576) * 30, torch.randn(5, 7, 128)
    again = formats.unpack_v32_kv(formats.pack_v32_kv(kv, power_of_two=power_of_two))
    assert 1e-3 < relative_error(again[..., :512], kv[..., :512]) < 0.04
    assert torch.equal(again[..., 512:], kv[..., 512:].bfloat16().float())
    keys = formats.unpack_index_k(formats.pack_index_k(k, power_of_two=power_of_two))
    assert 1e-3 < relative_error(keys, k) < 0.04
    if power_of_two:  # what was rounded once is kept
        assert torch.equal(formats.unpack_v32_kv(formats.pack_v32_kv(again)), again)


def test_views_write_into_the_cache():
    cache = torch.zeros(2, 3, 656, dtype=torch.uint8)
    latent, scales, rope = formats.v32_kv_views(cache)
    scales[1, 2] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    rope[1, 2] = 5.0
    latent[1, 2] = torch.ones(512).to(torch.float8_e4m3fn)
    token = formats.unpack_v32_kv(cache[1, 2])
    assert token[[0, 128, 256, 384, 512]].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    with pytest.raises(ValueError, match=r"packed: expected uint8 \[..., 656\], got uint8 \[2, 3, 655\]"):
        formats.v32_kv_views(cache[..., :655])


@pytest.mark.parametrize("backend", FP8_BACKENDS)
@pytest.mark.parametrize("power_of_two", [True, False])
def test_attention_over_an_fp8_cache(backend, power_of_two):
    inputs = mla_inputs(3, 40, h_q=5, topk=16, d_qk=576, dtype=torch.bfloat16)
    used = ~inputs["kv"].isnan().any(-1)
    packed = formats.pack_v32_kv(inputs["kv"].nan_to_num(), power_of_two=power_of_two)
    packed[~used] = 0xFF  # NaN in every part
    out, lse = sparse_attn.sparse_mla(
        inputs["q"], packed.view(5, 8, 1, 656), inputs["indices"], return_lse=True, backend=backend
    )
    exact = formats.unpack_v32_kv(packed, torch.float64)
    expected, expected_lse = sparse_attn.sparse_mla(
        inputs["q"].double(), exact, inputs["indices"], return_lse=True, backend="reference"
    )
    assert_close(out, expected)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", FP8_BACKENDS)
def test_scores_of_fp8_index_keys(backend):
    inputs = index_inputs(4, 48, 8, 128, dtype=torch.bfloat16)
    inputs["ke"].clamp_(max=48)
    seen = ~inputs["k"].isnan().any(-1)
    pages = formats.pack_index_k(inputs.pop("k").nan_to_num().view(6, 8, 128))
    keys, _ = formats.index_k_views(pages)
    keys.view(torch.uint8)[~seen.view(6, 8)] = 0xFF  # NaN
    table = torch.tensor([[0, 1, 2, 3, 4, 5, -1]], dtype=torch.int32)
    options = {"block_table": table, "backend": backend}
    logits = sparse_attn.index_logits(**inputs, k=pages, **options)
    exact = formats.unpack_index_k(pages, torch.float64)
    wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    expected = sparse_attn.index_logits(**wide, k=exact, block_table=table, backend="reference")
    assert_close(logits, expected)
    indices = sparse_attn.lightning_topk(**inputs, k=pages, topk=5, **options)
    assert torch.equal(indices, sparse_attn.select_topk(logits, 5, inputs["ks"], inputs["ke"]))


def test_wrong_fp8_caches(monkeypatch):
    q, indices = torch.zeros(1, 2, 576, dtype=torch.bfloat16), torch.zeros(1, 3, dtype=torch.int32)
    cache = torch.zeros(4, 8, 656, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"kv: expected shape \[pages, page_size, 656\], got \[4, 8, 655\]"):
        sparse_attn.sparse_mla(q, cache[..., :655], indices)
    with pytest.raises(ValueError, match="q: expected d_qk=576 for a 656-byte cache, got 64"):
        sparse_attn.sparse_mla(q[..., :64], cache, indices, d_v=64)
    index = index_inputs(1, 8, 2, 128, dtype=torch.bfloat16)
    index["k"] = torch.zeros(1, 8, 132, dtype=torch.uint8)
    with pytest.raises(ValueError, match="block_table: expected with an fp8 cache of index keys, got None"):
        sparse_attn.index_logits(**index)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(TypeError, match="the triton backend does not read uint8 caches"):
        sparse_attn.sparse_mla(q, cache, indices, backend="triton")
