"""A query's result does not depend on its neighbours: bit for bit, in every function, on every backend."""

import os

import pytest
import torch

import sparse_attn
from sparse_attn import formats
from sparse_attn.ops.backends import native
from sparse_attn.testing import gqa_inputs, index_inputs, mla_inputs, selection_indices, to_pages

S_Q = 9
ORDERS = [[4], [8, 4], [4, 0, 1, 4, 4, 7], list(range(S_Q))]  # each has query 4, at different places
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # slow, and has one thread
THREADS, HEADS, TOPK = ((1,), (16,), 200) if INTERPRETED else ((1, 2, 4), (2, 16, 128), 600)


def logits(dtype, paged):
    inputs = index_inputs(S_Q, 300, 64, 128, dtype=dtype)
    inputs["k"].nan_to_num_()
    if paged:
        k, table = to_pages(inputs["k"], 64)
        inputs["k"] = formats.pack_index_k(k.float().nan_to_num())
        inputs["block_table"] = table.repeat(S_Q, 1)
    return inputs


def attention(name, heads, dtype):
    if name == "sparse_mla":
        return {**mla_inputs(S_Q, 900, heads, TOPK, 576, dtype=dtype), "d_v": 512}
    return gqa_inputs(S_Q, 900, heads, 2, TOPK, 64, 64, dtype=dtype)


def packed_mla():
    inputs = attention("sparse_mla", min(64, HEADS[-1]), torch.bfloat16)
    return {**inputs, "kv": formats.pack_v32_kv(inputs["kv"].float().nan_to_num()[:, None])}


def merged():
    return {"outs": torch.randn(3, S_Q, 5, 64), "lses": torch.randn(3, S_Q, 5)}


def slots():
    table = torch.randint(-1, 99, (S_Q, 5), dtype=torch.int32)
    return {"indices": selection_indices(S_Q, 300, 40), "block_table": table, "page_size": 64}


BF16, FP32 = torch.bfloat16, torch.float32
CALLS = {
    "index_logits, bf16": ("index_logits", lambda: logits(BF16, False)),
    "index_logits, fp32": ("index_logits", lambda: logits(FP32, False)),
    "index_logits, fp8, paged": ("index_logits", lambda: logits(BF16, True)),
    "lightning_topk": ("lightning_topk", lambda: {**logits(BF16, True), "topk": 40, "return_scores": True}),
    "select_topk": ("select_topk", lambda: {"logits": torch.randn(S_Q, 300), "topk": 40}),
    "physical_slots": ("physical_slots", slots),
    **{
        f"{name}, {heads} heads, {str(dtype)[6:]}": (name, lambda a=(name, heads, dtype): attention(*a))
        for name in ("sparse_mla", "sparse_gqa")
        for heads in HEADS
        for dtype in (BF16, FP32)
    },
    "sparse_mla, 656 bytes": ("sparse_mla", packed_mla),
    "merge_attention": ("merge_attention", merged),
}
TAKES = ("index_logits", "lightning_topk", "sparse_mla", "sparse_gqa")  # the keyword
PER_KEY = {"k", "v", "kv", "attn_sink"}


def of_queries(arguments, order, device):
    """The arguments of some queries, in an order."""
    chosen = torch.tensor(order)
    taken = {}
    for name, x in arguments.items():
        if isinstance(x, torch.Tensor):
            x = (x if name in PER_KEY else x[:, chosen] if name in ("outs", "lses") else x[chosen]).to(device)
        taken[name] = x
    return taken


@pytest.fixture(autouse=True)
def few_multiprocessors(monkeypatch):
    """In the interpreter: otherwise a handful of queries would be divided as one is. Two parts are enough."""
    if INTERPRETED:
        from sparse_attn.kernels import configs

        monkeypatch.setattr(configs, "multiprocessors", lambda device: 4)
        monkeypatch.setattr(configs, "INVARIANT_KEYS", 128)


@pytest.mark.parametrize("name, make", CALLS.values(), ids=CALLS)
def test_neighbours_do_not_change_a_bit(backend, device, request, name, make):
    torch.manual_seed(0)
    arguments, function = make(), getattr(sparse_attn, name)
    options = {"backend": backend}
    if name in ("sparse_mla", "sparse_gqa"):
        options["return_lse"] = True
    in_cpp = request.node.callspec.params["backend"] in {f"cpu-{x}" for x in native.instruction_sets()}
    asked = [{"batch_invariant": True}] if name in TAKES else []
    for more in [*asked, {}] if in_cpp or not asked else asked:
        check(lambda order, more=more: function(**of_queries(arguments, order, device), **options, **more))


def check(call):
    before, results = torch.get_num_threads(), []
    try:
        for order in ORDERS:
            for threads in THREADS:
                torch.set_num_threads(threads)
                result = call(order)
                result = result if isinstance(result, tuple) else (result,)
                results += [[part[t] for part in result] for t, query in enumerate(order) if query == 4]
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for part, expected in zip(result, results[0], strict=True):
            assert torch.equal(part.view(torch.uint8), expected.view(torch.uint8))
