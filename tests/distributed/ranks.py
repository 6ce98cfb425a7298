"""What each rank does and compares with one process: every check of exactness, and of bytes.

python tests/distributed/ranks.py WORLD
"""

import contextlib
import functools
import itertools
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from bench.ranks import on_ranks
from sparse_attn import DSACache, DSAConfig, SparseGQA, SparseMLA, lightning_topk, sparse_mla
from sparse_attn.distributed import Shards, division, global_merge, global_topk, traffic
from sparse_attn.distributed.ranks import Ranks
from sparse_attn.formats import pack_index_k

INTERLEAVES, E4M3 = (1, 64, 128), torch.float8_e4m3fn
SIZES = {"index_n_heads": 4, "index_head_dim": 32, "index_topk": 24, "indexer_rope": "half"}
MLA = DSAConfig(hidden_size=64, num_attention_heads=24, q_lora_rank=32, kv_lora_rank=48, qk_nope_head_dim=16,
                qk_rope_head_dim=8, v_head_dim=16, **SIZES)  # fmt: skip
GQA = DSAConfig(
    hidden_size=64, num_attention_heads=16, num_key_value_heads=8, head_dim=16, attention_bias=True, **SIZES
)
GQA_OF_THREE = DSAConfig(hidden_size=64, num_attention_heads=12, num_key_value_heads=6, head_dim=16, **SIZES)
# The sizes that fp8 caches have.
FP8 = DSAConfig.deepseek_v32(hidden_size=64, num_attention_heads=8, q_lora_rank=32, index_topk=24)


@functools.cache  # groups of many ranks take long to make
def mesh_of(**dims):
    return init_device_mesh("cpu", tuple(dims.values()), mesh_dim_names=tuple(dims))


def meshes():
    """Every way to divide a layer over the ranks that there are."""
    world = dist.get_world_size()
    for tp in [n for n in range(1, world + 1) if world % n == 0]:
        dims = {"tp": tp, "cp": world // tp}
        yield mesh_of(**{name: n for name, n in dims.items() if n > 1 or world == 1})


# The functions


def index_inputs(s_q, s_kv, dtype, plateau):
    q, k, weights = torch.randn(s_q, 8, 32), torch.randn(s_kv, 32), torch.randn(s_q, 8)
    if plateau:  # small integers: ties everywhere
        q, k, weights = (q > 0).float(), (k > 1).float(), torch.ones(s_q, 8)
    return q.to(dtype), k.to(dtype), weights


def mine(shards, x):
    """The rows that this rank stores, of ``[s_kv, ...]``."""
    return x[shards.to_local(torch.arange(len(x))) >= 0]


def selections_over_one_sequence():
    mesh = mesh_of(cp=dist.get_world_size())
    for dtype, interleave, plateau in itertools.product(
        (torch.float32, torch.bfloat16), INTERLEAVES, (False, True)
    ):
        shards = Shards(mesh, interleave)
        for s_q, s_kv, topk in ((1, 5, 16), (3, 700, 33), (9, 1500, 64), (0, 40, 8), (17, 130, 128)):
            q, k, weights = index_inputs(s_q, s_kv, dtype, plateau)
            ke = torch.randint(0, s_kv + 1, (s_q,), dtype=torch.int32)
            ke[-1:] = s_kv
            ks = ke // 3
            expected = lightning_topk(q, k, weights, topk, ks, ke)
            for max_length in (None, s_kv):
                got = global_topk(
                    q, mine(shards, k), weights, topk, ks, ke, shards=shards, max_length=max_length
                )
                assert torch.equal(got, expected), (dtype, interleave, plateau, s_q, s_kv)


def selections_over_a_ragged_batch():
    """Paged keys, in bf16 and in fp8, of sequences of which some have no query and some ranks no key."""
    mesh, page = mesh_of(cp=dist.get_world_size()), 16
    lengths, counts = [300, 3, 90, 41], [5, 1, 0, 7]
    cu = torch.tensor([0, *counts]).cumsum(0).int()
    ke = torch.cat([torch.arange(n - c, n) + 1 for n, c in zip(lengths, counts, strict=True)]).int()
    q, _, weights = index_inputs(sum(counts), 1, torch.bfloat16, False)
    keys = [torch.randn(n, 32).bfloat16() for n in lengths]
    for interleave in INTERLEAVES:
        shards = Shards(mesh, interleave)
        pages, table = paged(keys, page)
        own_pages, own_table = paged([mine(shards, k) for k in keys], page)
        expected = lightning_topk(q, pages, weights, 24, ke=ke, block_table=table, cu_seqlens_q=cu)
        options = {"ke": ke, "cu_seqlens_q": cu, "shards": shards, "max_length": 300}
        assert torch.equal(global_topk(q, own_pages, weights, 24, block_table=own_table, **options), expected)
    q, _, weights = (x.repeat(1, 1, 4) if x.dim() == 3 else x for x in (q, 0 * ke, weights))
    wide = [k.repeat(1, 4) for k in keys]
    whole, table = packed(wide, page)
    expected = lightning_topk(q, whole, weights, 24, ke=ke, block_table=table, cu_seqlens_q=cu)
    own, own_table = packed([mine(shards, k) for k in wide], page)
    assert torch.equal(global_topk(q, own, weights, 24, block_table=own_table, **options), expected)


def paged(keys, page_size):
    """Pages of all sequences, and their table; unused slots hold NaN."""
    most = max(1, *(-(-len(k) // page_size) for k in keys))
    pages = torch.full((len(keys) * most, page_size, keys[0].shape[1]), float("nan"), dtype=keys[0].dtype)
    table = torch.arange(len(keys) * most, dtype=torch.int32).view(len(keys), most)
    for row, k in zip(table.tolist(), keys, strict=True):
        pages[row] = torch.nn.functional.pad(k, (0, 0, 0, most * page_size - len(k))).view(
            most, page_size, -1
        )
    return pages, table


def packed(keys, page_size):
    pages, table = paged(keys, page_size)
    return pack_index_k(pages), table


def outputs():
    world = dist.get_world_size()
    mesh = mesh_of(cp=world)
    for dtype, interleave in itertools.product((torch.float32, torch.bfloat16), INTERLEAVES):
        shards, topk = Shards(mesh, interleave), 40
        q, kv = torch.randn(5, 24, 96, dtype=dtype), torch.randn(500, 96, dtype=dtype)
        indices = torch.stack([torch.randperm(500)[:topk] for _ in range(5)]).int()
        indices[0, 7:] = -1
        indices[1] = -1
        options = {"d_v": 64, "softmax_scale": 0.1, "return_lse": True}
        expected, expected_lse = sparse_mla(q, kv, indices, **options)
        part = sparse_mla(q, mine(shards, kv), shards.to_local(indices).int(), **options)
        out, lse = global_merge(*part, shards)
        close(out, expected)
        close(lse, expected_lse)
        if 24 % world == 0:
            own, own_lse = global_merge(*part, shards, own_heads=True)
            close(own, expected.chunk(world, 1)[dist.get_rank()])
            close(own_lse, expected_lse.chunk(world, 1)[dist.get_rank()])


def close(out, expected):
    assert out.shape == expected.shape and out.dtype == expected.dtype
    share = 1e-6 if out.dtype == torch.float32 else 2e-2
    nothing = expected.isinf()  # lse of a query that reads nothing
    assert torch.equal(out.isinf(), nothing)
    out, expected = (x.masked_fill(nothing, 0).double() for x in (out, expected))
    largest = max([1.0, *expected.abs().flatten().tolist()])
    bound = share * largest
    assert (out - expected).abs().le(bound).all(), f"{(out - expected).abs().max()} beside {largest}"


# The layers


def divided(cls, config, mesh, dtype=torch.float32):
    """A layer, and the same divided over the mesh."""
    torch.manual_seed(1)
    whole = cls(config).to(dtype)
    layer = cls(config, mesh=mesh, dtype=dtype)
    layer.load_state_dict(layer.part_of(whole.state_dict()))
    return whole, layer


STEPS = [  # new tokens of each of three sequences
    [0, 0, 0],
    [70, 0, 3],  # prefill, a sequence without a token
    [1, 400, 1],
    [130, 1, 0],  # a chunk
    [1, 1, 1],  # decode
    [4, 1, 2],  # drafts
    [1, 0, 0],
    [0, 0, 0],
]


def same_steps(cls, config, mesh, interleave=1, dtype=torch.float32, cache_dtype=None, capturable=False):
    whole, layer = divided(cls, config, mesh, dtype)
    options = {"max_tokens": 450, "batch_size": 3, "dtype": cache_dtype or dtype, "capturable": capturable}
    cache = DSACache(config, **options)
    options["mesh"] = mesh
    if "cp" in mesh.mesh_dim_names:
        options["interleave"] = interleave
    shared = DSACache(config, **options)
    for step, counts in enumerate(STEPS):
        hidden = torch.randn(sum(counts), config.hidden_size, dtype=dtype)
        cu = torch.tensor([0, *counts]).cumsum(0)
        expected, chosen = whole(hidden, cache=cache, cu_seqlens_q=cu, return_indices=True)
        again = chosen if step in (2, 4) else None
        out, positions = layer(hidden, cache=shared, cu_seqlens_q=cu, return_indices=True)
        assert torch.equal(positions, chosen), (mesh, interleave, counts)
        close(out, expected)
        assert shared.lengths == cache.lengths
        if counts == [4, 1, 2]:  # two drafts are rejected, and read again as others
            for c in (cache, shared):
                c.truncate(c.lengths[0] - 2)
        if again is not None:  # a selection made elsewhere, with positions that are not seen
            for c in (cache, shared):
                for b, n in enumerate(counts):
                    c.truncate(c.lengths[b] - n, b)
            given = torch.cat([again, torch.full_like(again[:, :1], 449), again[:, :1] * 0 - 3], 1)
            expected = whole(hidden, cache=cache, cu_seqlens_q=cu, indices=given)
            close(layer(hidden, cache=shared, cu_seqlens_q=cu, indices=given), expected)
    tokens = torch.randn(60, config.hidden_size, dtype=dtype)
    expected, chosen = whole(tokens, return_indices=True)
    out, positions = layer(tokens, return_indices=True)
    assert torch.equal(positions, chosen)
    close(out, expected)


def gqa(mesh):
    return GQA_OF_THREE if mesh.size() == 3 else GQA


def layers():
    """Each kind on two ranks and on three; on more one of them with each way to divide heads and keys."""
    for number, mesh in enumerate(meshes()):
        plain = [lambda mesh: same_steps(SparseMLA, MLA, mesh)]
        interleaved = [
            lambda mesh: same_steps(SparseMLA, MLA, mesh, 64),
            lambda mesh: same_steps(SparseMLA, MLA, mesh, 128, dtype=torch.bfloat16),
        ]
        kinds = [
            lambda mesh: same_steps(SparseMLA, MLA, mesh, capturable=True),
            lambda mesh: same_steps(SparseGQA, gqa(mesh), mesh, 64),
            lambda mesh: mesh.size() == 3 or same_steps(SparseMLA, FP8, mesh, cache_dtype=E4M3),
        ]
        if mesh.size() <= 3:
            chosen = plain + interleaved + kinds
        else:
            chosen = plain + interleaved[1:] if number == 0 else [kinds[number % 3]]
        for same in chosen:
            same(mesh)


def a_layer_that_shares_a_selection():
    for mesh in meshes():
        whole, layer = divided(functools.partial(SparseMLA, shares_selection=True), MLA, mesh)
        caches = [DSACache(MLA, 80, mesh=m, shares_selection=True) for m in (None, mesh)]
        for tokens in (70, 1):
            hidden = torch.randn(tokens, MLA.hidden_size)
            indices = torch.randint(-1, 71, (tokens, 30), dtype=torch.int32)
            expected = whole(hidden, cache=caches[0], indices=indices)
            close(layer(hidden, cache=caches[1], indices=indices), expected)


def weights_come_from_a_checkpoint():
    """In fp8, whose blocks of scales the parts of ranks cut; and the norms and the indexer whole."""
    whole = SparseMLA(MLA)
    stored = {name: x.clone() for name, x in whole.to_hf(3).items()}
    name = "model.layers.3.self_attn.q_b_proj.weight"
    rows, columns = stored[name].shape
    stored[name] = stored[name].to(torch.float8_e4m3fn)
    stored[name + "_scale_inv"] = torch.rand(-(-rows // 11), -(-columns // 8)) + 0.5
    dictionary = {**vars(MLA), "quantization_config": {"weight_block_size": [11, 8]}}
    dictionary = {name: value for name, value in dictionary.items() if value is not None}
    expected = SparseMLA.from_hf(stored, dictionary, 3, dtype=torch.float32)
    for mesh in meshes():
        layer = SparseMLA.from_hf(stored, dictionary, 3, mesh=mesh, dtype=torch.float32)
        parts = layer.part_of(expected.state_dict())
        assert all(torch.equal(x, parts[name]) for name, x in layer.state_dict().items())
        hidden = torch.randn(30, MLA.hidden_size)
        close(layer(hidden), expected(hidden))
        if mesh.size() > 1:
            with pytest.raises(ValueError, match="mesh: expected a layer that is not divided"):
                layer.to_hf(3)


@contextlib.contextmanager
def little_workspace():
    before = division.DEFAULT_WORKSPACE_BYTES
    division.DEFAULT_WORKSPACE_BYTES = 1 << 14
    yield
    division.DEFAULT_WORKSPACE_BYTES = before


def layers_in_a_little_workspace():
    """Keys are gathered in many parts, queries attend in many."""
    world = dist.get_world_size()
    if world > 4:  # nothing new, and slow
        return
    mesh = mesh_of(tp=2, cp=2) if world == 4 else mesh_of(cp=world)
    with little_workspace():
        same_steps(SparseMLA, MLA, mesh, 4)
        if world < 4:
            same_steps(SparseGQA, gqa(mesh), mesh)


# What is said of bytes


def received(monkeypatch):
    """Bytes that this rank receives from others by gathering and exchanging, and by sums."""
    counted = {"moved": 0, "summed": 0}
    run = Ranks._run

    def counting(self, collective, *tensors):
        size, result = self.size, tensors[0]
        if len(tensors) == 1:  # summed in place
            counted["summed"] += result.nbytes
        else:
            counted["moved"] += result.nbytes // size * (size - 1)
        return run(self, collective, *tensors)

    monkeypatch.setattr(Ranks, "_run", counting)
    return counted


def bytes_are_those_of_the_formulas():
    monkeypatch = pytest.MonkeyPatch()
    counted = received(monkeypatch)
    heads, topk, d = 24, MLA.index_topk, MLA.kv_lora_rank
    d_qk = d + MLA.qk_rope_head_dim
    for number, mesh in enumerate(meshes()):
        dtype = (torch.float32, torch.bfloat16)[number % 2]
        element = dtype.itemsize
        layer = SparseMLA(MLA, mesh=mesh, dtype=dtype)
        cache = DSACache(MLA, 4000, 2, dtype=dtype, mesh=mesh)
        tp, cp = layer.division.tp.size, layer.division.cp.size
        own = heads // (tp * cp)
        for counts in ([0, 1000], [60, 2900], [1, 1], [20, 1], [0, 1]):
            cu, tokens = torch.tensor([0, *counts]).cumsum(0), sum(counts)
            counted |= {"moved": 0, "summed": 0}
            layer(torch.randn(tokens, 64, dtype=dtype), cache=cache, cu_seqlens_q=cu)
            rows = 2 * cache.shards.rows(max(cache.lengths))
            part = traffic.share(tokens, tp)
            together = traffic.selected(tokens, topk, tp)
            with_keys = traffic.keys(rows, MLA.index_head_dim * element, cp) + traffic.selected(
                part, topk, cp
            )
            select = min(with_keys, traffic.candidates(part, min(topk, rows // 2), topk, cp)) + together
            if cp == 1:
                select = together
            with_latents = traffic.keys(rows, d_qk * element, cp)
            attend = min(with_latents, traffic.partial_outputs(tokens, own, d_qk, d, element, cp))
            assert counted["moved"] == select + attend, (mesh, counts)
            sums = (tp > 1) + (cp > 1)
            assert counted["summed"] == sums * tokens * 64 * element
            # Decode moves candidates, queries and outputs; a long prefill keys.
            if cp > 1 and counts == [1, 1]:
                assert attend < with_latents and select < with_keys
            if counts == [60, 2900]:
                assert attend == with_latents
    monkeypatch.undo()


def keys_take_their_part_of_memory():
    world = dist.get_world_size()
    for interleave, tokens in itertools.product(INTERLEAVES, (1, 1000, 4096)):
        whole, mesh = DSACache(MLA, tokens, 3), mesh_of(cp=world)
        cache = DSACache(MLA, tokens, 3, mesh=mesh, interleave=interleave)
        row = whole.nbytes / (3 * tokens)
        # A rank's part of each sequence, up to a whole number of interleaved blocks, and a spare row.
        assert cache.nbytes <= whole.nbytes / world + (3 * interleave + 1) * row


def wrong_arguments_are_refused():
    world = dist.get_world_size()
    cp, both, tp, dp = (mesh_of(**dims) for dims in
                        ({"cp": world}, {"tp": 1, "cp": world}, {"tp": world}, {"dp": world}))  # fmt: skip
    shards, (q, k, weights) = Shards(cp), index_inputs(2, 9, torch.float32, False)
    out, lse = torch.zeros(2, 7 * world + 1, 8), torch.zeros(2, 7 * world + 1)
    shared = {"shards": shards}

    def refused(error, message, function, *args, **kwargs):
        with pytest.raises(error, match=message):
            function(*args, **kwargs)

    refused(TypeError, "ranks: expected a DeviceMesh, got str", Shards, "cp")
    refused(ValueError, "ranks: expected a mesh of one dimension, such as .* got 2", Shards, both)
    refused(ValueError, "interleave: expected", Shards, cp, 0)
    refused(TypeError, "shards: expected Shards, got Device", global_topk, q, k, weights, 4, shards=cp)
    refused(TypeError, "shards: expected Shards, got DeviceMesh", global_merge, out, lse, cp)
    refused(ValueError, "lse: expected shape", global_merge, out, lse[:1], shards)
    refused(TypeError, "mesh: expected a DeviceMesh, got Shards", SparseMLA, MLA, mesh=shards)
    refused(ValueError, "mesh: expected dimensions named 'tp', 'cp'", SparseMLA, MLA, mesh=dp)
    refused(ValueError, "interleave: expected 1", DSACache, MLA, 9, mesh=tp, interleave=2)
    refused(ValueError, "interleave: expected 1 without a mesh", DSACache, MLA, 9, interleave=2)
    if world == 1:
        return
    double = q.double(), k.double(), weights.double(), 4
    refused(TypeError, "q: .*at most 32 bits.*float64", global_topk, *double, **shared)
    refused(ValueError, "topk: expected", global_topk, q, k, weights, 0, **shared)
    refused(ValueError, "out: expected heads that", global_merge, out, lse, shards, own_heads=True)
    sizes = {"hidden_size": 64, "head_dim": 16, **SIZES}
    odd = DSAConfig(num_attention_heads=4 * world + 1, num_key_value_heads=1, **sizes)
    refused(ValueError, f"mesh: .*num_attention_heads={4 * world + 1}, got", SparseGQA, odd, mesh=cp)
    if world in (2, 4):
        layer, cache = SparseGQA(GQA, mesh=tp), DSACache(GQA, 9)
        refused(ValueError, "cache: expected one made with the", layer, torch.zeros(1, 64), cache=cache)
    if world == 8:
        few = DSAConfig(num_attention_heads=24, num_key_value_heads=6, **sizes)
        refused(ValueError, "mesh: .*num_key_value_heads=6 of 4 query", SparseGQA, few, mesh=cp)
        layer, cache = SparseMLA(MLA, mesh=cp), DSACache(MLA, 9, mesh=mesh_of(tp=2, cp=4))
        refused(ValueError, "cache: expected one made with the", layer, torch.zeros(1, 64), cache=cache)


CASES = [
    selections_over_one_sequence,
    selections_over_a_ragged_batch,
    outputs,
    layers,
    a_layer_that_shares_a_selection,
    weights_come_from_a_checkpoint,
    layers_in_a_little_workspace,
    bytes_are_those_of_the_formulas,
    keys_take_their_part_of_memory,
    wrong_arguments_are_refused,
]


def run(cases):
    for case in cases:
        torch.manual_seed(0)
        case()


if __name__ == "__main__":
    chosen = [case for case in CASES if case.__name__ in sys.argv[2:]] or CASES
    on_ranks(int(sys.argv[1]), lambda: run(chosen))
