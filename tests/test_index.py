"""index_logits, select_topk and lightning_topk: all edge cases, on every backend."""

import os
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from einops import einsum

import sparse_attn
from sparse_attn import formats, reference
from sparse_attn.testing import (
    ADVERSARIAL_LOGITS,
    E4M3_PRODUCT_ERROR,
    INT_MAX,
    INT_MIN,
    adversarial_logits,
    assert_close,
    assert_logits_close,
    index_inputs,
    to_pages,
)

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # slow: it takes pairs in place of products


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "heads, d, s_q, s_kv", [(1, 32, 1, 1), (3, 40, 5, 37), (16, 64, 2, 150), (64, 128, 2, 70)]
)
def test_logits_match_fp64(backend, device, dtype, heads, d, s_q, s_kv):
    inputs = index_inputs(s_q, s_kv, heads, d, dtype=dtype, device=device)
    logits = sparse_attn.index_logits(**inputs, backend=backend)
    assert logits.dtype == torch.float32
    assert_logits_close(logits, **inputs)


def test_logits_of_a_definition_by_hand(backend, device):
    q = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]], device=device)
    k = torch.tensor([[3.0, -1.0], [-5.0, 4.0], [1.0, 1.0]], device=device)
    weights = torch.tensor([[0.5, -1.0]], device=device)
    ks, ke = torch.tensor([[0], [2]], dtype=torch.int32, device=device)
    logits = sparse_attn.index_logits(q, k, weights, ks, ke, backend=backend)
    # heads give relu(3), relu(-2) for key 0 and relu(-5), relu(8) for key 1; key 2 is outside
    assert logits.tolist() == [[1.5, -8.0, float("-inf")]]


def test_empty_and_reversed_ranges_give_minus_inf(backend, device):
    inputs = index_inputs(4, 20, device=device)
    inputs["k"].fill_(float("nan"))
    inputs["ks"] = torch.tensor([5, 9, 20, -7], dtype=torch.int32, device=device)
    inputs["ke"] = torch.tensor([5, 2, 30, 0], dtype=torch.int32, device=device)
    logits = sparse_attn.index_logits(**inputs, backend=backend)
    assert torch.isneginf(logits).all()


@pytest.mark.parametrize("paged", [False, True])
def test_without_ranges_a_query_sees_all_keys(backend, device, paged):
    inputs, options = index_inputs(4, 48, device=device), {"backend": backend}
    inputs["k"].nan_to_num_()
    if paged:
        inputs["k"], options["block_table"] = to_pages(inputs["k"], 16)
    full = {"ks": torch.zeros_like(inputs["ks"]), "ke": torch.full_like(inputs["ke"], 48)}
    free = {name: x for name, x in inputs.items() if name not in full}
    expected = sparse_attn.index_logits(**{**inputs, **full}, **options)
    for one in ({}, {"ks": full["ks"]}, {"ke": full["ke"]}):
        assert torch.equal(sparse_attn.index_logits(**free, **one, **options), expected)
        selected = sparse_attn.lightning_topk(**free, **one, topk=7, **options)
        assert torch.equal(selected, sparse_attn.lightning_topk(**free, **full, topk=7, **options))
        assert torch.equal(selected, sparse_attn.select_topk(expected, 7, **one, backend=backend))


def test_a_table_of_a_cache_without_pages_names_nothing(backend, device):
    inputs = index_inputs(3, 8, device=device)
    inputs["k"], table = inputs["k"].new_zeros(0, 8, 32), torch.zeros(1, 2, dtype=torch.int32, device=device)
    assert sparse_attn.index_logits(**inputs, block_table=table, backend=backend).isneginf().all()


@pytest.mark.parametrize("s_q, s_kv", [(0, 7), (3, 0), (0, 0)])
def test_nothing_to_score(backend, device, s_q, s_kv):
    inputs = index_inputs(s_q, s_kv, device=device)
    assert sparse_attn.index_logits(**inputs, backend=backend).shape == (s_q, s_kv)
    indices = sparse_attn.lightning_topk(**inputs, topk=3, backend=backend)
    assert indices.tolist() == [[-1] * 3] * s_q


def test_a_visible_nan_key_gives_a_nan_logit(backend, device):
    inputs = index_inputs(2, 12, device=device)
    inputs["ks"].zero_()
    inputs["ke"].fill_(12)
    inputs["k"].nan_to_num_()
    inputs["k"][5, 3] = float("nan")
    logits = sparse_attn.index_logits(**inputs, backend=backend)
    assert logits.isnan().sum(0).tolist() == [2 * (s == 5) for s in range(12)]


@pytest.mark.parametrize("page_size", [1, 5, 16, 64])
def test_paged_logits_equal_contiguous_ones(backend, device, page_size):
    inputs = index_inputs(4, 50, dtype=torch.float32, device=device)
    contiguous = sparse_attn.index_logits(**inputs, backend=backend)
    pages, table = to_pages(inputs.pop("k"), page_size)
    paged = sparse_attn.index_logits(**inputs, k=pages, block_table=table, backend=backend)
    assert paged.shape == (4, table.shape[1] * page_size)
    visible = torch.arange(paged.shape[1], device=device) < inputs["ke"][:, None].clamp(max=50)
    expected = F.pad(contiguous, (0, paged.shape[1] - 50), value=float("-inf"))
    assert_close(torch.where(visible, paged, float("-inf")).cpu(), expected.cpu())


def test_a_block_table_row_serves_consecutive_queries(backend, device):
    inputs = index_inputs(6, 40, device=device)
    one, table_one = to_pages(inputs["k"], 8, seed=1)
    two, table_two = to_pages(inputs.pop("k").flip(0), 8, seed=2)
    table_two = torch.where((table_two >= 0) & (table_two < len(two)), table_two + len(one), table_two)
    pages, table = torch.cat([one, two]).nan_to_num_(), torch.cat([table_one, table_two])
    logits = sparse_attn.index_logits(**inputs, k=pages, block_table=table, backend=backend)
    for row in range(2):
        t = slice(3 * row, 3 * row + 3)
        part = {name: tensor[t] for name, tensor in inputs.items()}
        single = sparse_attn.index_logits(**part, k=pages, block_table=table[row, None], backend=backend)
        assert_close(logits[t].cpu(), single.cpu())
        assert_logits_close(logits[t], **part, k=pages, block_table=table[row, None])


def ragged_batch(counts, device, page_size=8, padding=2, dtype=torch.float32, heads=5):
    """Arguments of a batch whose sequence i has counts[i] queries, its keys in shuffled pages, some missing.

    All are small integers: every way to sum gives the same logits.
    """
    g = torch.Generator().manual_seed(0)
    n, s_q, pages = len(counts), sum(counts) + padding, 6
    inputs = index_inputs(s_q, pages * page_size, heads, dtype=dtype, device=device)
    table = torch.randint(-2, 22, (n, pages), generator=g, dtype=torch.int32)  # of 20 pages
    inputs["k"] = torch.randn(20, page_size, 32, generator=g).to(device, dtype)
    for name in ("q", "k", "weights"):
        inputs[name].round_()
    cu_seqlens_q = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0).int()
    return {**inputs, "block_table": table.to(device), "cu_seqlens_q": cu_seqlens_q.to(device)}


# Kernels read 256 sequences at a time: queries are on both sides.
MANY = [0] * 250 + [1] * 12 if INTERPRETED else [1] * 270
RAGGED = [[3, 0, 1, 9, 0, 2], [1, 1, 1, 1], [0, 0], [40], [], MANY, [0] * 300 + [5, 2]]


@pytest.mark.parametrize("counts", RAGGED, ids=lambda counts: f"{len(counts)} sequences, {sum(counts)}")
@pytest.mark.parametrize("padding", [0, 2])
def test_a_ragged_batch_is_its_sequences(backend, device, counts, padding):
    batch, options = ragged_batch(counts, device, padding=padding), {"backend": backend}
    cu_seqlens_q, table = batch["cu_seqlens_q"], batch["block_table"]
    logits = sparse_attn.index_logits(**batch, **options)
    assert torch.isneginf(logits[sum(counts) :]).all()
    selected, scores = sparse_attn.lightning_topk(**batch, topk=7, return_scores=True, **options)
    expected = sparse_attn.select_topk(logits, 7, batch["ks"], batch["ke"], **options)
    assert torch.equal(selected, expected)
    assert torch.equal(scores, reference.scores_of(logits, selected))
    slots = sparse_attn.physical_slots(selected, table, 8, cu_seqlens_q=cu_seqlens_q, **options)
    assert (slots[sum(counts) :] == -1).all()
    filled = [row for row, count in enumerate(counts) if count]
    for row in {*filled[:5], *filled[-3:]}:
        t = slice(int(cu_seqlens_q[row]), int(cu_seqlens_q[row + 1]))
        one = {name: batch[name][t] for name in ("q", "weights", "ks", "ke")}
        one |= {"k": batch["k"], "block_table": table[row, None]}
        assert_logits_close(logits[t], **one)
        assert torch.equal(sparse_attn.index_logits(**one, **options), logits[t])
        assert torch.equal(sparse_attn.lightning_topk(**one, topk=7, **options), selected[t])
        assert torch.equal(sparse_attn.physical_slots(selected[t], table[row, None], 8, **options), slots[t])


@pytest.mark.parametrize("workspace_bytes", [1, 40 * 48 * 3, 1 << 30])
def test_the_workspace_never_changes_a_ragged_batch(backend, device, workspace_bytes):
    batch = ragged_batch([3, 0, 1, 9, 0, 2], device)
    options = {"topk": 7, "return_scores": True, "backend": backend}
    whole = sparse_attn.lightning_topk(**batch, **options)
    parts = sparse_attn.lightning_topk(**batch, **options, workspace_bytes=workspace_bytes)
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])


def test_a_row_per_query_is_a_ragged_batch_of_ones(backend, device):
    batch = ragged_batch([1] * 6, device, padding=0)
    ragged = sparse_attn.index_logits(**batch, backend=backend)
    del batch["cu_seqlens_q"]
    assert torch.equal(sparse_attn.index_logits(**batch, backend=backend), ragged)


@pytest.mark.parametrize("page_size", [1, 5, 64])
def test_quantised_ragged_batches(backend, device, page_size):
    counts, g = [2, 0, 5, 1], torch.Generator().manual_seed(1)
    inputs, straight = quantised_index_inputs("e4m3", "e4m3", device, 8, 3 * page_size, 16)
    k = formats.pack_index_k(torch.randn(9, page_size, 128, generator=g)).to(device)
    table = torch.randint(-1, 10, (4, 3), generator=g, dtype=torch.int32).to(device)
    cu_seqlens_q = torch.tensor([0, 2, 2, 7, 8], dtype=torch.int32, device=device)
    options = {"k": k, "k_scale": None, "backend": backend}
    batch = {**inputs, **options, "block_table": table, "cu_seqlens_q": cu_seqlens_q}
    logits = sparse_attn.index_logits(**batch)
    for row, t in enumerate((slice(0, 2), slice(2, 2), slice(2, 7), slice(7, 8))):
        assert t.stop - t.start == counts[row]
        one = {name: inputs[name][t] for name in ("q", "weights", "ks", "ke")}
        expected = sparse_attn.index_logits(**one, **options, block_table=table[row, None])
        assert_close(logits[t].cpu(), expected.cpu())
    keys, scales = formats.views(k)
    of_query = {**straight, "k": keys, "k_scale": scales, "block_table": table}
    rows = torch.tensor([0, 0, 2, 2, 2, 2, 2, 3], device=device)
    assert_logits_close(logits, **{**of_query, "block_table": table[rows]})


@pytest.mark.parametrize("boundaries", [[0, 3, 99], [0, -5, 4], [7, 7, 8], [0, INT_MIN, INT_MAX]])
def test_boundaries_out_of_range_are_harmless(backend, device, boundaries):
    """What lies outside of the batch is cut off; the first boundary is taken for 0."""
    batch = ragged_batch([3, 3], device)
    batch["cu_seqlens_q"] = torch.tensor(boundaries, dtype=torch.int32, device=device)
    ends = [max(0, min(x, 8)) for x in boundaries[1:]]
    rows = [sum(t >= end for end in ends) for t in range(8)]
    logits = sparse_attn.index_logits(**batch, backend=backend)
    batch["block_table"] = torch.cat([batch["block_table"], torch.full_like(batch["block_table"][:1], -1)])[
        rows
    ]
    del batch["cu_seqlens_q"]
    assert torch.equal(sparse_attn.index_logits(**batch, backend=backend), logits)


def test_scores_of_the_selected(backend, device):
    inputs = index_inputs(5, 30, device=device)
    inputs["ke"][1] = inputs["ks"][1]  # sees nothing
    options = {"topk": 7, "backend": backend}
    indices, scores = sparse_attn.lightning_topk(**inputs, return_scores=True, **options)
    assert torch.equal(indices, sparse_attn.lightning_topk(**inputs, **options))
    logits = sparse_attn.index_logits(**inputs, backend=backend)
    assert scores.dtype == torch.float32
    assert torch.equal(torch.isneginf(scores), indices < 0)
    for t, i in (indices >= 0).nonzero().tolist():
        assert scores[t, i] == logits[t, indices[t, i]]
    wide = torch.full((5, 2, 7), 3.0, device=device)
    out = torch.full((5, 7), 9, dtype=torch.int32, device=device), wide[:, 1]
    result = sparse_attn.lightning_topk(**inputs, return_scores=True, out=out, **options)
    assert result[0] is out[0] and result[1] is out[1]
    assert torch.equal(out[0], indices) and torch.equal(out[1], scores) and (wide[:, 0] == 3).all()
    nothing = sparse_attn.lightning_topk(**{**inputs, "k": inputs["k"][:0]}, return_scores=True, **options)
    assert (nothing[0] == -1).all() and torch.isneginf(nothing[1]).all()


def test_pages_of_interleaved_layers(backend, device):
    """A layer's cache as every third page of one allocation: read in place, slots count the others too."""
    batch = ragged_batch([3, 1], device)
    layers = torch.full((20, 3, 8, 32), float("nan"), device=device)
    layers[:, 1] = batch["k"]
    expected = sparse_attn.index_logits(**batch, backend=backend)
    batch["k"] = layers[:, 1]
    assert torch.equal(sparse_attn.index_logits(**batch, backend=backend), expected)
    where = {"cu_seqlens_q": batch["cu_seqlens_q"], "backend": backend}
    positions = sparse_attn.lightning_topk(**batch, topk=5, backend=backend)
    slots = sparse_attn.physical_slots(positions, batch["block_table"], 8, page_stride=24, **where)
    near = sparse_attn.physical_slots(positions, batch["block_table"], 8, **where)
    assert torch.equal(slots, torch.where(near < 0, -1, near // 8 * 24 + near % 8))


def test_strided_inputs_and_out(backend, device):
    inputs = index_inputs(3, 30, heads=4, d=32, device=device)
    strided = dict(inputs)
    for name in ("q", "k", "weights"):
        spread = torch.full((*inputs[name].shape, 2), float("nan"), device=device)
        spread[..., 1] = inputs[name]
        strided[name] = spread[..., 1]
    out = torch.full((30, 3), float("nan"), device=device).T
    result = sparse_attn.index_logits(**strided, out=out, backend=backend)
    assert result is out
    assert_logits_close(out, **inputs)


def quantised(x, form):
    """x [..., d] quantised: (values, scales) as the op takes them, and as formats does. NaN stays NaN."""
    if form == "e4m3":  # scales that are not powers of two
        scales = x.float().abs().amax(-1) / 300
        values = formats.to_e4m3(x.float() / scales[..., None])
        return (values, scales), (values, scales)
    values = torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=torch.uint8, device=x.device)
    stored = torch.full((*x.shape[:-1], 4), 255, dtype=torch.uint8, device=x.device)  # the pad is NaN
    scales = stored[..., : x.shape[-1] // 32]
    formats.quantise(x, values, scales, min_scale=1e-9)
    return (values, stored.view(torch.int32)[..., 0]), (values, scales)


def quantised_index_inputs(q_form, k_form, device, *size, d=128, seed=0):
    """Arguments of the function with quantised operands, and of ``assert_logits_close``."""
    inputs = index_inputs(*size, d, device=device, seed=seed)
    inputs["q"] *= 10.0 ** torch.arange(-2, 2, device=device).repeat_interleave(d // 4)  # blocks differ
    straight = dict(inputs)
    if q_form == "e4m3":
        inputs["q"] = straight["q"] = formats.to_e4m3(inputs["q"])
    elif q_form == "e2m1":
        (inputs["q"], inputs["q_scale"]), parts = quantised(inputs["q"], q_form)
        straight["q"], straight["q_scale"] = parts
    (inputs["k"], inputs["k_scale"]), parts = quantised(inputs["k"], k_form)
    straight["k"], straight["k_scale"] = parts
    return inputs, straight


Q_FORMS, K_FORMS = ["fp32", "e4m3", "e2m1"], [("e4m3", 128), ("e2m1", 128), ("e2m1", 64)]
SIZES = [(3, 1), (64, 16), (17, 7)]  # heads, and tokens of a page


@pytest.mark.parametrize(
    "q_form, k_form, d, heads, page_size",
    [
        (Q_FORMS[q], *K_FORMS[k], *SIZES[size])
        for q, k, size in product(range(3), repeat=3)
        if not INTERPRETED or size == (q + k + 2) % 3  # each two of the three
    ],
)
def test_quantised_operands(backend, device, q_form, k_form, d, heads, page_size):
    inputs, straight = quantised_index_inputs(q_form, k_form, device, 4, 70, heads, d=d)
    logits = sparse_attn.index_logits(**inputs, backend=backend)
    assert logits.dtype == torch.float32
    assert_logits_close(logits, **straight)
    bounds = inputs["ks"], inputs["ke"]
    expected = sparse_attn.select_topk(logits, 9, *bounds, backend=backend)
    small = {"topk": 9, "workspace_bytes": 1, "backend": backend}
    assert torch.equal(sparse_attn.lightning_topk(**inputs, **small), expected)

    # The same keys in shuffled pages: their parts, and packed.
    pages = -(-70 // page_size)
    order = torch.randperm(pages, device=device)
    table = torch.cat([order, torch.tensor([INT_MIN, -1, pages, INT_MAX], device=device)])[None].int()
    parts, packed = paged_keys(straight["k"], straight["k_scale"], order, page_size)
    inputs["ke"].clamp_(max=70)
    names = ("k", "k_scale")
    in_pages = {**inputs, **dict(zip(names, parts, strict=True)), "block_table": table}
    paged = sparse_attn.index_logits(**in_pages, backend=backend)
    visible = torch.arange(70, device=device) < inputs["ke"][:, None]
    assert torch.equal(paged[:, :70], torch.where(visible, logits, float("-inf")))
    assert torch.isneginf(paged[:, 70:]).all()
    in_pages.update(k=packed, k_scale=None)
    assert torch.equal(sparse_attn.index_logits(**in_pages, backend=backend), paged)
    assert torch.equal(sparse_attn.lightning_topk(**in_pages, **small), expected)


def paged_keys(k, scales, order, page_size):
    """(parts, packed): keys in pages, page i of the sequence at order[i]; bytes that no key uses are 0xFF."""
    size = k.shape[1] + 4
    packed = torch.full((len(order), page_size, size), 0xFF, dtype=torch.uint8, device=k.device)
    parts = formats.views(packed)
    slot = torch.arange(len(k), device=k.device)
    where = order[slot // page_size], slot % page_size
    for part, source in zip(parts, (k, scales), strict=True):
        in_words = torch.uint8 if part.element_size() == 1 else part.dtype  # torch does not index fp8
        part.view(in_words)[where] = source.view(in_words)
    values, scales = parts[0].contiguous(), packed.flatten(1)[:, page_size * k.shape[1] :].contiguous()
    return (values, scales.view(torch.float32 if size == 132 else torch.int32)), packed


@pytest.mark.parametrize("q_form, k_form", [("e2m1", "e4m3"), ("e4m3", "e2m1"), ("fp32", "e4m3")])
def test_quantised_operands_of_64_values(backend, device, q_form, k_form):
    inputs, straight = quantised_index_inputs(q_form, k_form, device, 5, 40, 6, d=64)
    assert_logits_close(sparse_attn.index_logits(**inputs, backend=backend), **straight)


@pytest.mark.parametrize("d", [16, 32, 40, 64, 128])
def test_e4m3_of_every_head_dim(backend, device, d):
    inputs, straight = quantised_index_inputs("e4m3", "e4m3", device, 5, 40, 6, d=d)
    assert_logits_close(sparse_attn.index_logits(**inputs, backend=backend), **straight)


def logits_added_with(bits: int, q, k, weights, ks, ke, k_scale):
    """index_logits where sums keep this many bits after the first of their greatest term, and cut the rest.

    Hopper's tensor cores add 32 products of e4m3 and what they hold already so, with 13 bits (docs/maths.md).
    """
    q, k = q.double(), k.double()
    scores = torch.zeros(*q.shape[:2], len(k), 1, dtype=torch.float64)
    for q_step, k_step in zip(q.split(32, -1), k.split(32, -1), strict=True):
        terms = torch.cat([scores, q_step[:, :, None] * k_step], -1)
        unit = terms.abs().amax(-1, keepdim=True).clamp(min=1e-30).log2().floor().sub(bits).exp2()
        scores = ((terms / unit).trunc() * unit).sum(-1, keepdim=True)
    logits = einsum(scores[..., 0].relu(), weights.double(), "t h s, t h -> t s") * k_scale
    position = torch.arange(len(k))
    return logits.masked_fill((position < ks[:, None]) | (position >= ke[:, None]), float("-inf")).float()


def assert_within_e4m3_budget(logits, q, k, weights, ks, ke, k_scale):
    inputs = q.double(), k.double() * k_scale[:, None], weights.double()
    exact = reference.index_logits(*inputs, ks, ke)
    terms = reference.index_logits(*(x.abs() for x in inputs), ks, ke)
    assert_close(logits, exact, terms=terms, arithmetic=E4M3_PRODUCT_ERROR)


@pytest.mark.parametrize("d", [16, 32, 64, 128, 256])
def test_the_budget_of_e4m3_products_holds_for_sums_of_13_bits(d):
    _, straight = quantised_index_inputs("e4m3", "e4m3", "cpu", 5, 200, 16, d=d)
    logits = {bits: logits_added_with(bits, **straight) for bits in (40, 13, 9)}
    assert_logits_close(logits[40], **straight)  # the model without its rounding
    assert_within_e4m3_budget(logits[13], **straight)
    for bits, check in ((13, assert_logits_close), (9, assert_within_e4m3_budget)):
        with pytest.raises(AssertionError, match="exceeds the budget"):
            check(logits[bits], **straight)


@pytest.mark.parametrize("form, width", [("e4m3", 128), ("e2m1", 64)])
def test_every_code_of_quantised_operands(backend, device, form, width):
    """Each key has one value, and q has 1 or -1 there: the logit is relu of plus or minus the value."""
    k = torch.zeros(256, width, dtype=torch.uint8)
    k[:, 0] = torch.arange(256)
    if form == "e4m3":
        k, scale = k.view(torch.float8_e4m3fn), torch.linspace(0.5, 2, 256)
        straight = scale
    else:  # pairs of e2m1 with ue8m0 scales of many sizes
        straight = torch.full((256, 4), 127, dtype=torch.uint8)
        straight[:, 0] = torch.tensor([100, 127, 150, 1]).repeat(64)
        scale = straight.view(torch.int32)[:, 0]
    values = formats.dequantise(k, straight)
    ks, ke = torch.tensor([[0], [256]], dtype=torch.int32)
    for sign, q_dtype in ((1, torch.float32), (-1, torch.bfloat16)):
        q = torch.zeros(1, 1, 128, dtype=q_dtype)
        q[0, 0, 0] = sign
        arguments = [x.to(device) for x in (q, k, torch.ones(1, 1), ks, ke)]
        logits = sparse_attn.index_logits(*arguments, k_scale=scale.to(device), backend=backend).cpu()
        expected = (sign * values[:, 0]).relu()[None]
        torch.testing.assert_close(logits, expected, rtol=1e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ADVERSARIAL_LOGITS)
@pytest.mark.parametrize("topk", [1, 7, 40, 100])
def test_selection_equals_the_reference_bit_for_bit(backend, device, kind, topk):
    logits = adversarial_logits(kind, 6, 64)
    ks = torch.tensor([0, 0, 10, 63, 40, -5], dtype=torch.int32)
    ke = torch.tensor([64, 33, 50, 64, 20, 99], dtype=torch.int32)
    expected = [brute_force_topk(row, topk, int(a), int(b)) for row, a, b in zip(logits, ks, ke, strict=True)]
    indices = sparse_attn.select_topk(logits.to(device), topk, ks.to(device), ke.to(device), backend=backend)
    assert indices.dtype == torch.int32
    assert indices.tolist() == expected


def brute_force_topk(row, topk, start, stop):
    """Python's own sort: by score, then by index; NaN and -inf left out."""
    row = row.tolist()
    candidates = [i for i in range(max(start, 0), min(stop, len(row))) if row[i] > float("-inf")]
    chosen = sorted(sorted(candidates, key=lambda i: (-row[i], i))[:topk])
    return chosen + [-1] * (topk - len(chosen))


@pytest.mark.parametrize("seed", range(40))
def test_selection_on_random_shapes(backend, device, seed):
    g = torch.Generator().manual_seed(seed)
    s_q, s_kv, topk = (int(torch.randint(1, high, (), generator=g)) for high in (9, 3000, 600))
    kind = ADVERSARIAL_LOGITS[seed % len(ADVERSARIAL_LOGITS)]
    logits = adversarial_logits(kind, s_q, s_kv, seed).to(device)
    ks = torch.randint(-5, s_kv, (s_q,), generator=g, dtype=torch.int32).to(device)
    ke = torch.randint(0, s_kv + 9, (s_q,), generator=g, dtype=torch.int32).to(device)
    indices = sparse_attn.select_topk(logits, topk, ks, ke, backend=backend)
    rows = zip(logits, ks.tolist(), ke.tolist(), strict=True)
    assert indices.tolist() == [brute_force_topk(row, topk, start, stop) for row, start, stop in rows]


@pytest.mark.parametrize(
    "workspace_bytes, paged",
    [
        (workspace_bytes, paged)
        for n, workspace_bytes in enumerate([1, 40 * 300, 40 * 300 * 4, 1 << 30])
        for paged in (False, True)
        if not INTERPRETED or paged == n % 2
    ],
)
def test_the_workspace_never_changes_the_selection(backend, device, workspace_bytes, paged):
    inputs = index_inputs(11, 300, device=device)
    for name in ("q", "k", "weights"):  # small integers: every way to sum gives the same logits
        inputs[name].round_()
    expected, _ = reference.lightning_topk(**inputs, topk=20)
    if paged:
        pages, table = to_pages(inputs.pop("k"), 16)
        inputs.update(k=pages, block_table=table.repeat(11, 1))
        inputs["ke"].clamp_(max=300)
    options = {"topk": 20, "workspace_bytes": workspace_bytes, "backend": backend}
    for _ in range(2):
        assert torch.equal(sparse_attn.lightning_topk(**inputs, **options), expected)


def test_every_way_to_the_same_logits_selects_the_same(backend, device):
    """Small integers, exact in every format: dtypes, pages, chunks, prefill and decode give one selection."""
    g = torch.Generator().manual_seed(0)
    allowed = torch.tensor([-6.0, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6])  # of e2m1 too
    q, k = (allowed[torch.randint(0, 11, shape, generator=g)] for shape in ((5, 3, 128), (90, 128)))
    k[:, 1:] *= (torch.rand(90, 1, generator=g) < 0.3).float()  # most keys differ in one value: many ties
    weights = torch.randint(-3, 4, (5, 3), generator=g).float()
    ks, ke = (torch.tensor(x, dtype=torch.int32) for x in ([0, 0, 17, 80, 5], [90, 40, 77, 70, 99]))
    expected, _ = reference.lightning_topk(q, k, weights, 12, ks, ke)
    logits = reference.index_logits(q, k, weights, ks, ke)
    assert (logits.sort().values.diff() == 0).any(1)[[0, 1, 2, 4]].all()

    scales, e2m1 = torch.ones(90), (formats.to_e2m1(q), formats.to_e2m1(k))
    units = [torch.full(shape, 0x7F7F7F7F, dtype=torch.int32) for shape in ((5, 3), (90,))]
    e4m3 = formats.to_e4m3(q), formats.to_e4m3(k)
    operands = [
        *((q.to(dtype), k.to(dtype), {}) for dtype in FLOATS),
        *((x, e4m3[1], {"k_scale": scales}) for x in (q.bfloat16(), e4m3[0])),
        (e2m1[0], e2m1[1], {"q_scale": units[0], "k_scale": units[1]}),
        (e2m1[0], e4m3[1], {"q_scale": units[0], "k_scale": scales}),
        (e4m3[0], e2m1[1], {"k_scale": units[1]}),
    ]
    pages = torch.randperm(6, generator=g)
    for q, k, options in operands:
        slots = (pages[:, None] * 15 + torch.arange(15)).flatten()
        in_pages = {"block_table": pages.argsort()[None].int()}
        if "k_scale" in options:
            in_pages["k_scale"] = options["k_scale"][slots].view(6, 15)
        for keys, more in ((k, {}), (k.view(torch.uint8)[slots].view(k.dtype).view(6, 15, -1), in_pages)):
            arguments = {"q": q, "k": keys, "weights": weights, "ks": ks, "ke": ke, **options, **more}
            arguments = {name: x.to(device) for name, x in arguments.items()}
            whole = sparse_attn.lightning_topk(**arguments, topk=12, backend=backend)
            assert torch.equal(whole.cpu(), expected)
            for t in (1, 3):
                of_queries = [n for n in ("q", "weights", "ks", "ke", "q_scale") if n in arguments]
                one = {n: arguments[n][t, None] for n in of_queries}
                decoded = sparse_attn.lightning_topk(**{**arguments, **one}, topk=12, backend=backend)
                assert torch.equal(decoded.cpu(), expected[t, None])


def test_slots_by_hand(backend, device):
    indices = torch.tensor([[0, 5, -1, 8, INT_MIN], [3, 4, 7, 11, INT_MAX]], dtype=torch.int32, device=device)
    table = torch.tensor([[9, 2], [-3, INT_MAX]], dtype=torch.int32, device=device)
    slots = sparse_attn.physical_slots(indices, table, 4, backend=backend)
    assert slots.dtype == torch.int32
    assert slots.tolist() == [[36, 9, -1, -1, -1], [-1, -1, -1, -1, -1]]
    table[1] = torch.tensor([0, (2**31 - 4) // 4])  # the last page that int32 can number
    slots = sparse_attn.physical_slots(indices[1:], table[1:], 4, backend=backend)
    assert slots.tolist() == [[3, 2**31 - 4, 2**31 - 1, -1, -1]]


@pytest.mark.parametrize("page_size", [1, 3, 64])
@pytest.mark.parametrize(
    "s_q, rows, topk, pages", [(6, 3, 1100, 20), (2, 2, 5, 0), (0, 0, 4, 3), (3, 1, 0, 2)]
)
def test_slots_equal_the_reference(backend, device, page_size, s_q, rows, topk, pages):
    indices = torch.randint(-3, pages * page_size + 3, (topk, s_q), dtype=torch.int32, device=device).T
    table = torch.randint(-2, 1000, (rows, 2 * pages), dtype=torch.int32, device=device)[:, ::2]
    slots = sparse_attn.physical_slots(indices, table, page_size, backend=backend)
    assert torch.equal(slots, reference.physical_slots(indices, table, page_size))
    for t, i in ((0, 0), (s_q - 1, topk - 1)) if slots.numel() else ():
        index = int(indices[t, i])
        page = int(table[t // (s_q // rows), index // page_size]) if 0 <= index < pages * page_size else -1
        assert slots[t, i] == (page * page_size + index % page_size if page >= 0 else -1)


def test_paged_selection_and_slots_find_the_selected_rows(backend, device):
    inputs = index_inputs(4, 50, device=device)
    inputs["ke"].clamp_(max=50)
    expected = sparse_attn.lightning_topk(**inputs, topk=9, backend=backend)
    k = inputs.pop("k")
    pages, table = to_pages(k, 16)
    positions = sparse_attn.lightning_topk(**inputs, k=pages, topk=9, block_table=table, backend=backend)
    slots = sparse_attn.physical_slots(positions, table, 16, backend=backend)
    assert torch.equal(slots < 0, expected < 0)
    rows = pages.flatten(0, 1)[slots.clamp(min=0).long()]
    assert torch.equal(rows[slots >= 0], k[expected.clamp(min=0).long()][expected >= 0])


def test_topk_fills_the_callers_buffer(backend, device):
    inputs = index_inputs(3, 30, device=device)
    out = torch.full((3, 64), 7, dtype=torch.int32, device=device)[:, ::2][:, :5]
    result = sparse_attn.lightning_topk(**inputs, topk=5, out=out, backend=backend)
    assert result is out
    assert torch.equal(out, sparse_attn.lightning_topk(**inputs, topk=5, backend=backend))
