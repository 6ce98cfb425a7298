"""The selection kernels: adversarial rows by the hundred, short lists, segments, millions of logits."""

import pytest
import torch
import triton
import triton.language as tl
from sparse_attn.kernels import select_topk as kernels

from sparse_attn import ops, reference
from sparse_attn.ops.index import LightningTopkOp, SelectTopkOp
from sparse_attn.testing import (
    ADVERSARIAL_LOGITS,
    INT_MAX,
    INT_MIN,
    adversarial_logits,
    index_inputs,
    to_pages,
)


def check(logits, topk, ks, ke):
    out = torch.full((len(logits), topk), INT_MAX, dtype=torch.int32)
    kernels.select_topk(SelectTopkOp(logits, topk, ks, ke, out))
    assert torch.equal(out, reference.select_topk(logits, topk, ks, ke))


def ranges(s_q, s_kv, seed):
    """Ranges of every kind: all of the row, a part, beyond its ends, empty, reversed."""
    g = torch.Generator().manual_seed(seed)
    ks = torch.randint(-5, s_kv // 2, (s_q,), generator=g, dtype=torch.int32)
    ke = torch.randint(0, s_kv + 9, (s_q,), generator=g, dtype=torch.int32)
    ks[: s_q // 3], ke[: s_q // 3] = 0, s_kv
    ks[-1], ke[-1] = INT_MIN, INT_MAX
    return ks, ke


@pytest.mark.parametrize("kind", ADVERSARIAL_LOGITS)
def test_adversarial_rows(monkeypatch, kind):
    """14 kinds x 2 k x 9 rows, beside those of tests/test_index.py."""
    monkeypatch.setattr(kernels, "BLOCK", 256)
    for topk in (1, 30):
        check(adversarial_logits(kind, 9, 270, seed=topk), topk, *ranges(9, 270, seed=topk))


@pytest.mark.parametrize("kind", ["gaussian", "relu_plateau", "one_bin", "infinities", "all_nan"])
@pytest.mark.parametrize("s_q, segments", [(1, 8), (2, 4)])
def test_rows_in_segments(monkeypatch, kind, s_q, segments):
    monkeypatch.setattr(kernels, "BLOCK", 64)
    monkeypatch.setattr(kernels, "MIN_SEGMENT", 500 // segments)
    assert kernels._segments(s_q, 500) == segments
    logits = adversarial_logits(kind, s_q, 500)
    for topk, ks, ke in ((3, 0, 500), (400, 130, 477)):
        check(logits, topk, torch.full((s_q,), ks).int(), torch.full((s_q,), ke).int())


@triton.jit
def _guess_all(row, topk, SAMPLE):
    return tl.full([], kernels.LOWEST, tl.uint32)


@triton.jit
def _guess_zero(row, topk, SAMPLE):
    return tl.full([], 1 << 31, tl.uint32)


@triton.jit
def _guess_infinity(row, topk, SAMPLE):
    return tl.full([], 0xFF800000, tl.uint32)


@pytest.mark.parametrize("guess", [_guess_all, _guess_zero, _guess_infinity])
@pytest.mark.parametrize("s_q, segments", [(2, 1), (1, 8)])
def test_a_bad_guess_changes_nothing(monkeypatch, guess, s_q, segments):
    """Lists that are too long, too short, or end in a plateau."""
    monkeypatch.setattr(kernels, "BLOCK", 64)
    monkeypatch.setattr(kernels, "MIN_SEGMENT", 500 // segments)
    monkeypatch.setattr(kernels, "_guess", guess)
    for kind in ("gaussian", "relu_plateau", "few_values", "infinities", "all_minus_inf", "ascending"):
        logits = adversarial_logits(kind, s_q, 500)
        check(logits, 40, torch.full((s_q,), 3).int(), torch.full((s_q,), 499).int())


@pytest.mark.parametrize("kind", ["gaussian", "clustered", "plateau", "few"])
@pytest.mark.parametrize("s_q, segments", [(3, 1), (1, 8)])
def test_a_row_is_read_once(monkeypatch, kind, s_q, segments):
    """The list is good, also where the range is a small part of the row."""
    monkeypatch.setattr(kernels, "BLOCK", 256)
    monkeypatch.setattr(kernels, "MIN_SEGMENT", 4000 // segments)
    lists, is_good = [], kernels._is_good
    monkeypatch.setattr(kernels, "_is_good", lambda *args: lists.append(is_good(*args)) or lists[-1])
    logits = torch.randn(s_q, 4000, generator=torch.Generator().manual_seed(0))
    if kind == "clustered":
        logits += 3 * logits[:, :125].repeat_interleave(32, 1)
    if kind == "plateau":
        logits = logits.relu() * (logits > 1.5)
    if kind == "few":
        logits[logits < 2.1] = -torch.inf
    for start, stop in ((0, 4000), (1500, 2800)):
        check(logits, 60, torch.full((s_q,), start).int(), torch.full((s_q,), stop).int())
    assert len(lists) == 2 * (s_q if segments == 1 else 1 + segments)
    assert all(lists)


def test_segments_of_an_empty_range(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 64)
    monkeypatch.setattr(kernels, "MIN_SEGMENT", 100)
    check(torch.randn(2, 500), 5, torch.tensor([300, INT_MAX]).int(), torch.tensor([20, INT_MIN]).int())


def test_lists_of_every_length(monkeypatch):
    """Some rows fit their list to the last entry, some lack one, some have no list at all."""
    logits = torch.randn(12, 160).abs_()
    logits[torch.arange(160) < torch.arange(14, 26)[:, None]] += 1e6  # 14 to 25 in one bin; a list holds 20
    ke = torch.full((12,), 160, dtype=torch.int32)
    check(logits, 9, torch.zeros_like(ke), ke)
    check(logits[:, :7], 3, torch.zeros_like(ke), ke)


@pytest.mark.parametrize("s_kv, segments", [pytest.param(1 << 22, 1, marks=pytest.mark.slow), (1 << 18, 4)])
def test_millions_of_logits(monkeypatch, s_kv, segments):
    monkeypatch.setattr(kernels, "BLOCK", 1 << 14)
    monkeypatch.setattr(kernels, "MAX_SEGMENTS", segments)
    logits = torch.zeros(1, s_kv)  # a plateau, so that nothing fits a list
    logits[0, ::4096] = torch.randn(s_kv // 4096)
    check(logits, 4096, torch.tensor([5]).int(), torch.tensor([s_kv - 3]).int())


def test_strided_logits_and_out():
    logits = torch.randn(300, 5).T
    ks, ke = (t[::2] for t in ranges(10, 300, 1))
    out = torch.full((5, 40, 2), INT_MAX, dtype=torch.int32)
    kernels.select_topk(SelectTopkOp(logits, 20, ks, ke, out[:, ::2, 1]))
    assert torch.equal(out[:, ::2, 1], reference.select_topk(logits, 20, ks, ke))
    assert (out[..., 0] == INT_MAX).all() and (out[:, 1::2] == INT_MAX).all()


def test_segments_follow_from_the_shapes():
    counts = {(1, 16383): 1, (1, 16384): 4, (1, 1 << 17): 32, (8, 1 << 22): 32, (65, 1 << 20): 1}
    for shape, expected in counts.items():
        assert kernels._segments(*shape) == expected


class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of all tensors that are made, as if none were ever freed."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in ("empty", "new_empty", "zeros", "new_zeros"):
            self.bytes += result.nbytes
        return result


@pytest.mark.parametrize("paged", [False, True])
def test_one_chunk_keeps_to_the_workspace(paged):
    inputs, table = index_inputs(12, 400), None
    if paged:
        inputs["k"], table = to_pages(inputs["k"], 16)
        table = table.repeat(12, 1)
    out = torch.empty(12, 9, dtype=torch.int32)
    lightning_topk = ops.implementation("lightning_topk", "triton")
    a = LightningTopkOp(**inputs, topk=9, workspace_bytes=1 << 30, out=out, block_table=table)
    with Allocations() as used:
        lightning_topk(a)
    with Allocations() as again:
        lightning_topk(a._replace(workspace_bytes=used.bytes, out=torch.empty_like(out)))
    assert again.bytes == used.bytes  # the workspace that it needed is enough to do it in one chunk again
