"""SparseMLA, SparseGQA and their cache: dense equivalence, prefill, steps, batches, selections, capture."""

import dataclasses
import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from sparse_attn import DSACache, DSAConfig, LightningIndexer, SparseGQA, SparseMLA, formats
from sparse_attn.distributed import shards
from sparse_attn.reference import index_logits, select_topk
from sparse_attn.rope import apply_rope, rope_cos_sin
from sparse_attn.testing import INT_MAX, INT_MIN, relative_error

spec = importlib.util.spec_from_file_location("graph_capture", Path(__file__).with_name("graph_capture.py"))
graph_capture = importlib.util.module_from_spec(spec)
spec.loader.exec_module(graph_capture)

COMMON = {
    **{"hidden_size": 96, "num_attention_heads": 4},
    **{"index_n_heads": 16, "index_head_dim": 32, "index_topk": 12, "indexer_rope": "half"},
}
MLA_SIZES = {
    **{"q_lora_rank": 48, "kv_lora_rank": 32},
    **{"qk_nope_head_dim": 24, "qk_rope_head_dim": 16, "v_head_dim": 20},
}
MLA = DSAConfig(**COMMON, **MLA_SIZES)
GQA = DSAConfig(**COMMON, num_key_value_heads=2, head_dim=32)
V32 = DSAConfig.deepseek_v32(  # with the sizes that fp8 caches have
    **{"hidden_size": 96, "num_attention_heads": 4, "q_lora_rank": 48, "index_n_heads": 4, "index_topk": 12},
    **{"indexer_fp8": True},
)
FP8 = torch.float8_e4m3fn
BUDGET = {torch.float32: 5e-6, torch.bfloat16: 2e-2}


def make(config, dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    return (SparseMLA if config.is_mla else SparseGQA)(config, dtype=dtype, **options)


@pytest.fixture(autouse=True, params=["cpu"] + ["cuda"] * torch.cuda.is_available())
def device(request):
    """Where every tensor of a test is made."""
    with torch.device(request.param):
        yield request.param


@pytest.fixture(params=[MLA, GQA], ids=["mla", "gqa"])
def config(request):
    return request.param


@pytest.fixture
def selections(monkeypatch):
    """Every selection that the layers make, as logical rows."""
    made = []

    def recording(*args, **kwargs):
        indices = lightning_topk(*args, **kwargs)
        made.append(indices)
        return indices

    lightning_topk = shards.lightning_topk
    monkeypatch.setattr(shards, "lightning_topk", recording)
    return made


@pytest.mark.parametrize("dtype", BUDGET)
@pytest.mark.parametrize("chunks", [[60], [20, 40], [1] * 60, [13, 1, 1, 30, 4, 11], [59, 1]], ids=str)
def test_chunks_and_decode_equal_one_prefill(config, selections, dtype, chunks):
    layer = make(config, dtype)
    hidden = torch.randn(60, 96, dtype=dtype)
    whole = layer(hidden)
    expected = selections.pop()
    cache = DSACache(config, 64, dtype=dtype)
    parts = [layer(part, cache=cache) for part in hidden.split(chunks)]
    assert cache.lengths == (60,)
    assert relative_error(torch.cat(parts), whole) < BUDGET[dtype]
    if dtype == torch.float32:
        made = torch.cat(selections)
        assert torch.equal(made, expected[60 - len(made) :])


def test_batches_equal_their_sequences_one_by_one(config):
    layer = make(config)
    first, second = torch.randn(2, 40, 96)
    cache = DSACache(config, 50, batch_size=3)
    steps = [([30, 0, 17], [0, 0, 0]), ([1, 0, 1], [30, 0, 17]), ([3, 9, 5], [31, 0, 18])]
    sequences = [first, second.flip(0), second]
    for counts, starts in steps:
        new = [s[a : a + n] for s, a, n in zip(sequences, starts, counts, strict=True)]
        cu = torch.tensor([0, *counts]).cumsum(0).int()
        out = layer(torch.cat(new), cache=cache, cu_seqlens_q=cu)
        for s, a, n, got in zip(sequences, starts, counts, out.split(counts), strict=True):
            assert relative_error(got, layer(s[: a + n])[a:]) < 5e-6
    assert cache.lengths == (34, 9, 23)


def test_packed_prefill_without_a_cache(config):
    layer = make(config)
    hidden = torch.randn(70, 96)
    cu = torch.tensor([0, 30, 30, 31, 70])
    packed = layer(hidden, cu_seqlens_q=cu)
    separate = torch.cat([layer(part) for part in hidden.split([30, 0, 1, 39])])
    assert relative_error(packed, separate) < 5e-6


def test_rejected_draft_tokens_are_forgotten(config):
    layer = make(config)
    hidden, drafts = torch.randn(40, 96), torch.randn(4, 96)
    cache = DSACache(config, 44)
    layer(hidden[:30], cache=cache)
    layer(drafts, cache=cache)  # speculative decoding: four tokens in one step
    cache.truncate(30)
    assert relative_error(layer(hidden[30:], cache=cache), layer(hidden)[30:]) < 5e-6
    cache.reset()
    assert cache.lengths == (0,)
    assert relative_error(layer(hidden[:9], cache=cache), layer(hidden[:9])) < 5e-6


def test_each_query_attends_to_its_own_past_only(config):
    layer = make(config)
    hidden = torch.randn(50, 96)
    changed = hidden.clone()
    changed[30:] = float("nan")
    assert torch.equal(layer(changed)[:30], layer(hidden)[:30])


def test_an_empty_batch(config):
    layer = make(config)
    assert layer(torch.empty(0, 96)).shape == (0, 96)
    cache = DSACache(config, 8, batch_size=2)
    out = layer(torch.empty(0, 96), cache=cache, cu_seqlens_q=torch.zeros(3, dtype=torch.int32))
    assert out.shape == (0, 96) and cache.lengths == (0, 0)


def dense_mla(layer, hidden, mask=None):
    """Multi-head latent attention as the models' papers write it: keys and values expanded, SDPA."""
    config = layer.config
    nope, rope, heads = config.qk_nope_head_dim, config.qk_rope_head_dim, config.num_attention_heads
    cos, sin = rope_cos_sin(torch.arange(len(hidden)), rope, config)
    q = layer.wq_b(layer.q_norm(layer.wq_a(hidden))).unflatten(-1, (heads, -1))
    q = torch.cat([q[..., :nope], apply_rope(q[..., nope:], cos, sin, "interleaved")], -1)
    latent, k_rope = layer.wkv_a(hidden).split([config.kv_lora_rank, rope], -1)
    k_rope = apply_rope(k_rope[:, None], cos, sin, "interleaved").expand(-1, heads, -1)
    expanded = layer.wkv_b(layer.kv_norm(latent)).unflatten(-1, (heads, -1))
    k_nope, v = expanded.split([nope, config.v_head_dim], -1)
    q, k, v = (rearrange(x, "t h d -> 1 h t d") for x in (q, torch.cat([k_nope, k_rope], -1), v))
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=config.softmax_scale)
    return layer.wo(rearrange(out, "1 h t d -> t (h d)"))


def dense_gqa(layer, hidden, mask=None):
    cos, sin = rope_cos_sin(torch.arange(len(hidden)), layer.config.head_dim, layer.config)
    q, k, v = (p(hidden).unflatten(-1, (-1, 32)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = (apply_rope(x, cos, sin, "half") for x in (q, k))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
    return layer.o_proj(rearrange(out, "1 h t d -> t (h d)"))


@pytest.mark.parametrize("topk", [50, 64, 2048])
@pytest.mark.parametrize("dtype", BUDGET)
def test_enough_topk_equals_dense_attention(config, device, dtype, topk):
    config = dataclasses.replace(config, index_topk=topk)
    layer = make(config, dtype)
    exact = make(config, torch.float64, backend="reference" if device == "cuda" else "auto")
    exact.load_state_dict({name: w.double() for name, w in layer.state_dict().items()})
    hidden = torch.randn(50, 96, dtype=dtype)
    dense = dense_mla if config.is_mla else dense_gqa
    truth = dense(exact, hidden.double())
    error, dense_error = relative_error(layer(hidden), truth), relative_error(dense(layer, hidden), truth)
    assert error < max(1.5 * dense_error, 1e-6)
    assert relative_error(exact(hidden.double()), truth) < 1e-12


def test_selecting_by_the_indexer_equals_selecting_all(config):
    """The path through scoring and the one that skips it agree where both see everything."""
    layer = make(dataclasses.replace(config, index_topk=20))
    hidden = torch.randn(25, 96)
    scored = layer(hidden)[:20]  # the longest query sees more than topk, so all are scored
    assert relative_error(scored, layer(hidden[:20])) < 5e-6


@pytest.mark.parametrize("name", ["reference", "the device's"])
def test_backends_agree_in_a_layer(config, device, name):
    hidden = torch.randn(40, 96)
    backend = name if name == "reference" else {"cpu": "cpu", "cuda": "triton"}[device]
    assert relative_error(make(config, backend=backend)(hidden), make(config)(hidden)) < 5e-6


def test_weights_carry_deepseeks_names():
    names = {name.rsplit(".", 1)[0] for name in make(MLA).state_dict()}
    attention_names = {"wq_a", "q_norm", "wq_b", "wkv_a", "kv_norm", "wkv_b", "wo"}
    assert names == attention_names | {f"indexer.{n}" for n in ("wq_b", "wk", "k_norm", "weights_proj")}
    assert "indexer.k_norm.bias" in make(MLA).state_dict()


def test_presets_have_the_models_shapes():
    v32, glm = DSAConfig.deepseek_v32(), DSAConfig.glm5()
    layer = SparseMLA(v32, device="meta", dtype=torch.bfloat16)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes["wq_a.weight"] == (1536, 7168)
    assert shapes["wkv_a.weight"] == (576, 7168)
    assert shapes["wkv_b.weight"] == (128 * 256, 512)
    assert shapes["wo.weight"] == (7168, 128 * 128)
    assert shapes["indexer.wq_b.weight"] == (64 * 128, 1536)
    assert shapes["indexer.weights_proj.weight"] == (64, 7168)
    assert v32.softmax_scale == pytest.approx(192**-0.5 * (0.1 * torch.tensor(40.0).log().item() + 1) ** 2)
    assert glm.softmax_scale == 256**-0.5
    assert (v32.indexer_rope, glm.indexer_rope) == ("half", "interleaved")


def test_from_dict_reads_both_spellings_of_rope():
    base = {
        **{k: v for k, v in COMMON.items() if k != "indexer_rope"},
        **{"model_type": "deepseek_v32", "vocab_size": 1000, "num_key_value_heads": 4, **MLA_SIZES},
    }
    yarn = {"factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0}
    old = DSAConfig.from_dict({**base, "rope_theta": 5e4, "rope_scaling": {"type": "yarn", **yarn}})
    new = DSAConfig.from_dict({**base, "rope_parameters": {"rope_type": "yarn", "rope_theta": 5e4, **yarn}})
    assert old == new and old.rope_theta == 5e4 and old.rope_scaling.factor == 4.0
    assert old.indexer_rope == "half"
    assert DSAConfig.from_dict(base, indexer_rope="interleaved", index_topk=3).index_topk == 3
    for interleave, pairing in ((True, "interleaved"), (False, "half")):
        named = {**base, "model_type": "glm_moe_dsa", "indexer_rope_interleave": interleave}
        assert DSAConfig.from_dict(named).indexer_rope == pairing
    assert DSAConfig.from_dict({**base, "model_type": "glm_moe_dsa"}).indexer_rope == "interleaved"
    assert hash(old) == hash(new)


def test_from_dict_of_a_grouped_query_model():
    llama = {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    index = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8, "indexer_rope": "half"}
    config = DSAConfig.from_dict(llama, **index)
    assert not config.is_mla and config.head_dim == 24 and config.index_rope_dim == 16


def test_indexer_follows_the_definition():
    """Each step of the indexer written out for one token."""
    torch.manual_seed(0)
    indexer = LightningIndexer(MLA)
    hidden, q_lora = torch.randn(1, 96), torch.randn(1, 48)
    q, k, weights = indexer(hidden, q_lora, torch.tensor([5]))
    raw = indexer.wk(hidden)[0]
    normed = (raw - raw.mean()) / (raw.var(correction=0) + 1e-6).sqrt()
    angle = 5 * 10000.0 ** (-torch.arange(8) / 8)
    turned = torch.complex(normed[:8], normed[8:16]) * torch.polar(torch.ones(8), angle)
    expected = torch.cat([turned.real, turned.imag, normed[16:]])
    torch.testing.assert_close(k[0], expected, rtol=1e-5, atol=1e-5)
    assert q.shape == (1, 16, 32)
    torch.testing.assert_close(q[0, :, 16:].flatten(), indexer.wq_b(q_lora).view(16, 32)[:, 16:].flatten())
    torch.testing.assert_close(weights, indexer.weights_proj(hidden) * 16**-0.5 * 32**-0.5)


def test_head_weights_stay_fp32_in_a_bf16_layer():
    layer = make(MLA, torch.bfloat16)
    hidden = torch.randn(3, 96, dtype=torch.bfloat16)
    _, weights = layer.indexer.queries(hidden, torch.randn(3, 48, dtype=torch.bfloat16), torch.arange(3))
    exact = hidden.double() @ layer.indexer.weights_proj.weight.double().T * (16 * 32) ** -0.5
    assert weights.dtype == torch.float32 and relative_error(weights, exact) < 1e-6


def test_fp8_indexer_keeps_scores_close():
    hidden, q_lora = torch.randn(40, 96), torch.randn(40, 48)
    positions, zero = torch.arange(40), torch.zeros(40, dtype=torch.int32)
    torch.manual_seed(0)
    plain = LightningIndexer(MLA)
    rounded = LightningIndexer(dataclasses.replace(MLA, indexer_fp8=True))
    rounded.load_state_dict(plain.state_dict())
    inputs = hidden, q_lora, positions
    a, b = (index_logits(*indexer(*inputs), zero, zero + 40) for indexer in (plain, rounded))
    assert 1e-4 < relative_error(b, a) < 0.1  # rounded, but the rotation of both sides cancels
    for x in rounded(*inputs)[:2]:  # at most 8 significant bits survive, of q and of k
        assert torch.equal(x, x.bfloat16().float())


@pytest.mark.parametrize("dtype", BUDGET)
@pytest.mark.parametrize("chunks", [[60], [20, 40], [13, 1, 1, 30, 4, 11], [59, 1]], ids=str)
def test_an_fp8_cache_is_read_as_what_its_bytes_mean(selections, dtype, chunks):
    """The same layer over a cache that holds the fp8 one's values: the same selections and results."""
    layer, hidden = make(V32, dtype), torch.randn(60, 96, dtype=dtype)
    cache, meant = DSACache(V32, 64, dtype=FP8), DSACache(V32, 64, dtype=dtype)
    meant.write = lambda *args, **rows: None  # it is filled here
    for name in ("kv", "index_k"):
        cache[name].fill_(0xFF)  # NaN, in values and scales
    for part in hidden.split(chunks):
        out = layer(part, cache=cache)
        meant["kv"].copy_(formats.unpack(cache["kv"]))
        meant["index_k"].copy_(formats.unpack(cache["index_k"]))
        assert relative_error(out, layer(part, cache=meant)) < BUDGET[dtype]
    assert cache.lengths == meant.lengths == (60,) and len(selections) >= 2
    assert all(torch.equal(*pair) for pair in zip(selections[::2], selections[1::2], strict=True))


def test_an_fp8_cache_rounds_and_selects_as_the_fp8_indexer_does(selections):
    layer, hidden = make(V32, torch.bfloat16), torch.randn(60, 96, dtype=torch.bfloat16)
    outs = [layer(hidden, cache=DSACache(V32, 60, dtype=dtype)) for dtype in (FP8, torch.bfloat16)]
    assert torch.equal(*selections)
    assert 1e-3 < relative_error(*outs) < 0.05


def test_batches_and_rejected_drafts_in_an_fp8_cache():
    layer = make(V32)
    sequences = torch.randn(2, 40, 96)
    cache = DSACache(V32, 50, batch_size=3, dtype=FP8)
    alone = [DSACache(V32, 50, dtype=FP8) for _ in range(2)]
    for counts in ([30, 0, 17], [4, 0, 4], [1, 0, 2]):
        starts = cache.lengths
        new = [sequences[i][starts[b] : starts[b] + counts[b]] for i, b in ((0, 0), (1, 2))]
        cu = torch.tensor([0, *counts]).cumsum(0)
        out = layer(torch.cat(new), cache=cache, cu_seqlens_q=cu)
        expected = torch.cat([layer(part, cache=one) for part, one in zip(new, alone, strict=True)])
        assert relative_error(out, expected) < 1e-2  # a product's last bit may move a value to the next code
        if counts[0] == 4:
            for held, b, n in ((cache, 0, 31), (cache, 2, 18), (alone[0], 0, 31), (alone[1], 0, 18)):
                held.truncate(n, b)
    assert cache.lengths == (32, 0, 20)


def test_what_an_fp8_cache_cannot_hold_is_refused():
    with pytest.raises(ValueError, match=r"dtype: float8_e4m3fn expects a config with kv_lora_rank=512.*got"):
        DSACache(MLA, 10, dtype=FP8)
    with pytest.raises(ValueError, match=r"kv_lora_rank=512.*got kv_lora_rank=None"):
        DSACache(GQA, 10, dtype=FP8)
    for dtype in (torch.uint8, torch.float8_e5m2):
        with pytest.raises(TypeError, match=f"dtype: expected .*float8_e4m3fn, got {dtype}"):
            DSACache(V32, 10, dtype=dtype)
    cache = DSACache(V32, 10, dtype=FP8)
    with pytest.raises(TypeError, match=r"cache: float8_e4m3fn expects a layer.*float64"):
        make(V32, torch.float64)(torch.randn(3, 96).double(), cache=cache)
    assert cache.lengths == (0,)


def test_caches_of_a_layer_hold_what_they_say():
    cache = DSACache(MLA, 10, batch_size=2, dtype=torch.bfloat16)
    assert cache["kv"].shape == (2, 10, 48) and cache["index_k"].shape == (2, 10, 32)
    assert cache.nbytes == 2 * 10 * (48 + 32) * 2
    cache = DSACache(V32, 10, batch_size=2, dtype=FP8)
    assert cache.dtype == FP8 and cache.nbytes == 2 * 10 * (656 + 132)
    assert [part.shape for part in cache.index_keys(7)] == [(2, 7, 128), (2, 7)]
    cache = DSACache(GQA, 10)
    assert cache["k"].shape == cache["v"].shape == (1, 10, 2, 32)


def test_a_cache_made_in_inference_mode_is_changed_outside_of_it(config):
    with torch.inference_mode():
        cache = DSACache(config, 8)
        make(config)(torch.randn(5, 96), cache=cache)
    cache.truncate(2)
    assert cache.lengths == (2,)
    cache.reset()
    assert cache.lengths == (0,)


# Selections that go in and out

KINDS = {  # config, dtype of the layer and of the cache
    "mla": (MLA, torch.float32, torch.float32),
    "mla in bf16": (MLA, torch.bfloat16, torch.bfloat16),
    "fp8 cache": (V32, torch.bfloat16, FP8),
    "gqa": (GQA, torch.float32, torch.float32),
}
STEPS = [[[60]], [[20], [40]], [[9], [1], [1], [49]], [[30, 0, 9], [1, 1, 1], [0, 7, 30]]]


@pytest.mark.parametrize("config, dtype, cache_dtype", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("steps", STEPS, ids=str)
def test_a_replay_gives_the_same_bits(config, dtype, cache_dtype, capturable, steps, monkeypatch):
    layer, batch = make(config, dtype), len(steps[0])
    recorded, replayed, plain = (
        DSACache(config, 64, batch, dtype=cache_dtype, capturable=capturable) for _ in range(3)
    )
    for counts in [*steps, [1] * batch]:
        step = {"hidden_states": torch.randn(sum(counts), 96, dtype=dtype), "cu_seqlens_q": cumulated(counts)}
        out, indices = layer(**step, cache=recorded, return_indices=True)
        longest = 64 if capturable else max(recorded.lengths)
        assert indices.shape == (sum(counts), min(12, longest)) and indices.dtype == torch.int32
        assert torch.equal(layer(**step, cache=plain), out)
        with monkeypatch.context() as patch:
            patch.delattr(shards, "lightning_topk")
            patch.delattr(LightningIndexer, "queries")
            again, read = layer(**step, cache=replayed, indices=indices.T.contiguous().T, return_indices=True)
        assert torch.equal(again, out) and torch.equal(read, indices)
    for name in recorded._tensors:  # a replay stores index keys too
        for held, other, n in zip(recorded[name], replayed[name], recorded.lengths, strict=True):
            assert torch.equal(held[:n], other[:n])


def test_a_replay_without_a_cache_gives_the_same_bits(config):
    layer, hidden, cu = make(config), torch.randn(70, 96), torch.tensor([0, 30, 30, 31, 70])
    out, indices = layer(hidden, cu_seqlens_q=cu, return_indices=True)
    assert torch.equal(layer(hidden, cu_seqlens_q=cu, indices=indices), out)
    assert torch.equal(layer(hidden, cu_seqlens_q=cu), out)


def test_what_a_layer_returns_is_the_selection(config):
    """Positions in each token's own sequence, the same from a packed prefill as from steps over a cache."""
    layer, hidden = make(config), torch.randn(60, 96)
    q_lora = layer.q_norm(layer.wq_a(hidden)) if config.is_mla else hidden
    expected = []
    for part, lora in zip(hidden.split([23, 37]), q_lora.split([23, 37]), strict=True):
        q, k, weights = layer.indexer(part, lora, torch.arange(len(part)))
        ks = torch.zeros(len(part), dtype=torch.int32)
        ke = torch.arange(1, len(part) + 1, dtype=torch.int32)
        expected.append(select_topk(index_logits(q, k, weights, ks, ke), 12, ks, ke))
    _, packed = layer(hidden, cu_seqlens_q=torch.tensor([0, 23, 60]), return_indices=True)
    assert torch.equal(packed, torch.cat(expected))
    cache, made = DSACache(config, 40, batch_size=2), []
    for a, b in ((0, 5), (5, 20), (20, 23)):
        new = torch.cat([hidden[a:b], hidden[23 + a : 23 + b]])
        cu = torch.tensor([0, b - a, 2 * (b - a)])
        made.append(layer(new, cache=cache, cu_seqlens_q=cu, return_indices=True)[1].chunk(2)[1])
    assert [len(rows[0]) for rows in made] == [5, 12, 12]
    made[0] = F.pad(made[0], (0, 7), value=-1)
    assert torch.equal(torch.cat(made), expected[1][:23])


@pytest.mark.parametrize("topk", [0, 1, 7, 40, 90])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("own", [12, 64])  # what the layer itself would select of 41 tokens
def test_a_selection_made_elsewhere(config, topk, cached, own):
    """Any positions, against dense attention over what is visible of them, as often as it stands there."""
    config = dataclasses.replace(config, index_topk=own)
    layer, hidden, lengths = make(config), torch.randn(63, 96), [41, 22]
    indices = torch.randint(-3, 45, (63, topk), dtype=torch.int32)
    indices[::5, -2:] = torch.tensor([INT_MIN, INT_MAX], dtype=torch.int32)[-topk:][:topk]
    cache = DSACache(config, 50, batch_size=2) if cached else None
    out = layer(hidden, cache=cache, cu_seqlens_q=torch.tensor([0, 41, 63]), indices=indices)
    dense = dense_mla if config.is_mla else dense_gqa
    for part, rows, result in zip(
        hidden.split(lengths), indices.split(lengths), out.split(lengths), strict=True
    ):
        n = len(part)
        position = torch.arange(n)
        count = (rows[:, :, None] == position).sum(1).tril()  # [n, n]
        empty = ~count.any(1)
        mask = count.float().log()
        mask[empty] = 0.0
        expected = dense(layer, part, mask)
        expected[empty] = 0.0
        assert relative_error(result, expected) < 5e-6


def test_a_replay_reads_the_recorded_tokens_in_other_programs():
    """What an engine recorded over an fp8 cache, by steps and in a batch, is replayed by a prefill."""
    layer, hidden = make(V32), torch.randn(2, 40, 96)
    cache, recorded = DSACache(V32, 40, batch_size=2, dtype=FP8), ([], [])
    for part in hidden.split([25, 1, 14], dim=1):
        n = part.shape[1]
        _, indices = layer(
            part.flatten(0, 1), cache=cache, cu_seqlens_q=torch.tensor([0, n, 2 * n]), return_indices=True
        )
        for made, rows in zip(recorded, indices.chunk(2), strict=True):
            made.append(rows)
    for sequence, rows in zip(hidden, map(torch.cat, recorded), strict=True):
        out, read = layer(sequence, indices=rows, return_indices=True)
        assert torch.equal(read, rows)
        visible = (rows[:, :, None] == torch.arange(40)).any(1)
        assert relative_error(out, dense_mla(layer, sequence, visible)) < 5e-6


@pytest.mark.parametrize("config, dtype, cache_dtype", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("capturable", [False, True])
def test_a_layer_that_shares_a_selection(config, dtype, cache_dtype, capturable):
    """It computes what a layer of its weights does with the same indices, and stores no index keys."""
    full = make(config, dtype)
    shared = make(config, dtype, shares_selection=True)
    weights = {name: w for name, w in full.state_dict().items() if not name.startswith("indexer.")}
    shared.load_state_dict(weights)
    assert shared.indexer is None
    options = {"batch_size": 2, "dtype": cache_dtype, "capturable": capturable}
    caches = [DSACache(config, 40, shares_selection=shares, **options) for shares in (False, True)]
    assert set(caches[0]._tensors) - set(caches[1]._tensors) == {"index_k"}
    assert caches[1].dtype == cache_dtype and caches[1].device == caches[0].device
    assert caches[1].nbytes < caches[0].nbytes
    for counts in ([20, 5], [1, 1], [4, 0], [0, 9]):
        hidden, cu = torch.randn(sum(counts), 96, dtype=dtype), cumulated(counts)
        out, indices = full(hidden, cache=caches[0], cu_seqlens_q=cu, return_indices=True)
        assert torch.equal(shared(hidden, cache=caches[1], cu_seqlens_q=cu, indices=indices), out)
        caches[0].truncate(caches[0].lengths[0] - 1)
        caches[1].truncate(caches[1].lengths[0] - 1)
    assert torch.equal(shared(hidden, indices=indices), full(hidden, indices=indices))


def test_wrong_selections_are_refused(config):
    layer, shared, hidden = make(config), make(config, shares_selection=True), torch.randn(6, 96)
    indices = torch.zeros(6, 3, dtype=torch.int32)
    cache, without = DSACache(config, 8), DSACache(config, 8, shares_selection=True)
    for wrong, error, words in (
        (indices.tolist(), TypeError, r"indices: expected a tensor \[tokens=6, topk\], got list"),
        (indices[:5], ValueError, r"indices: expected shape \[tokens=6, topk\], got \[5, 3\]"),
        (indices[:, None], ValueError, r"indices: expected shape \[tokens=6, topk\], got \[6, 1, 3\]"),
        (indices.long(), TypeError, "indices: expected dtype int32, got int64"),
        (indices.to("meta"), ValueError, "indices: expected device .*, got meta"),
    ):
        with pytest.raises(error, match=words):
            layer(hidden, cache=cache, indices=wrong)
    with pytest.raises(
        ValueError, match=r"indices: expected \[tokens, topk\], as the layer shares .* got None"
    ):
        shared(hidden, cache=without)
    with pytest.raises(ValueError, match=r"cache: expected .*layer's shares_selection=False, got True"):
        layer(hidden, cache=without)
    with pytest.raises(ValueError, match=r"cache: expected .*layer's shares_selection=True, got False"):
        shared(hidden, cache=cache, indices=indices)
    assert cache.lengths == without.lengths == (0,)


# Steps that a CUDA graph can hold; tests/test_gpu.py captures real ones.

CAPTURED = {  # config, dtype of the layer and of the cache
    "mla": (MLA, torch.float32, torch.float32),
    "mla in bf16": (MLA, torch.bfloat16, torch.bfloat16),
    "fp8 cache": (V32, torch.float32, FP8),
    "gqa": (GQA, torch.float32, torch.float32),
    "all visible": (dataclasses.replace(MLA, index_topk=40), torch.float32, torch.float32),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("config, dtype, cache_dtype", CAPTURED.values(), ids=CAPTURED)
def test_a_captured_step_follows_its_inputs(config, dtype, cache_dtype, batch, selections):
    """Replays with other hidden states and counts, against a cache whose lengths the host knows."""
    layer = make(config, dtype)
    on_host, captured = (DSACache(config, 40, batch, dtype=cache_dtype, capturable=c) for c in (False, True))
    prompt, *steps = {
        1: [[20], [4], [4], [4]],
        3: [[20, 0, 13], [1, 1, 2], [0, 4, 0], [4, 0, 0]],
    }[batch]
    hidden, boundaries = torch.zeros(4, 96, dtype=dtype), torch.tensor([0] * batch + [4])

    def step(cache):
        return layer(hidden, cache=cache, cu_seqlens_q=boundaries if batch > 1 else None)

    def compare(counts):
        hidden.normal_()
        boundaries.copy_(cumulated(counts))
        graph.replay()
        selections.clear()
        assert relative_error(graph.result, step(on_host)) < BUDGET[dtype]
        assert captured.lengths == on_host.lengths
        if dtype == torch.float32:  # none is made where all that a short sequence has is selected
            assert all(torch.equal(selected, made) for made in selections)

    tokens = torch.randn(sum(prompt), 96, dtype=dtype)
    for cache in (on_host, captured):
        layer(tokens, cache=cache, cu_seqlens_q=cumulated(prompt))
    graph = graph_capture.Graph(lambda: step(captured))
    selected = selections[-1] if selections else None
    captured.truncate(captured.lengths[-1] - 4, batch - 1)  # what capturing counted; seen by the replays
    for counts in steps:
        compare(counts)
        for cache in (on_host, captured):
            cache.truncate(cache.lengths[0] - 1)
    for cache in (on_host, captured):
        cache.reset()
    compare(steps[0])


def cumulated(counts):
    return torch.tensor([0, *itertools.accumulate(counts)])


@pytest.mark.parametrize("config, dtype, cache_dtype", KINDS.values(), ids=KINDS)
def test_a_captured_replay_follows_its_selection(config, dtype, cache_dtype):
    layer, shared = make(config, dtype), make(config, dtype, shares_selection=True)
    options = {"dtype": cache_dtype, "capturable": True}
    eager, captured = DSACache(config, 40, **options), DSACache(config, 40, **options)
    beside = [DSACache(config, 40, shares_selection=True, **options) for _ in range(2)]
    prompt, hidden = torch.randn(20, 96, dtype=dtype), torch.zeros(4, 96, dtype=dtype)
    indices = torch.zeros(4, 12, dtype=torch.int32)

    def step(cache, other):
        out, made = layer(hidden, cache=cache, return_indices=True)
        return made, out + shared(hidden, cache=other, indices=indices)

    for cache, other in zip((eager, captured), beside, strict=True):
        _, made = layer(prompt, cache=cache, return_indices=True)
        shared(prompt, cache=other, indices=made)
    graph = graph_capture.Graph(lambda: step(captured, beside[1]))
    for cache in (captured, beside[1]):
        cache.truncate(20)
    for _ in range(3):
        hidden.normal_()
        indices.random_(0, 20)
        graph.replay()
        for a, b in zip(graph.result, step(eager, beside[0]), strict=True):
            assert torch.equal(a, b)


def test_a_step_that_reads_lengths_on_the_host_cannot_be_captured(config):
    layer, cache = make(config), DSACache(config, 8)
    with pytest.raises(RuntimeError, match="cannot be captured"):
        graph_capture.Graph(lambda: layer(torch.zeros(1, 96), cache=cache))


def test_what_a_capturable_cache_refuses(config, device):
    if device == "cuda":
        pytest.skip("after an assertion failed on a GPU the process cannot use it")
    layer, cache = make(config), DSACache(config, 20, batch_size=2, capturable=True)
    hidden = torch.randn(14, 96)
    with pytest.raises(ValueError, match="cu_seqlens_q: expected with a cache of batch_size=2, got None"):
        layer(hidden, cache=cache)
    with pytest.raises(ValueError, match="cu_seqlens_q: expected device cpu, got meta"):
        layer(hidden, cache=cache, cu_seqlens_q=torch.empty(3, dtype=torch.int32, device="meta"))
    layer(hidden, cache=cache, cu_seqlens_q=torch.tensor([0, 10, 14], dtype=torch.int32))
    before = {name: cache[name].clone() for name in cache._tensors}
    for boundaries in ([0, 9, 13], [1, 9, 14], [0, -1, 14], [0, 11, 14], [0, 0, 17]):
        with pytest.raises(RuntimeError, match=r"cu_seqlens_q: expected .* 0 to 14 tokens.* max_tokens=20"):
            layer(hidden, cache=cache, cu_seqlens_q=torch.tensor(boundaries))
    assert cache.lengths == (10, 4)
    for name, tensor in before.items():
        torch.testing.assert_close(cache[name], tensor, equal_nan=True)
    layer(hidden[:0], cache=cache, cu_seqlens_q=torch.tensor([0, 0, 0]))
    layer(hidden, cache=cache, cu_seqlens_q=torch.tensor([0, 0, 14]))
    assert cache.lengths == (10, 18)
