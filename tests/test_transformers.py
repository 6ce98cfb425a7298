"""Models of transformers after enable() against the same models with transformers' own eager attention.

Weights are random and made larger than usual, so that attention is far from uniform and errors show;
32 index heads, so that no score is exactly zero and the selections of both sides must be equal.
"""

import copy
import functools
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_attn import index_logits
from sparse_attn.checkpoint import dequantize_blocks

transformers = pytest.importorskip("transformers")
try:
    import sparse_attn.integrations.transformers as sa
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)
v4 = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")

TOPK, VOCABULARY, TOLERANCE = 24, 256, 1e-5
SIZES = {
    **{"vocab_size": VOCABULARY, "hidden_size": 96, "max_position_embeddings": 2048, "num_hidden_layers": 2},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "first_k_dense_replace": 1},
    **{"intermediate_size": 128, "moe_intermediate_size": 32, "n_routed_experts": 4, "n_shared_experts": 1},
    **{"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 48, "kv_lora_rank": 40},
    **{"qk_rope_head_dim": 16, "qk_nope_head_dim": 24, "v_head_dim": 20},
    **{"index_topk": TOPK, "index_head_dim": 32, "index_n_heads": 32},
}
YARN = {
    **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32},
    **{"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
}
V4 = {  # windows of 16 tokens; entries of 4 tokens, of which 6 are selected, and of 8
    **{"num_hidden_layers": 3, "head_dim": 64, "sliding_window": 16, "index_topk": 6},
    **{"compress_rate_csa": 4, "compress_rate_hca": 8, "num_hash_layers": 1},
    **{"o_groups": 2, "o_lora_rank": 24, "hc_mult": 2, "num_key_value_heads": 1},
    "layer_types": [f"{name}_attention" for name in ("heavily_compressed", "compressed_sparse", "sliding")],
}
SHARED = {"num_hidden_layers": 4, "indexer_types": ["full", "shared", "shared", "full"]}
KINDS = {
    "v32": (transformers.DeepseekV32Config, {}),
    "v32-yarn": (transformers.DeepseekV32Config, {"rope_parameters": YARN, "attention_bias": True}),
    "glm": (transformers.GlmMoeDsaConfig, {}),
    "glm-shared": (transformers.GlmMoeDsaConfig, SHARED),
    "v4": (transformers.DeepseekV4Config, V4),
}
CACHES = [(kind, static) for kind in KINDS for static in (False, True) if (kind, static) != ("v4", True)]


@torch.no_grad()
def make(kind, **changes):
    """A model with transformers' attention."""
    config_class, sizes = KINDS[kind]
    torch.manual_seed(0)
    config = config_class(**{**SIZES, **sizes, **changes})
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for name, parameter in model.named_parameters():
        if "attn." in name and parameter.dim() > 1:
            parameter.mul_(4)
        if name.endswith((".sinks", ".position_bias")):  # zeros
            parameter.normal_()
    model.model.embed_tokens.weight[0] = 0.02  # else a generated pad token scores 0 everywhere: all ties
    return model


def make_pair(kind, **changes):
    """A model with transformers' attention and a copy with ours."""
    dense = make(kind, **changes)
    sparse = copy.deepcopy(dense)
    sa.enable(sparse)
    return dense, sparse


@pytest.fixture(scope="module")
def models():
    """The pair of each kind, made once."""
    return functools.cache(make_pair)


@pytest.fixture(params=KINDS)
def pair(request, models):
    return models(request.param)


@pytest.fixture
def ids():
    torch.manual_seed(1)
    return torch.randint(3, VOCABULARY, (2, 70))


def padded(ids, lengths, side):
    """The first ``lengths[b]`` tokens of each row, padded to one width, and the mask."""
    width = max(lengths)
    out, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width).long()
    for b, n in enumerate(lengths):
        place = slice(width - n, None) if side == "left" else slice(0, n)
        out[b, place], mask[b, place] = ids[b, :n], 1
    return out, mask


def generate(model, ids, **options):
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "disable_compile": True}
    return model.generate(ids, **{**settings, **options})[:, ids.shape[1] :]


def logits(model, ids, chunks, cache, mask=None):
    """Of every position, from chunks that are fed one after the other."""
    outs, seen = [], 0
    for part in ids.split(chunks, 1):
        seen += part.shape[1]
        seen_mask = None if mask is None else mask[:, :seen]
        outs.append(model(part, past_key_values=cache, attention_mask=seen_mask).logits)
    return torch.cat(outs, 1)


def assert_same(ours, theirs):
    assert (ours - theirs).abs().max() <= TOLERANCE
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def empty_cache(model, static=False):
    if static:
        return transformers.StaticCache(model.config, 80)
    return transformers.DynamicCache(config=model.config)


@pytest.mark.parametrize(("kind", "static"), CACHES)
@pytest.mark.parametrize(
    "chunks", [[60] + [1] * 10, [33, 27, 10], [20, 1, 1, 48]], ids=["decode", "chunks", "short-first"]
)
def test_logits_of_prefill_chunks_and_decode(models, ids, kind, chunks, static):
    dense, sparse = (logits(m, ids, chunks, empty_cache(m, static)) for m in models(kind))
    assert_same(sparse, dense)
    assert_same(models(kind)[1](ids, use_cache=False).logits, dense)


def test_greedy_tokens_of_manual_decode(pair, ids):
    tokens = []
    for model in pair:
        cache, new = empty_cache(model), [ids[:, :40]]
        for _ in range(16):
            new.append(model(new[-1], past_key_values=cache).logits[:, -1:].argmax(-1))
        tokens.append(torch.cat(new, 1))
    assert torch.equal(*tokens)


GENERATION = {
    "greedy": {},
    "static": {"cache_implementation": "static"},
    "chunked": {"prefill_chunk_size": 16},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.7},
    "beams": {"num_beams": 3},
    "sampled-beams": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


LEFT_PADDED = [(kind, name, (70, 31)) for kind in KINDS for name in GENERATION if name != "lookup"]
LEFT_PADDED.remove(("v4", "static", (70, 31)))
OTHERS = [(kind, "greedy", (70, 70)) for kind in KINDS]
OTHERS += [(kind, "lookup", (90,)) for kind in KINDS if kind != "v4"]


@pytest.mark.parametrize(("kind", "name", "lengths"), LEFT_PADDED + OTHERS)
def test_generate(models, ids, kind, name, lengths):
    ids, mask = padded(ids.repeat(1, 2), lengths, "left")
    tokens = []
    for model in models(kind):
        torch.manual_seed(5)
        tokens.append(generate(model, ids, attention_mask=mask, **GENERATION[name]))
    assert torch.equal(*tokens)


@pytest.mark.parametrize("kind", ["v32", "glm-shared"])
def test_left_padding_changes_nothing(models, ids, kind):
    """Each sequence of a padded batch gives the tokens that it gives alone. (Not so with V4: transformers
    compresses the padding, and its entries are part of what the model computes.)"""
    model = models(kind)[1]
    batch, mask = padded(ids, (29, 61), "left")
    together = generate(model, batch, attention_mask=mask)
    for b, n in enumerate((29, 61)):
        assert torch.equal(together[b : b + 1], generate(model, ids[b : b + 1, :n]))


@pytest.mark.parametrize(("kind", "static"), CACHES)
def test_padding_on_the_right_and_in_between(models, ids, kind, static):
    """A batch padded on its right goes on with new tokens: then the padding lies between real tokens."""
    batch, mask = padded(ids, (60, 37), "right")
    batch = torch.cat([batch, ids[:, -8:]], 1)
    mask = torch.cat([mask, torch.ones(2, 8).long()], 1)
    chunks = [60, 5, 1, 1, 1]
    dense, sparse = (logits(m, batch, chunks, empty_cache(m, static), mask) for m in models(kind))
    assert_same(sparse[mask.bool()], dense[mask.bool()])


@pytest.mark.parametrize("to_sparse", [True, False])
def test_either_side_goes_on_from_the_others_cache(pair, ids, to_sparse):
    first, then = pair if to_sparse else reversed(pair)
    cache = empty_cache(first)
    first(ids[:, :50], past_key_values=cache)
    assert_same(logits(then, ids[:, 50:], 4, cache), pair[0](ids).logits[:, 50:])


def test_dynamic_caches_grow_in_place_and_branch(models, ids, monkeypatch):
    """A new token copies no row of the cache, and two continuations of one cache do not change each other."""
    monkeypatch.setattr(sa.deepseek_v32.growth, "SPARE", 1)
    model = models("v32")[1]
    cache, branch = empty_cache(model), empty_cache(model)
    with torch.inference_mode():
        logits(model, ids[:, :40], [39, 1], cache)
    logits(model, ids[:, 40:44], 1, cache)  # what inference mode made cannot be written outside of it
    layer = cache.layers[0]
    before = [layer.keys, layer.values, layer.indexer_keys]
    copies = [rows.clone() for rows in before]
    logits(model, ids[:, 44:45], 1, cache)
    after = [layer.keys, layer.values, layer.indexer_keys]
    assert [rows.data_ptr() for rows in before] == [rows.data_ptr() for rows in after]
    for ours, theirs in zip(branch.layers, cache.layers, strict=True):
        ours.__dict__.update(theirs.__dict__)
    logits(model, ids[:, 45:50], [2, 3], cache)
    other = torch.cat([ids[:, :45], ids[:, 55:60]], 1)
    assert_same(logits(model, other[:, 45:], [2, 3], branch), model(other).logits[:, 45:])
    assert_same(logits(model, ids[:, 50:52], 1, cache), model(ids[:, :52]).logits[:, 50:])
    cache.crop(-7)
    assert_same(logits(model, other[:, 45:], [2, 3], cache), model(other).logits[:, 45:])
    assert all(torch.equal(*pair) for pair in zip(before, copies, strict=True))


def test_queries_in_chunks_are_the_same(pair, ids, monkeypatch):
    whole = pair[1](ids).logits
    monkeypatch.setattr(sa.inputs, "QUERY_BYTES", 2 * 7 * 4 * (40 + 16) * 4)  # seven tokens of two sequences
    assert_same(pair[1](ids).logits, whole)


def test_enough_topk_is_dense_attention(ids):
    """With index_topk above the context every visible token is read, and the indexer does not run."""
    dense, sparse = make_pair("v32", index_topk=128)
    batch, mask = padded(ids, (70, 41), "left")
    for changes in ({}, {"attention_mask": mask}, {"attention_mask": mask.flip(1)}):
        keep = changes.get("attention_mask", torch.ones_like(mask)).bool()
        assert_same(sparse(batch, **changes).logits[keep], dense(batch, **changes).logits[keep])


@pytest.mark.parametrize("kind", ["v32", "glm"])
def test_selections_by_score(models, ids, kind, monkeypatch):
    """Both sides' indices, compared by the scores that they select; ours never see the future."""
    dense, sparse = models(kind)
    theirs, ours = [], []
    hooks = [
        layer.self_attn.indexer.register_forward_hook(lambda module, args, out: theirs.append(out))
        for layer in dense.model.layers
    ]
    lightning_topk = sa.deepseek_v32.lightning_topk

    def recording(q, k, weights, topk, ks, ke, **options):
        selected = lightning_topk(q, k, weights, topk, ks, ke, **options)
        ours.append((selected, index_logits(q, k, weights, ks, ke, **options)))
        return selected

    monkeypatch.setattr(sa.deepseek_v32, "lightning_topk", recording)
    dense(ids), sparse(ids)
    for hook in hooks:
        hook.remove()
    assert len(ours) == len(theirs) == 2
    for (selected, scores), dense_selected in zip(ours, theirs, strict=True):
        dense_selected = dense_selected.flatten(0, 1)
        visible = torch.arange(1, 71).repeat(2)
        assert ((selected >= 0).sum(1) == visible.clamp_max(TOPK)).all()
        enough = visible >= TOPK
        got, expected = (
            scores[enough].gather(1, i[enough].long()).sort(1).values for i in (selected, dense_selected)
        )
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["v32", "glm-shared"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layers_are_as_exact(models, ids, kind, dtype):
    """One layer in 16 bits against itself in fp64: our error is not above that of transformers' eager."""
    dense, sparse = (m.model.layers[0].self_attn for m in models(kind))
    hidden = torch.randn(2, 70, SIZES["hidden_size"])
    rotary = models(kind)[0].model.rotary_emb

    def run(layer, dtype):
        layer = copy.deepcopy(layer).to(dtype)
        layer.indexer.weights_proj.float()  # as from_pretrained does
        x = hidden.to(dtype)
        mask = None
        if type(layer) in sa.SPARSE:
            mask = torch.full((70, 70), torch.finfo(dtype).min, dtype=dtype).triu(1).expand(2, 1, -1, -1)
        return layer(x, rotary(x, torch.arange(70)[None]), mask)[0].double()

    truth = run(sparse, torch.float64)
    scale = truth.abs().max()
    ours, theirs = ((run(layer, dtype) - truth).abs().max() / scale for layer in (sparse, dense))
    assert (run(dense, torch.float64) - truth).abs().max() / scale < 1e-6  # its softmax is fp32
    assert ours <= 1.5 * theirs


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that are made."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.seen.add(tuple(tensor.shape))
        return out


@pytest.mark.parametrize(
    "kind, past, new, size, others",
    [
        ("v32", 100, 31, 131, {31, 4}),  # the rows of the cache with the new tokens, or with the heads
        ("v4", 133, 63, 63, {15 + 63, 49}),  # the new tokens with the rows of the window, or with all entries
    ],
)
def test_no_mask_and_no_expanded_latent(models, kind, past, new, size, others):
    """No tensor has both the size and one of the others among its dimensions."""
    ids = torch.randint(3, VOCABULARY, (1, past + new))
    found = []
    for model in models(kind):
        cache = empty_cache(model)
        model(ids[:, :past], past_key_values=cache)
        with Shapes() as shapes:
            model(ids[:, past:], past_key_values=cache)
        found.append({shape for shape in shapes.seen if size in shape and others.intersection(shape)})
    dense, sparse = found
    assert dense and not sparse


def attend(model, layer, hidden, dtype, chunks=None):
    """What one attention layer of a V4 model makes of hidden states ``[B, S, hidden_size]``."""
    model = model.model
    attention = copy.deepcopy(model.layers[layer].self_attn).to(dtype)
    for name, parameter in attention.named_parameters():  # as from_pretrained leaves them
        if "norm" in name or name.endswith(("sinks", "position_bias")):
            parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))
    hidden, window = hidden.to(dtype), model.config.sliding_window
    cache = None if chunks is None else empty_cache(model)
    outs, past = [], 0
    for part in hidden.split(chunks or hidden.shape[1], 1):
        positions = torch.arange(past, past + part.shape[1])[None]
        rope = {name: model.rotary_emb(part, positions, layer_type=name) for name in ("main", "compress")}
        mask = None
        if type(attention) is v4.DeepseekV4Attention:
            rows = torch.arange(0 if cache is None else max(0, past - window + 1), past + part.shape[1])
            seen = (rows <= positions[0, :, None]) & (rows > positions[0, :, None] - window)
            mask = torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype).expand(len(part), 1, -1, -1)
        outs.append(attention(part, rope, positions, mask, past_key_values=cache)[0])
        past += part.shape[1]
    return torch.cat(outs, 1)


@pytest.mark.parametrize("layer", range(3), ids=V4["layer_types"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layers_of_v4_are_as_exact(models, layer, dtype):
    """One layer in 16 bits against itself in fp32: our error is not above that of transformers' eager."""
    torch.manual_seed(1)
    hidden = torch.randn(2, 70, 96).to(dtype).float()  # selections depend on them: no rounding there
    dense, sparse = models("v4")
    truth = attend(sparse, layer, hidden, torch.float32)
    scale = truth.abs().max()
    assert (attend(dense, layer, hidden, torch.float32) - truth).abs().max() / scale < 1e-5
    theirs, ours = (
        (attend(model, layer, hidden, dtype).float() - truth).pow(2).mean().sqrt() / scale
        for model in (dense, sparse)
    )
    assert ours <= 1.2 * theirs


@pytest.mark.parametrize("yarn", [False, True], ids=["default", "yarn"])
def test_the_sizes_of_the_real_v4_model(yarn):
    """A window of 128, entries of 4 and of 128 tokens; chunks that end inside an entry."""
    rope = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64}
    changes = {"rope_parameters": {**rope, "beta_fast": 32, "beta_slow": 1} if yarn else None}
    changes |= {"sliding_window": 128, "compress_rate_csa": 4, "compress_rate_hca": 128, "index_topk": 24}
    dense, sparse = make_pair("v4", **changes)
    torch.manual_seed(1)
    hidden = torch.randn(1, 400, 96)
    for layer in range(3):
        expected = attend(dense, layer, hidden, torch.float32)
        for chunks in (None, [301, 1, 1, 97]):
            out = attend(sparse, layer, hidden, torch.float32, chunks)
            assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_decode_step_compiles_in_one_graph(ids):
    torch._dynamo.reset()
    dense, sparse = make_pair("glm-shared", num_hidden_layers=2, indexer_types=["full", "shared"])
    batch, mask = padded(ids, (60, 25), "left")
    compiled = torch.compile(sparse.forward, fullgraph=True, backend="aot_eager")
    results = []
    for model, step in ((dense, dense.forward), (sparse, compiled)):
        model.set_experts_implementation("batched_mm")  # the loop over experts does not compile
        cache, outs = transformers.StaticCache(model.config, 70), []
        model(batch, past_key_values=cache, attention_mask=mask)
        for t in range(4):
            now = torch.cat([mask, torch.ones(2, t + 1).long()], 1)
            full = torch.nn.functional.pad(now, (0, 70 - now.shape[1]))  # one shape for all steps
            outs.append(step(ids[:, 60 + t : 61 + t], past_key_values=cache, attention_mask=full).logits)
        results.append(torch.cat(outs, 1))
    assert_same(results[1], results[0])


def test_disable_undoes_enable(ids):
    model = make("glm-shared")
    before, names = model(ids).logits, list(model.state_dict())
    classes = [type(m) for m in model.modules()]
    sa.enable(model)
    sa.enable(model)
    assert model.config._attn_implementation == "sparse_attn"
    assert_same(model(ids).logits, before)
    assert list(model.state_dict()) == names
    assert_same(copy.deepcopy(model)(ids).logits, before)
    sa.disable(model)
    sa.disable(model)
    assert [type(m) for m in model.modules()] == classes
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(ids).logits, before)


def test_a_saved_model_knows_nothing_of_us(models, ids, tmp_path):
    models("v32")[1].save_pretrained(tmp_path)
    assert "sparse_attn" not in (tmp_path / "config.json").read_text()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(loaded(ids).logits, models("v32")[0](ids).logits)


def test_accelerates_hooks_stay(ids):
    hooks = pytest.importorskip("accelerate.hooks")
    model = make("v32")
    before = model(ids).logits
    layer = model.model.layers[1].self_attn
    hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(io_same_device=True))
    sa.enable(model)
    assert_same(model(ids).logits, before)
    ran = []
    layer._hf_hook.pre_forward = lambda module, *args, **kwargs: (ran.append(type(module)), (args, kwargs))[1]
    model(ids)
    assert ran == [sa.deepseek_v32.SparseDeepseekV32Attention]
    assert layer._old_forward.__func__ is sa.deepseek_v32.SparseDeepseekV32Attention.forward
    sa.disable(model)
    assert torch.equal(model(ids).logits, before)


def test_kv_b_proj_in_block_fp8(ids):
    """Other fp8 projections need a GPU; this one is read directly, so it is tested here."""
    _, model = make_pair("v32")
    expected = copy.deepcopy(model)
    for ours, exact in zip(model.model.layers, expected.model.layers, strict=True):
        linear = ours.self_attn.kv_b_proj
        weight = linear.weight.data
        scale = torch.rand(6, 3) * 1e-3 + 1e-3
        fp8 = (weight / dequantize_blocks(torch.ones_like(weight), scale, (32, 16))).to(torch.float8_e4m3fn)
        linear.weight = torch.nn.Parameter(fp8, requires_grad=False)
        linear.weight_scale_inv, linear.block_size = torch.nn.Parameter(scale), (32, 16)
        exact.self_attn.kv_b_proj.weight.data = dequantize_blocks(fp8, scale, (32, 16))
    sa.disable(model)
    sa.enable(model)
    assert_same(model(ids).logits, expected(ids).logits)


def test_other_models_are_refused():
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2)
    llama = transformers.LlamaForCausalLM(config).eval()
    message = (
        r"DeepseekV32Attention or GlmMoeDsaAttention or DeepseekV4Attention \(transformers 5.*, tested with "
        r"5\.20\.x to 5\.23\.x\), got LlamaForCausalLM with LlamaAttention"
    )
    with pytest.raises(TypeError, match=message):
        sa.enable(llama)
    with pytest.raises(TypeError, match="transformers model, got Linear"):
        sa.enable(torch.nn.Linear(2, 2))
    sa.disable(llama)
    llama.set_attn_implementation("sparse_attn")
    with pytest.raises(TypeError, match=r"LlamaAttention, whose forward was not replaced; call .*enable"):
        llama(torch.ones(1, 4).long())


def test_other_kv_b_projections_are_refused():
    class Adapter(torch.nn.Linear):
        pass

    model = make("v32")
    layer = model.model.layers[1].self_attn
    for projection, message in (
        (Adapter(40, 176, bias=False), r"kv_b_proj: expected torch.nn.Linear .* got Adapter"),
        (torch.nn.Identity(), r"kv_b_proj: .* got Identity with no weight"),
        (layer.kv_b_proj.to("meta"), r"kv_b_proj: .*meta device"),
    ):
        layer.kv_b_proj = projection
        with pytest.raises(TypeError, match=message):
            sa.enable(model)
    assert not any(type(module) in sa.DENSE for module in model.modules())


@pytest.mark.parametrize(
    "kind, name, restarts",
    [("glm-shared", "GlmMoeDsa", "attention_mask"), ("v4", "DeepseekV4", "position_ids")],
)
def test_what_cannot_be_right_is_refused(models, ids, kind, name, restarts):
    model = models(kind)[1]
    packed, longer = torch.arange(35).repeat(2)[None], torch.ones(2, 80).triu(1).long()
    shapes = r"attention_mask: expected shape \[2, 70\], got \[2, 80\]"
    for changes, message in (
        ({"attention_mask": torch.ones(2, 1, 70, 70)}, r"attention_mask: .* none, got .2, 1, 70, 70."),
        ({"attention_mask": longer, "use_cache": False}, shapes),
        ({"position_ids": packed, "use_cache": False}, f"{restarts}: .* packed in a row"),
        ({"output_attentions": True}, "output_attentions"),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids, **changes)
    with torch.enable_grad(), pytest.raises(ValueError, match=r"gradients: .*no_grad"):
        model(ids)
    model = copy.deepcopy(model).train()
    with pytest.raises(ValueError, match=f"training mode in Sparse{name}Attention"):
        model(ids)
    model.gradient_checkpointing_enable()
    with torch.enable_grad(), pytest.raises(ValueError, match="no gradient checkpointing"):
        model(ids)
    model.eval()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="under attn_implementation 'eager'"):
        model(ids)


def test_a_layer_without_an_indexer_wants_a_selection(models):
    model = models("glm-shared")[1]
    x = torch.randn(1, 3, SIZES["hidden_size"])
    layer = model.model.layers[1].self_attn
    with pytest.raises(ValueError, match=r"prev_topk_indices: .*layer 1 has no indexer"):
        layer(x, model.model.rotary_emb(x, torch.arange(3)[None]), None)


def test_other_caches_of_v4_are_refused(models, ids):
    static = [transformers.cache_utils.StaticSlidingWindowLayer(32, 16) for _ in range(3)]
    expected = r"expected .*DynamicCache\(config=model.config\), whose layer 0 is a DeepseekV4HCACache"
    for cache, message in (
        (transformers.DynamicCache(), f"past_key_values: {expected}, got"),
        (transformers.Cache(layers=static), "got Cache with StaticSlidingWindowLayer; static caches cannot"),
    ):
        with pytest.raises(ValueError, match=message):
            models("v4")[1](ids, past_key_values=cache)


@pytest.mark.parametrize("version", ["5.19.0", "5.24.0.dev0", "4.57.1", "6.0"])
def test_other_releases_are_refused(version):
    with pytest.raises(ImportError, match=rf"is tested with 5\.20\.x to 5\.23\.x, got {version}"):
        sa._check_version(version)
    sa._check_version(transformers.__version__)


def test_the_benchmark_compares_and_times(monkeypatch, tmp_path):
    pytest.importorskip("rich", reason="rich is in the demo extra")
    script = Path(__file__).parents[1] / "benchmarks" / "hugging_face.py"
    record = tmp_path / "record.jsonl"
    arguments = ["--contexts", "2100", "--prefill", "64", "--rounds", "1", "--json", str(record)]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments, "--threads", str(torch.get_num_threads())])
    runpy.run_path(str(script), run_name="__main__")
    decode, prefill = map(json.loads, record.read_text().splitlines())
    assert decode["case"] == "decode at 2,100" and prefill["case"] == "prefill of 64"
    for row in (decode, prefill):
        assert 0 < row["difference"] < 1e-4
        assert row["sparse_attn_seconds"]["median"] > 0
