"""What work and memory grow with, counted instead of timed: elements computed, pages read, bytes held."""

import dataclasses
import mmap
import re
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_attn
from bench.timing import peak_memory
from sparse_attn import DSACache, DSAConfig, SparseGQA, SparseMLA, ops
from sparse_attn.ops.backends import native

CONTEXTS = (2048, 4096, 8192)  # each a multiple of the keys that torch scores at a time
PAGE = mmap.PAGESIZE
MLA = DSAConfig.deepseek_v32(
    **{"hidden_size": 64, "num_attention_heads": 8, "q_lora_rank": 32, "kv_lora_rank": 48},
    **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16},
    **{"index_n_heads": 4, "index_head_dim": 32, "index_topk": 64},
)
GQA = DSAConfig(
    **{"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    **{"index_n_heads": 4, "index_head_dim": 32, "index_topk": 64, "indexer_rope": "half"},
)

linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="Linux alone tells which memory was read"
)


class Work(TorchDispatchMode):
    """Counts per op of this library ("": outside): multiply-adds of products, elements of other results."""

    def __init__(self):
        super().__init__()
        self.by_op: dict[str, int] = {}
        self.inside = ""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "sparse_attn":
            self.inside = function._schema.name.split("::")[1]
            try:
                with self:  # what the op does in torch is counted too
                    return ops.implementation(self.inside, "cpu")(ops.RECORDS[self.inside](*args))
            finally:
                self.inside = ""
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.by_op[self.inside] = self.by_op.get(self.inside, 0) + self._cost(function, args, result)
        return result

    @staticmethod
    def _cost(function, args, result) -> int:
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.matmul):
            return result.numel() * args[0].shape[-1]
        if function is torch.ops.aten.index_put_.default:  # returns the whole cache, wrote a few rows
            result = args[2]
        results = result if isinstance(result, (tuple, list)) else (result,)
        return sum(x.numel() for x in results if isinstance(x, torch.Tensor))


def filled(config: DSAConfig, tokens: int) -> DSACache:
    cache = DSACache(config, tokens)
    for name in cache._tensors:
        cache[name].normal_()
    cache._lengths.fill_(tokens - 1)
    return cache


@pytest.mark.parametrize("layer, config", [(SparseMLA, MLA), (SparseGQA, GQA)])
def test_a_decode_step_grows_linearly_and_only_through_the_indexer(layer, config):
    layer, work = layer(config), []
    hidden = torch.randn(1, config.hidden_size)
    layer(hidden)  # warm-up: what is made once is not counted
    for context in CONTEXTS:
        cache = filled(config, context)
        with native.use(None), Work() as counted:
            layer(hidden, cache=cache)
        work.append(counted.by_op)
    attention = "sparse_mla" if config.is_mla else "sparse_gqa"
    assert set(work[0]) == {"", "lightning_topk", attention}
    for name in ("", attention):
        assert len({counts[name] for counts in work}) == 1, f"{name or 'projections'} grow with the context"
    first, second, third = (counts["lightning_topk"] for counts in work)
    assert third - second == 2 * (second - first)
    products = config.index_n_heads * (config.index_head_dim + 1)  # per key
    assert products <= (second - first) / (CONTEXTS[1] - CONTEXTS[0]) <= 2 * products


class Watched:
    """fp32 ``[rows, width]`` in a mapping of its own, so that Linux says how much of it was read."""

    def __init__(self, rows: int, width: int):
        self.memory = mmap.mmap(-1, rows * width * 4)
        self.tensor = torch.frombuffer(self.memory, dtype=torch.float32).view(rows, width).normal_()

    def read(self, function) -> int:
        """Bytes, in whole pages, that ``function`` touched."""
        Path("/proc/self/clear_refs").write_text("1")
        function()
        start = self.tensor.data_ptr()
        for block in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())[1:]:
            low, high = (int(x, 16) for x in block.split()[0].split("-"))
            if low <= start < high:
                assert high - low == len(self.memory), "the mapping was merged with another's"
                return int(re.search(r"Referenced:\s+(\d+)", block)[1]) * 1024
        raise AssertionError("no mapping holds the tensor")


@pytest.fixture(params=[*native.instruction_sets()[:1], None], ids=str)
def on_cpu(request):
    with native.use(request.param):
        yield


@linux
def test_attention_reads_the_selected_rows_and_the_indexer_all_keys(on_cpu):
    topk, width = 32, PAGE // 4  # one row per page
    q = torch.randn(1, 4, width)
    for s_kv in (1024, 4096):
        kv = Watched(s_kv, width)
        indices = torch.randperm(s_kv)[None, :topk].sort().values.int()

        def attend(kv=kv, indices=indices):
            return sparse_attn.sparse_mla(q, kv.tensor, indices, d_v=512)

        attend()
        assert 0 < kv.read(attend) <= topk * PAGE
        ranges = torch.tensor([[16], [s_kv - 16]], dtype=torch.int32)

        def select(kv=kv, ranges=ranges):
            return sparse_attn.lightning_topk(q, kv.tensor, torch.randn(1, 4), topk, *ranges)

        select()
        seen = (s_kv - 32) * PAGE
        reads = [kv.read(select) for _ in range(5)]  # Linux misses a page now and then
        assert 0.9 * seen < max(reads) <= seen, reads


@linux
def test_memory_of_a_prefill_does_not_grow_with_its_square(on_cpu):
    """[s_q, s_kv] in fp32 takes 16 MiB, then 144 MiB, and [s_q, heads, s_kv] eight times as much."""
    config = dataclasses.replace(MLA, index_n_heads=1, index_head_dim=16)
    peaks, layer = [], SparseMLA(config)
    for tokens in (2048, 6144):
        hidden, cache = torch.randn(tokens, config.hidden_size), DSACache(config, tokens)
        layer(hidden, cache=cache)  # what is allocated once is not counted
        cache.reset()
        peaks.append(peak_memory(lambda hidden=hidden, cache=cache: layer(hidden, cache=cache)))
    assert peaks[1] - peaks[0] < 96 << 20, peaks  # about 32 MiB, and what the allocator keeps by chance


def test_the_workspace_bounds_what_selection_holds():
    """The rows of logits that are held at a time fit the workspace, at any context."""
    held = []

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "sparse_attn":
                with self:
                    return ops.implementation("lightning_topk", "cpu")(ops.RECORDS["lightning_topk"](*args))
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and not function.is_view:
                held.append(result.nbytes)
            return result

    workspace = 1 << 20
    for s_kv in (1024, 16384):
        held.clear()
        inputs = torch.randn(300, 2, 8), torch.randn(s_kv, 8), torch.randn(300, 2)
        ranges = torch.zeros(300, dtype=torch.int32), torch.full((300,), s_kv, dtype=torch.int32)
        with native.use(None), Allocations():
            sparse_attn.lightning_topk(*inputs, 4, *ranges, workspace_bytes=workspace)
        rows = max(1, workspace // (40 * s_kv))
        assert max(held) <= 16 * rows * s_kv, (max(held), rows)  # int64 positions and the like


@pytest.mark.skipif(not native.available(), reason="the C++ kernels are not in use")
def test_the_workspace_bounds_a_ragged_batch():
    """64 sequences of 1 to 131,072 tokens: all logits of the batch would take 80 MiB."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.logspace(0, 1, 64, base=131_072, dtype=torch.float64).round().int()
    cu_seqlens_q = torch.tensor([0, *([1, 2, 3, 4] * 16)], dtype=torch.int32).cumsum(0).int()
    ke = lengths.repeat_interleave(cu_seqlens_q.diff().long())
    table = torch.randint(0, 9, (64, 2048), dtype=torch.int32, generator=g)
    q, k, weights = torch.randn(160, 2, 16), torch.randn(9, 64, 16), torch.randn(160, 2)
    batch = {"block_table": table, "cu_seqlens_q": cu_seqlens_q, "workspace_bytes": 4 << 20}

    def select():
        return sparse_attn.lightning_topk(q, k, weights, 512, ke * 0, ke, **batch)

    sparse_attn.lightning_topk(q[:4], k[0], weights[:4], 9)  # not to count the library
    peak = peak_memory(select)
    assert peak is None or peak < 12 << 20, f"{peak / 2**20:.1f} MiB"  # 4 MiB, and some for each thread
