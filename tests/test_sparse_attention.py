"""sparse_mla, sparse_gqa and merge_attention: all edge cases, on every backend."""

import pytest
import torch
import torch.nn.functional as F

import sparse_attn
from sparse_attn import reference
from sparse_attn.ops import attention
from sparse_attn.testing import (
    INT_MAX,
    INT_MIN,
    assert_close,
    gqa_inputs,
    mla_inputs,
    poison_unused,
    selection_indices,
)

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
INF = float("inf")
# Implementations that round probabilities to the input dtype, as flash attention does, may err more.
FACTOR = {"reference": 1.2, "cpu": 1.2, "triton": 2.5}


def run(function, backend, inputs, **options):
    """All that the function returns and the same of the fp64 reference, on the CPU."""
    name = function.__name__
    returns = {"return_lse": True} | ({"return_max_logits": True} if name == "sparse_mla" else {})
    actual = function(**inputs, **options, **returns, backend=backend)
    wide = {**inputs, **options}
    for key, value in wide.items():
        if isinstance(value, torch.Tensor):
            value = value.cpu()
            wide[key] = value.double() if value.is_floating_point() and key != "attn_sink" else value
    expected = getattr(sparse_attn, name)(**wide, **returns, backend="reference")
    return [t.cpu() for t in actual], expected


def check(backend, actual, expected):
    (out, *logits), (expected_out, *expected_logits) = actual, expected
    assert_close(out, expected_out, FACTOR[backend])
    assert {tensor.dtype for tensor in logits} == {torch.float32}  # lse, max_logits
    tolerance = 1e-5 if backend != "triton" else 1e-4
    logits = [tensor.double() for tensor in logits]
    torch.testing.assert_close(logits, expected_logits, rtol=tolerance, atol=tolerance)


def mla(backend, inputs, d_v=32, **options):
    check(backend, *run(sparse_attn.sparse_mla, backend, inputs, d_v=d_v, **options))


def gqa(backend, inputs, **options):
    check(backend, *run(sparse_attn.sparse_gqa, backend, inputs, **options))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "s_q, s_kv, h_q, topk, d_qk, d_v",
    [(3, 50, 4, 16, 40, 32), (1, 7, 1, 1, 24, 24), (2, 90, 17, 33, 72, 64), (2, 200, 16, 70, 576, 512)],
)
def test_mla_matches_fp64(backend, device, dtype, s_q, s_kv, h_q, topk, d_qk, d_v):
    mla(backend, mla_inputs(s_q, s_kv, h_q, topk, d_qk, dtype=dtype, device=device), d_v=d_v)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(
    "h_q, h_kv, topk, d, d_v",
    [(4, 2, 16, 32, 32), (3, 3, 5, 24, 40), (9, 3, 33, 64, 64), (8, 1, 20, 128, 128)],
)
def test_gqa_matches_fp64(backend, device, dtype, per_head, h_q, h_kv, topk, d, d_v):
    gqa(backend, gqa_inputs(3, 60, h_q, h_kv, topk, d, d_v, per_head=per_head, dtype=dtype, device=device))


def test_mla_of_a_definition_by_hand(backend, device):
    q = torch.tensor([[[1.0, 0.0, 1.0]]], device=device)
    kv = torch.tensor([[2.0, 5.0, 0.0], [0.0, 1.0, 0.0], [9.0, 9.0, 9.0]], device=device)
    indices = torch.tensor([[1, 0]], dtype=torch.int32, device=device)
    options = {"softmax_scale": 0.5, "return_lse": True, "backend": backend}
    out, lse = sparse_attn.sparse_mla(q, kv, indices, d_v=2, **options)
    p = torch.tensor([1.0, 0.0]).softmax(0)  # scores 2 * 0.5 and 0
    expected = p[0] * torch.tensor([2.0, 5.0]) + p[1] * torch.tensor([0.0, 1.0])
    torch.testing.assert_close(out[0, 0].cpu(), expected)
    assert lse.item() == pytest.approx(torch.tensor([1.0, 0.0]).logsumexp(0).item(), rel=1e-6)


def test_a_query_without_tokens_is_zero_with_lse_minus_inf(backend, device):
    inputs = mla_inputs(3, 20, device=device)
    inputs["indices"].copy_(torch.tensor([-1, 20, INT_MIN, INT_MAX]).repeat(4))
    inputs["kv"].fill_(float("nan"))
    for sink in (None, torch.tensor([-INF, INF, 0.0, 5.0], device=device)):
        out, lse = sparse_attn.sparse_mla(**inputs, d_v=32, attn_sink=sink, return_lse=True, backend=backend)
        assert (out == 0).all() and torch.isneginf(lse).all()


def test_invalid_indices_are_ignored_wherever_they_stand(backend, device):
    inputs = mla_inputs(1, 30, topk=6, device=device)
    inputs["kv"].nan_to_num_()
    valid = torch.tensor([[4, 7, 2]], dtype=torch.int32, device=device)
    mixed = torch.tensor([[INT_MAX, 4, -1, 7, 30, 2]], dtype=torch.int32, device=device)
    clean = sparse_attn.sparse_mla(inputs["q"], inputs["kv"], valid, d_v=32, backend=backend)
    noisy = sparse_attn.sparse_mla(inputs["q"], inputs["kv"], mixed, d_v=32, backend=backend)
    torch.testing.assert_close(clean, noisy, rtol=1e-6, atol=1e-6)


def test_a_duplicate_counts_twice(backend, device):
    inputs = mla_inputs(1, 30, topk=3, device=device)
    inputs["kv"].nan_to_num_()
    inputs["indices"] = torch.tensor([[4, 4, 9]], dtype=torch.int32, device=device)
    mla(backend, inputs)


@pytest.mark.parametrize("lengths", [[0, 1, 16], [99, -4, 5]])
def test_topk_length_cuts_the_row(backend, device, lengths):
    length = torch.tensor(lengths, dtype=torch.int32, device=device)
    inputs = mla_inputs(3, 50, device=device)
    cut = inputs["indices"].clone()
    cut[torch.arange(16, device=device) >= length[:, None]] = -1
    inputs["kv"] = poison_unused(inputs["kv"].nan_to_num(), cut)
    mla(backend, inputs, topk_length=length)
    gqa(backend, gqa_inputs(3, 50, device=device, per_head=True), topk_length=length)


def test_sinks_enter_the_denominator_only(backend, device):
    sink = torch.tensor([0.5, -INF, INF, 30.0], device=device)
    inputs, options = mla_inputs(3, 50, device=device), {"return_lse": True, "backend": backend}
    mla(backend, inputs, attn_sink=sink)
    gqa(backend, gqa_inputs(3, 50, device=device), attn_sink=sink)
    plain, lse = sparse_attn.sparse_mla(**inputs, d_v=32, **options)
    with_sink, same_lse = sparse_attn.sparse_mla(**inputs, d_v=32, attn_sink=sink, **options)
    assert torch.equal(lse, same_lse)
    assert torch.equal(with_sink[:, 1], plain[:, 1])  # -inf is no sink
    assert (with_sink[:, 2] == 0).all()  # +inf takes everything
    kept = lse[:, 0].exp() / (lse[:, 0].exp() + sink[0].exp())
    torch.testing.assert_close(with_sink[:, 0], plain[:, 0] * kept[:, None])


def test_two_segments_share_one_softmax(backend, device):
    first, second = mla_inputs(4, 50, device=device, seed=1), mla_inputs(4, 30, topk=9, device=device, seed=2)
    length = torch.tensor([9, 0, 4, 2], dtype=torch.int32, device=device)
    extra = {"extra_kv": second["kv"], "extra_indices": second["indices"], "extra_topk_length": length}
    mla(backend, first, **extra)
    mla(backend, first, **extra, attn_sink=torch.randn(4, device=device))
    cut = second["indices"].clone()
    cut[torch.arange(9, device=device) >= length[:, None]] = -1
    indices = first["indices"].where((first["indices"] >= 0) & (first["indices"] < 50), -1)
    indices = torch.cat([indices, torch.where((cut >= 0) & (cut < 30), cut + 50, -1)], 1)
    joined = {"q": first["q"], "kv": torch.cat([first["kv"], second["kv"]]), "indices": indices}
    options = {"d_v": 32, "return_lse": True, "backend": backend}
    one = sparse_attn.sparse_mla(**joined, **options)
    torch.testing.assert_close(sparse_attn.sparse_mla(**first, **extra, **options), one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("s_q, s_kv, topk", [(0, 9, 4), (2, 0, 4), (2, 9, 0)])
def test_nothing_to_attend_to(backend, device, s_q, s_kv, topk):
    mla(backend, mla_inputs(s_q, s_kv, topk=topk, device=device))
    gqa(backend, gqa_inputs(s_q, s_kv, topk=topk, device=device))


def test_strided_inputs_and_outputs(backend, device):
    inputs = mla_inputs(3, 40, h_q=4, device=device)
    wide = {**inputs, "q": inputs["q"].double(), "kv": inputs["kv"].double()}
    expected = reference.sparse_mla(**wide, d_v=32, softmax_scale=40**-0.5)
    for name in ("q", "kv"):
        spread = torch.full((*inputs[name].shape[:-1], 2 * 40 + 3), float("nan"), device=device)
        spread[..., 1:81:2] = inputs[name]
        inputs[name] = spread[..., 1:81:2]
    inputs["indices"] = inputs["indices"].T.contiguous().T
    out = torch.full((32, 4, 3), float("nan"), device=device).permute(2, 1, 0)
    lse, max_logits = (torch.full((4, 3), float("nan"), device=device).T for _ in range(2))
    returns = {"return_lse": True, "return_max_logits": True, "out": (out, lse, max_logits)}
    result = sparse_attn.sparse_mla(**inputs, d_v=32, **returns, backend=backend)
    assert all(tensor is given for tensor, given in zip(result, returns["out"], strict=True))
    assert_close(out.cpu(), expected[0].cpu(), FACTOR[backend])
    torch.testing.assert_close((lse.double(), max_logits.double()), expected[1:], rtol=1e-4, atol=1e-4)


def test_what_is_returned_is_what_was_asked_for(backend, device):
    inputs = {**mla_inputs(3, 40, device=device), "d_v": 32, "backend": backend}
    everything = sparse_attn.sparse_mla(**inputs, return_lse=True, return_max_logits=True)
    out = sparse_attn.sparse_mla(**inputs)
    highest = torch.full((3, 8), float("nan"), device=device)[:, 4:]  # another row stride than lse's
    pair = sparse_attn.sparse_mla(**inputs, return_max_logits=True, out=(out, highest))
    assert pair[0] is out and pair[1] is highest
    assert torch.equal(out, everything[0]) and torch.equal(highest, everything[2])
    assert torch.isneginf(highest[-1]).all()  # of a query without a valid index


def test_strided_gqa_caches(backend, device):
    inputs = gqa_inputs(3, 40, d=32, d_v=32, device=device)
    both = torch.cat([inputs["k"], inputs["v"]], -1)  # one tensor holds k and v side by side
    inputs["k"], inputs["v"] = both.split(32, -1)
    inputs["q"] = inputs["q"].transpose(0, 1).contiguous().transpose(0, 1)
    gqa(backend, inputs)


@pytest.mark.parametrize("shape", [(5, 8, 40), (5, 8, 1, 40)])
def test_a_paged_cache_is_addressed_by_slot(backend, device, shape):
    inputs = mla_inputs(3, 40, device=device)
    flat = sparse_attn.sparse_mla(**inputs, d_v=32, backend=backend)
    inputs["kv"] = inputs["kv"].view(shape)
    assert torch.equal(sparse_attn.sparse_mla(**inputs, d_v=32, backend=backend), flat)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("h_q, d_qk", [(2, 40), (17, 576)])
def test_pages_may_lie_apart(backend, device, dtype, h_q, d_qk):
    """As of an engine that keeps several layers in one allocation; nothing between pages is read."""
    d_v = min(d_qk, 512)
    inputs = mla_inputs(3, 60, h_q, topk=40, d_qk=d_qk, dtype=dtype, device=device)
    layers = torch.full((12, 3, 5, d_qk), float("nan"), dtype=dtype, device=device)
    layers[:, 1] = inputs["kv"].view(12, 5, d_qk)
    apart = layers[:, 1]
    extra = {"extra_kv": inputs["kv"], "extra_indices": inputs["indices"].flip(1)}
    mla(backend, {**inputs, "kv": apart}, d_v)
    mla(backend, {**inputs, "kv": apart[:, :, None], **extra}, d_v)
    mla(backend, {**inputs, **extra, "extra_kv": apart}, d_v)
    options = {"d_v": d_v, "backend": backend}
    same = [sparse_attn.sparse_mla(**{**inputs, "kv": kv}, **options) for kv in (apart, inputs["kv"])]
    assert torch.equal(*same)


def test_pages_apart_reach_an_op_in_place(monkeypatch):
    """With three dimensions only where a row's number cannot address them."""
    inputs, seen = mla_inputs(3, 60), []
    monkeypatch.setattr(attention, "call", lambda name, a, backend: seen.append(a.kv))
    pages = torch.zeros(12, 8, 40)
    for kv in (pages[:, :5], pages[:, :5, None], pages, pages[:1, :5], pages[:, :1], pages[:, :0]):
        sparse_attn.sparse_mla(inputs["q"], kv, inputs["indices"], d_v=32)
        assert seen[-1].data_ptr() in (pages.data_ptr(), 0)
    assert [tuple(kv.shape) for kv in seen] == [(12, 5, 40)] * 2 + [(96, 40), (5, 40), (12, 40), (0, 40)]
    assert seen[0].stride() == (320, 40, 1)


def test_pages_of_one_token_may_lie_apart(backend, device):
    inputs = mla_inputs(3, 20, device=device)
    expected = sparse_attn.sparse_mla(**inputs, d_v=32, backend=backend)
    wider = torch.full((20, 43), float("nan"), device=device)
    wider[:, :40] = inputs["kv"]
    for shape, strides in (((20, 1, 40), (43, 1, 1)), ((20, 1, 1, 40), (43, 40, 40, 1))):
        inputs["kv"] = wider.as_strided(shape, strides)
        assert torch.equal(sparse_attn.sparse_mla(**inputs, d_v=32, backend=backend), expected)


def test_results_repeat_bit_for_bit(backend, device):
    inputs = mla_inputs(5, 200, topk=64, dtype=torch.bfloat16, device=device)
    options = {"d_v": 32, "return_lse": True, "backend": backend}
    first, again = (sparse_attn.sparse_mla(**inputs, **options) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_all_tokens_selected_equals_dense_attention(backend, device):
    q, k, v = (torch.randn(6, h, 32, device=device) for h in (4, 2, 2))
    position = torch.arange(6, dtype=torch.int32, device=device)
    causal = torch.where(position <= position[:, None], position, -1)
    out = sparse_attn.sparse_gqa(q, k, v, causal, backend=backend)
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    dense = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, dense[0].transpose(0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_merging_parts_gives_the_whole(backend, device, dtype):
    inputs = mla_inputs(4, 60, topk=48, dtype=dtype, device=device)
    indices, options = inputs.pop("indices"), {"d_v": 32, "return_lse": True, "backend": backend}
    split = indices.split([16, 30, 2], 1)
    parts = [sparse_attn.sparse_mla(**inputs, indices=part, **options) for part in split]
    out, lse = sparse_attn.merge_attention(*zip(*parts, strict=True), backend=backend)
    wide = inputs["q"].double(), inputs["kv"].double()
    whole, whole_lse, _ = reference.sparse_mla(*wide, indices, d_v=32, softmax_scale=40**-0.5)
    assert out.dtype == dtype
    assert_close(out.cpu(), whole.cpu(), factor=3.0)  # parts were rounded, then the sum
    torch.testing.assert_close(lse.double(), whole_lse, rtol=1e-4, atol=1e-4)


def test_merge_ignores_empty_parts(backend, device):
    outs = torch.randn(3, 2, 4, 8, device=device)
    lses = torch.randn(3, 2, 4, device=device)
    lses[1], outs[1] = -INF, float("nan")
    lses[:, 1, 2] = -INF
    out, lse = sparse_attn.merge_attention(outs, lses, backend=backend)
    assert (out[1, 2] == 0).all() and lse[1, 2] == -INF
    expected, expected_lse = reference.merge_attention(outs[::2].double(), lses[::2].double())
    assert_close(out.cpu(), expected.cpu())
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_merge_takes_stacked_parts_and_buffers(backend, device):
    outs, lses = torch.randn(2, 3, 4, 8, device=device), torch.randn(2, 3, 4, device=device)
    buffers = torch.empty(3, 4, 8, device=device), torch.empty(3, 4, device=device)
    result = sparse_attn.merge_attention(outs, lses, out=buffers, backend=backend)
    assert result[0] is buffers[0] and result[1] is buffers[1]
    listed = sparse_attn.merge_attention(list(outs), list(lses), backend=backend)
    assert torch.equal(result[0], listed[0]) and torch.equal(result[1], listed[1])


def test_huge_caches_are_addressed_in_64_bits(backend, device):
    rows = 2**31 // 64 + 10  # row * d exceeds int32
    kv = torch.zeros(1, 64, device=device).expand(rows, 64)  # stride 0: no memory
    q = torch.randn(1, 2, 64, device=device)
    indices = torch.tensor([[rows - 1, 0]], dtype=torch.int32, device=device)
    out = sparse_attn.sparse_mla(q, kv, indices, d_v=64, backend=backend)
    assert (out == 0).all()


def test_selected_rows_of_index_sets(backend, device):
    """selection_indices really is hostile: it names valid, repeated and invalid rows."""
    indices = selection_indices(8, 20, 32)
    valid = (indices >= 0) & (indices < 20)
    assert valid[:-1].any(1).all() and not valid[-1].any()
    assert (indices[:-1] == INT_MIN).any() and (indices[:-1] == INT_MAX).any()
