"""The ops behind the functions: records, schemas and fakes by opcheck, torch.compile, and bounded memory."""

import resource
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch

import sparse_attn
from sparse_attn import formats, ops
from sparse_attn.ops.attention import MergeAttentionOp, SparseGQAOp, SparseMLAOp
from sparse_attn.ops.index import IndexLogitsOp, LightningTopkOp, PhysicalSlotsOp, SelectTopkOp
from sparse_attn.ops.records import Cache, OptionalOutput, Output, schema
from sparse_attn.ops.writers import QuantiseIndexQOp, WriteIndexKOp, WriteKVOp
from sparse_attn.testing import gqa_inputs, index_inputs, mla_inputs, selection_indices, to_pages

ON_DEVICES = pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())


def records():
    index = index_inputs(3, 40)
    pages, table = to_pages(index["k"], 8)
    q, weights, ranges = index["q"], index["weights"], (index["ks"], index["ke"])
    mla, gqa = mla_inputs(3, 20), gqa_inputs(3, 20)
    extra_kv, extra_indices = torch.randn(9, 40), selection_indices(3, 9, 5)
    length = torch.tensor([3, 0, 16], dtype=torch.int32)
    picked, sequences = torch.zeros(3, 6, dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)
    out, lse = torch.zeros(3, 4, 32), torch.zeros(3, 4)
    turn, slots = torch.randn(3, 32), torch.arange(3)
    caches = [torch.zeros(2, 4, size, dtype=torch.uint8) for size in (656, 132)]
    rotation = {"cos": turn, "sin": turn, "pairing": "half"}
    selected = {"topk_length": length, "extra_kv": extra_kv, "extra_indices": extra_indices}
    return {
        "index_logits": IndexLogitsOp(**index, out=torch.zeros(3, 40)),
        "select_topk": SelectTopkOp(torch.randn(3, 40), 6, *ranges, picked),
        "lightning_topk": LightningTopkOp(
            *(q, pages, weights, 6, *ranges, 1 << 20, picked),
            **{"block_table": table, "cu_seqlens_q": sequences, "scores": torch.zeros(3, 6)},
        ),
        "physical_slots": PhysicalSlotsOp(picked, table, 8, 9, torch.zeros_like(picked), sequences),
        "write_kv": WriteKVOp(torch.randn(3, 576), slots, 1e-6, True, 1e-6, caches[0], cache_format="v32"),
        "write_index_k": WriteIndexKOp(
            torch.randn(3, 128), slots, 1e-6, True, True, 1e-6, caches[1], **rotation
        ),
        "quantise_index_q": QuantiseIndexQOp(
            *(torch.randn(3, 4, 128), weights, True, True, 1e-6),
            *(torch.zeros(3, 4, 128, dtype=torch.uint8), torch.zeros(3, 4)),
            **{**rotation, "pairing": "interleaved"},
        ),
        "sparse_mla": SparseMLAOp(
            **mla,
            **{"d_v": 32, "softmax_scale": 0.1, "out": out, "lse": lse, "max_logits": torch.zeros(3, 4)},
            **{"attn_sink": torch.zeros(4), **selected},
        ),
        "sparse_gqa": SparseGQAOp(**gqa, softmax_scale=0.1, out=out, lse=lse, topk_length=length),
        "merge_attention": MergeAttentionOp(torch.randn(2, 3, 4, 32), torch.randn(2, 3, 4), out, lse),
    }


@ON_DEVICES
@pytest.mark.parametrize("name", list(records()))
def test_opcheck(name, device):
    arguments = [x.to(device) if isinstance(x, torch.Tensor) else x for x in records()[name]]
    torch.library.opcheck(getattr(torch.ops.sparse_attn, name).default, tuple(arguments))


@ON_DEVICES
@pytest.mark.parametrize("name", formats.KV_FORMATS)
def test_opcheck_of_quantised_caches(name, device):
    fmt = formats.KV_FORMATS[name]
    inputs = mla_inputs(3, 20, d_qk=fmt.width)
    kv = fmt.pack(inputs["kv"].nan_to_num().unflatten(0, (5, 4)))
    outputs = torch.zeros(3, 4, 512), torch.zeros(3, 4), torch.zeros(3, 4)
    selected = {"extra_kv": kv, "extra_indices": inputs["indices"]}
    names = {"kv_format": name, "extra_kv_format": name}
    record = SparseMLAOp(inputs["q"], kv, inputs["indices"], 512, 0.1, *outputs, **selected, **names)
    arguments = [x.to(device) if isinstance(x, torch.Tensor) else x for x in record]
    torch.library.opcheck(torch.ops.sparse_attn.sparse_mla.default, tuple(arguments))


def test_every_op_is_checked():
    assert set(records()) == set(ops.RECORDS)
    assert all(type(record) is ops.RECORDS[name] for name, record in records().items())


def test_the_schema_is_that_of_the_record():
    class Record(NamedTuple):
        x: torch.Tensor
        n: int
        scale: float
        out: Output
        cache: Cache
        y: torch.Tensor | None = None
        name: str | None = None
        flag: bool = True
        wanted: OptionalOutput = None

    assert schema(Record) == (
        "(Tensor x, int n, float scale, Tensor(a!) out, Tensor(b!) cache, Tensor? y=None, str? name=None, "
        "bool flag=True, Tensor(c!)? wanted=None) -> ()"
    )
    with pytest.raises(KeyError):  # a type that a schema cannot say is no argument
        schema(NamedTuple("Wrong", [("x", list)]))


def test_optional_arguments_may_be_left_out_of_an_op_call():
    inputs = mla_inputs(3, 20)
    outputs = torch.zeros(3, 4, 32), torch.zeros(3, 4), torch.zeros(3, 4)
    torch.ops.sparse_attn.sparse_mla(*inputs.values(), 32, 40**-0.5, *outputs)
    assert torch.equal(outputs[0], sparse_attn.sparse_mla(**inputs, d_v=32))


def select(q, k, weights, ks, ke):
    logits = sparse_attn.index_logits(q, k, weights, ks, ke)
    return (
        logits,
        sparse_attn.select_topk(logits, 5, ks, ke),
        sparse_attn.lightning_topk(q, k, weights, 5, ks, ke),
    )


def attend(q, kv, indices):
    parts = [sparse_attn.sparse_mla(q, kv, i, d_v=32, return_lse=True) for i in indices.chunk(2, 1)]
    return sparse_attn.merge_attention(*zip(*parts, strict=True))


def attend_grouped(q, k, v, indices):
    buffers = torch.zeros_like(q), torch.zeros_like(q[..., 0])
    return sparse_attn.sparse_gqa(q, k, v, indices, return_lse=True, out=buffers)


@ON_DEVICES
@pytest.mark.skipif(" " in torch.__file__, reason="torch's compiler fails below a path with spaces")
@pytest.mark.parametrize(
    "function, inputs",
    [(select, index_inputs), (attend, mla_inputs), (attend_grouped, gqa_inputs)],
    ids=["index", "mla", "gqa"],
)
def test_compiled_functions_give_the_same_results(function, inputs, device):
    torch.use_deterministic_algorithms(False)  # the compiler does not fill empty memory
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for s_q, s_kv in ((3, 30), (5, 47), (2, 90)):
        arguments = inputs(s_q, s_kv, device=device)
        for actual, expected in zip(compiled(**arguments), function(**arguments), strict=True):
            assert torch.equal(actual, expected)


def test_compiled_functions_refuse_wrong_arguments():
    inputs = mla_inputs(3, 20)
    inputs["indices"] = inputs["indices"].long()
    with pytest.raises(Exception, match="indices: expected dtype int32, got int64"):
        torch.compile(attend)(**inputs)


MEMORY = """
import resource, sys, torch, sparse_attn
torch.set_num_threads(1)
s_q, s_kv, workspace = 256, 16384, 16 << 20
q, k, weights = torch.randn(s_q, 16, 64), torch.randn(s_kv, 64), torch.randn(s_q, 16)
ks, ke = torch.zeros(s_q, dtype=torch.int32), torch.full((s_q,), s_kv, dtype=torch.int32)
qm, kv = torch.randn(s_q, 16, 96), torch.randn(s_kv, 96)
def run(t):  # warm-up on a few queries, so that libraries and thread pools are not counted
    i = sparse_attn.lightning_topk(q[t], k, weights[t], 512, ks[t], ke[t], workspace_bytes=workspace)
    return i, sparse_attn.sparse_mla(qm[t], kv, i, d_v=64)
with torch.no_grad():
    run(slice(0, 4))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(slice(None))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_memory_does_not_grow_with_s_q_times_s_kv():
    """All logits would take 16 MiB, all selected rows 48 MiB, all head scores 256 MiB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 48 << 20


def test_ru_maxrss_sees_memory():
    """The measurement itself: 64 MiB that are touched are seen."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    block = torch.ones(before * 1024 // 4 + (64 << 20) // 4)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > before
    del block
