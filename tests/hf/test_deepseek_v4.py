"""DeepSeek-V4's own: compressed entries behind a window, sinks, parameters in fp32, its caches."""

import copy

import pytest
import torch
from tiny import TOLERANCE, V4, assert_same, empty_cache, generate, logits, make_pair, models, padded, sa

transformers = pytest.importorskip("transformers")
LAYERS = range(len(V4["layer_types"]))
HCA, CSA = (
    V4["layer_types"].index(f"{name}_attention") for name in ("heavily_compressed", "compressed_sparse")
)


@pytest.fixture
def ids():
    torch.manual_seed(1)
    return torch.randint(3, 256, (2, 70))


def attend(model, layer, hidden, chunks=None, cache=None):
    """What one attention layer of a model makes of hidden states ``[B, S, hidden_size]``, fed in chunks to
    a cache or whole without one."""
    attention, window = model.model.layers[layer].self_attn, model.config.sliding_window
    cache = empty_cache(model) if chunks and cache is None else cache
    outs, past = [], 0
    for part in hidden.split(chunks or hidden.shape[1], 1):
        (batch, new), first = part.shape[:2], 0 if cache is None else max(0, past - window + 1)
        positions = torch.arange(past, past + new)[None]
        rope = {
            name: model.model.rotary_emb(part, positions, layer_type=name) for name in ("main", "compress")
        }
        if type(attention) in sa.DENSE:
            mask = sa.visible_rows(batch, new, past + new - first, past, first)
        else:
            rows = torch.arange(first, past + new)
            seen = (rows <= positions[0, :, None]) & (rows > positions[0, :, None] - window)
            mask = torch.where(seen, 0.0, torch.finfo(part.dtype).min).to(part.dtype).expand(batch, 1, -1, -1)
        outs.append(attention(part, rope, positions, mask, cache)[0])
        past += new
    return torch.cat(outs, 1)


@pytest.mark.parametrize("yarn", [False, True], ids=["default", "yarn"])
def test_the_sizes_of_the_real_model(yarn):
    """A window of 128, entries of 4 and of 128 tokens; chunks that end inside an entry."""
    rope = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64}
    changes = {"rope_parameters": {**rope, "beta_fast": 32, "beta_slow": 1} if yarn else None}
    changes |= {"sliding_window": 128, "compress_rate_csa": 4, "compress_rate_hca": 128, "index_topk": 24}
    dense, sparse = make_pair("v4", **changes)
    torch.manual_seed(1)
    hidden = torch.randn(1, 400, 96)
    for layer in LAYERS:
        expected = attend(dense, layer, hidden)
        for chunks in (None, [301, 1, 1, 97]):
            out = attend(sparse, layer, hidden, chunks)
            assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


def loaded(model, dtype, path):
    """Norms, sinks and position biases stay in fp32."""
    model.save_pretrained(path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(path, dtype=dtype, attn_implementation="eager")


def cast(model, dtype, path):
    return copy.deepcopy(model).to(dtype)


@pytest.mark.parametrize("layer", LAYERS, ids=V4["layer_types"])
@pytest.mark.parametrize(
    "dtype, made", [(torch.bfloat16, loaded), (torch.bfloat16, cast), (torch.float16, cast)]
)
def test_half_precision_layers_are_as_exact(layer, dtype, made, tmp_path):
    """One layer in 16 bits against itself in fp32: our error is not above that of transformers' eager."""
    torch.manual_seed(1)
    hidden = torch.randn(2, 70, 96).to(dtype)
    model = made(models("v4")[0], dtype, tmp_path)
    exact = copy.deepcopy(model).float()
    attention = model.model.layers[layer].self_attn
    assert (attention.sinks.dtype == attention.kv_norm.weight.dtype == torch.float32) == (made is loaded)
    truth, theirs = attend(exact, layer, hidden.float()), attend(model, layer, hidden)
    for changed in (exact, model):
        sa.enable(changed)
    scale = truth.abs().max()
    assert (attend(exact, layer, hidden.float()) - truth).abs().max() / scale < 1e-5
    theirs, ours = (
        (out.float() - truth).pow(2).mean().sqrt() / scale for out in (theirs, attend(model, layer, hidden))
    )
    assert ours <= 1.2 * theirs


@pytest.mark.parametrize("layer", [HCA, CSA])
def test_entries_are_those_of_transformers(layer, tmp_path):
    """To the last bit in bf16: what is kept in fp32 is added in fp32."""
    hidden = torch.randn(2, 70, 96).bfloat16()
    dense = loaded(models("v4")[0], torch.bfloat16, tmp_path)
    sparse = copy.deepcopy(dense)
    sa.enable(sparse)
    caches = [empty_cache(model) for model in (dense, sparse)]
    for model, cache in zip((dense, sparse), caches, strict=True):
        attend(model, layer, hidden, [30, 1, 39], cache)
    theirs, ours = (cache.layers[layer].compressed_kv for cache in caches)
    assert all(torch.equal(ours[name], entries) for name, entries in theirs.items())


@pytest.mark.parametrize("tokens", [1, 3, 4, 7, 8, 15, 16, 17])
def test_prompts_around_one_group_or_one_window(ids, tokens):
    for cache in (True, False):
        dense, sparse = (model(ids[:, :tokens], use_cache=cache).logits for model in models("v4"))
        assert_same(sparse, dense)


@pytest.mark.parametrize("chunks", [[1] * 40, [3, 4, 1, 62], [2, 1, 67], [7] * 10, [17, 53]])
def test_chunks_that_end_inside_a_group(ids, chunks):
    ids = ids[:, : sum(chunks)]
    dense, sparse = (logits(model, ids, chunks, empty_cache(model)) for model in models("v4"))
    assert_same(sparse, dense)


@pytest.mark.parametrize("lengths", [(3, 40), (40, 1), (9, 8)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_longer_than_a_group_or_a_window(ids, lengths, side):
    batch, mask = padded(ids, lengths, side)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for changes in ({}, {"use_cache": False}, {"use_cache": False, "position_ids": positions}):
        dense, sparse = (model(batch, attention_mask=mask, **changes).logits for model in models("v4"))
        assert_same(sparse[mask.bool()], dense[mask.bool()])
    if side == "left":  # positions that lag behind the entries
        tokens = [generate(model, batch, attention_mask=mask, max_new_tokens=20) for model in models("v4")]
        assert torch.equal(*tokens)
    width = batch.shape[1]
    batch, mask = torch.cat([batch, ids[:, -12:]], 1), torch.cat([mask, torch.ones(2, 12).long()], 1)
    for chunks in ([width, 12], [width, 5, 1, 1, 5]):
        dense, sparse = (logits(m, batch, chunks, empty_cache(m), mask) for m in models("v4"))
        assert_same(sparse[mask.bool()], dense[mask.bool()])


def test_generation_that_needs_another_cache_is_refused_by_transformers(ids):
    """If a release allows it one day, the tests of all families must cover it here too."""
    for options, error in (
        ({"prompt_lookup_num_tokens": 3}, "assisted generation is not supported with stateful models"),
        ({"cache_implementation": "static"}, "heavily_compressed_attention"),
    ):
        for model in models("v4"):
            with pytest.raises((ValueError, KeyError), match=error):
                generate(model, ids[:1], **options)


def test_other_caches_are_refused(ids):
    static = [transformers.cache_utils.StaticSlidingWindowLayer(32, 16) for _ in LAYERS]
    expected = r"expected .*DynamicCache\(config=model.config\), whose layer 0 is a DeepseekV4HCACache"
    for cache, message in (
        (transformers.DynamicCache(), f"cache: {expected}, got DynamicCache with NoneType"),
        (transformers.Cache(layers=static), "got Cache with StaticSlidingWindowLayer; static caches cannot"),
    ):
        with pytest.raises(ValueError, match=message):
            models("v4")[1](ids, past_key_values=cache)


def test_packed_sequences_are_refused(ids):
    packed = torch.cat([torch.arange(30), torch.arange(40)])[None]
    with pytest.raises(ValueError, match=r"position_ids: .*would share compressed entries"):
        models("v4")[1](ids, position_ids=packed, use_cache=False)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_both_names_of_the_cache(ids, name):
    model = models("v4")[1]
    hidden, positions = torch.randn(1, 20, 96), torch.arange(20)[None]
    rope = {kind: model.model.rotary_emb(hidden, positions, layer_type=kind) for kind in ("main", "compress")}
    for layer in LAYERS:
        cache = empty_cache(model)
        model.model.layers[layer].self_attn(
            hidden, rope, positions, sa.visible_rows(1, 20, 20), **{name: cache}
        )
        assert cache.layers[layer].get_seq_length() == 20


@pytest.mark.parametrize("lengths", [(70, 70), (70, 31)], ids=["whole", "padded"])
def test_a_recorded_selection_is_read_again(ids, lengths):
    """In a model whose indexer would select others: only what was recorded makes the results equal. The
    indexer's keys are stored meanwhile, so that it goes on by itself."""
    model = models("v4")[1]
    other = copy.deepcopy(model)
    other.model.layers[CSA].self_attn.compressor.indexer.q_b_proj.weight.data.normal_()
    batch, mask = padded(ids, lengths, "left")
    with sa.record(model) as selections:
        expected = logits(model, batch, [3, 30, *[1] * 5, 32], empty_cache(model), mask)
    assert list(selections) == [CSA] and selections[CSA].shape == (2, 70, V4["index_topk"])
    past = torch.arange(70)[None, :, None]
    assert (selections[CSA] < (past + 1) // V4["compress_rate_csa"]).all()
    assert (other(batch, attention_mask=mask).logits - expected)[mask.bool()].abs().max() > 1e-3
    for chunks in ([70], [33, 27, 10]):
        cache, own_cache = empty_cache(other), empty_cache(other)
        with sa.replay(other, selections):
            assert_same(logits(other, batch, chunks, cache, mask)[mask.bool()], expected[mask.bool()])
        logits(other, batch, chunks, own_cache, mask)
        keys, own_keys = (c.layers[CSA].compressed_kv["indexer"] for c in (cache, own_cache))
        assert (keys - own_keys).abs().max() <= TOLERANCE  # no layer before this one has an indexer


def test_replay_wants_a_selection_of_every_indexer(ids):
    with (
        pytest.raises(ValueError, match=rf"got none for layers \[{CSA}\]"),
        sa.replay(models("v4")[1], sa.Selections()),
    ):
        pass


def test_entries_grow_in_place_and_branch(ids, monkeypatch):
    """A new entry copies none of the others, and two continuations of one cache do not change each other."""
    monkeypatch.setattr(sa.growth, "SPARE", 1)
    model = models("v4")[1]
    cache = empty_cache(model)
    with torch.inference_mode():
        logits(model, ids[:, :40], [36, 4], cache)
    logits(model, ids[:, 40:44], 1, cache)  # what inference mode made cannot be written outside of it
    states = cache.layers[CSA]
    before = dict(states.compressed_kv)
    copies = {name: entries.clone() for name, entries in before.items()}
    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in branch.layers:
        layer.__dict__.update({name: dict(x) for name, x in vars(layer).items() if isinstance(x, dict)})
    logits(model, ids[:, 44:48], 2, cache)
    for name, entries in states.compressed_kv.items():
        assert entries.shape[1] == 12 and entries.data_ptr() == before[name].data_ptr()
    other = torch.cat([ids[:, :44], ids[:, 55:65]], 1)
    assert_same(logits(model, other[:, 44:], [4, 6], branch), model(other).logits[:, 44:])
    assert_same(logits(model, ids[:, 48:60], 1, cache), model(ids[:, :60]).logits[:, 48:])
    assert all(torch.equal(before[name], entries) for name, entries in copies.items())
