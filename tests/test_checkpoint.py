"""Hugging Face checkpoints: a layer read from one computes what transformers computes with it."""

import json

import pytest
import torch

from sparse_attn import DSACache, DSAConfig, SparseMLA
from sparse_attn.checkpoint import Part, Safetensors, dequantize_blocks, from_hf
from sparse_attn.testing import relative_error

SIZES = {
    **{"hidden_size": 96, "num_attention_heads": 4, "q_lora_rank": 48, "kv_lora_rank": 40},
    **{"qk_rope_head_dim": 16, "qk_nope_head_dim": 24, "v_head_dim": 20},
    **{"index_topk": 12, "index_head_dim": 32, "index_n_heads": 32},
}
CONFIG = {**SIZES, "model_type": "deepseek_v32", "vocab_size": 100, "num_key_value_heads": 4}
PREFIX = "model.layers.3.self_attn."


def make(dtype=torch.float32):
    torch.manual_seed(0)
    return SparseMLA(DSAConfig.from_dict(CONFIG), dtype=dtype)


def quantize(weight, block=(128, 128)):
    """e4m3 values and one fp32 scale per block, as such checkpoints store them."""
    rows, columns = (-(-size // b) for size, b in zip(weight.shape, block, strict=True))
    padded = torch.zeros(rows * block[0], columns * block[1])
    padded[: weight.shape[0], : weight.shape[1]] = weight
    scale = padded.unflatten(0, (rows, -1)).unflatten(2, (columns, -1)).abs().amax((1, 3)) / 448
    steps = dequantize_blocks(torch.ones_like(weight), scale, block)
    return (weight / steps).to(torch.float8_e4m3fn), scale


def test_there_and_back():
    layer, hidden = make(), torch.randn(40, 96)
    state = layer.to_hf(3)
    assert set(state) == {
        PREFIX + name
        for name in (
            *("q_a_proj.weight", "q_a_layernorm.weight", "q_b_proj.weight", "kv_a_proj_with_mqa.weight"),
            *("kv_a_layernorm.weight", "kv_b_proj.weight", "o_proj.weight", "indexer.wq_b.weight"),
            *("indexer.wk.weight", "indexer.k_norm.weight", "indexer.k_norm.bias"),
            "indexer.weights_proj.weight",
        )
    }
    others = {"model.layers.13.self_attn.o_proj.weight": torch.zeros(1), "lm_head.weight": torch.zeros(1)}
    again = SparseMLA.from_hf({**state, **others}, CONFIG, 3)
    assert torch.equal(again(hidden), layer(hidden))
    assert again.wo.weight.data_ptr() == layer.wo.weight.data_ptr()
    bare = {name.removeprefix("model."): weight for name, weight in state.items()}  # a model without head
    assert torch.equal(SparseMLA.from_hf(bare, layer.config, 3)(hidden), layer(hidden))


def model_of_transformers(kind, **changes):
    """A model of two layers whose selections are far from ties."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip("an older transformers")
    yarn = {
        **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
        **{"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
    }
    config = getattr(transformers, f"{kind}Config")(
        **SIZES,
        **{"num_key_value_heads": 4, "num_hidden_layers": 2, "vocab_size": 32, "intermediate_size": 32},
        **{"first_k_dense_replace": 2, "rms_norm_eps": 1e-6, "rope_parameters": yarn, **changes},
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    for name, parameter in model.named_parameters():
        if "self_attn" in name and parameter.dim() > 1:
            parameter.mul_(4)
    return model


def attention(model, layer, hidden, *selection):
    """What transformers computes: attention of a layer over ``[tokens, hidden_size]``, and its selection."""
    tokens = len(hidden)
    rope = model.model.rotary_emb(hidden[None], torch.arange(tokens)[None])
    mask = torch.full((1, 1, tokens, tokens), torch.finfo(torch.float32).min).triu(1)
    return model.model.layers[layer].self_attn(hidden[None], rope, mask, None, None, *selection)


@pytest.mark.parametrize("kind", ["DeepseekV32", "GlmMoeDsa"])
def test_a_layer_of_transformers(kind):
    model, hidden = model_of_transformers(kind), torch.randn(50, 96)
    expected = attention(model, 1, hidden)[0][0]
    layer = SparseMLA.from_hf(model.state_dict(), model.config.to_dict(), 1)
    cache = DSACache(layer.config, 50)
    out = torch.cat([layer(part, cache=cache) for part in hidden.split([30, 1, 19])])
    assert relative_error(out, expected) < 5e-6
    back = layer.to_hf(1)
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in back.items())


@pytest.mark.parametrize(
    "sharing", [{"indexer_types": ["full", "shared"]}, {"index_topk_freq": 2, "index_skip_topk_offset": 1}]
)
def test_a_layer_that_shares_a_selection_as_in_transformers(sharing):
    model, hidden = model_of_transformers("GlmMoeDsa", **sharing), torch.randn(50, 96)
    config, state = {**model.config.to_dict(), "indexer_types": None, **sharing}, model.state_dict()
    assert PREFIX.replace("3", "1") + "indexer.wk.weight" not in state
    (expected,), _, selection = attention(model, 0, hidden)
    then = hidden + expected
    (shared,), _, _ = attention(model, 1, then, selection)
    unused = {name.replace("s.0.", "s.1."): weight for name, weight in state.items() if ".indexer." in name}
    for stored in (state, {**state, **unused}):
        for given in (config, DSAConfig.from_dict(config)):
            layers = [SparseMLA.from_hf(stored, given, layer) for layer in range(2)]
            caches = [DSACache(layer.config, 50, shares_selection=layer.shares_selection) for layer in layers]
            assert layers[1].indexer is None and caches[1].nbytes < caches[0].nbytes
            for a, b in ((0, 30), (30, 31), (31, 50)):
                out, indices = layers[0](hidden[a:b], cache=caches[0], return_indices=True)
                assert relative_error(out, expected[a:b]) < 1e-5
                out = layers[1](hidden[a:b] + out, cache=caches[1], indices=indices)
                assert relative_error(out, shared[a:b]) < 1e-5
            names = {name for name in state if name.startswith("model.layers.1.self_attn.")}
            assert set(layers[1].to_hf(1)) == names


@pytest.mark.parametrize("kind", ["DeepseekV32", "GlmMoeDsa"])
def test_latents_are_normalised_with_the_configs_epsilon(kind):
    """As the engines do; transformers has 1e-6 there, whatever its config says."""
    model, hidden = model_of_transformers(kind, rms_norm_eps=1e-5), torch.randn(50, 96)
    theirs = model.model.layers[1].self_attn
    for projection, rank in (theirs.q_a_proj, 48), (theirs.kv_a_proj_with_mqa, 40):
        projection.weight[:rank].mul_(0.01)  # latents of small variance
    layer = SparseMLA.from_hf(model.state_dict(), model.config.to_dict(), 1)
    assert relative_error(layer(hidden), attention(model, 1, hidden)[0][0]) > 1e-3
    for norm in (theirs.q_a_layernorm, theirs.kv_a_layernorm):
        norm.variance_epsilon = 1e-5
    assert relative_error(layer(hidden), attention(model, 1, hidden)[0][0]) < 5e-6


@pytest.mark.parametrize("block", [(128, 128), (32, 16)])
def test_fp8_blocks(block, tmp_path):
    """All projections in fp8 but the indexer's head weights, which are fp32 in a bf16 layer."""
    layer = make()
    state, exact = {}, {}
    for name, weight in layer.to_hf(3).items():
        if weight.dim() == 2 and "weights_proj" not in name:
            state[name], state[name + "_scale_inv"] = quantize(weight, block)
            exact[name] = dequantize_blocks(state[name], state[name + "_scale_inv"], block).bfloat16()
        else:
            state[name] = exact[name] = weight if "indexer" in name else weight.bfloat16()
        assert (exact[name].float() - weight).abs().max() <= 0.07 * weight.abs().max()
    named = {} if block == (128, 128) else {"quantization_config": {"weight_block_size": block}}
    config = {**CONFIG, **named}
    loaded = SparseMLA.from_hf(state, config, 3)
    assert loaded.wq_a.weight.dtype == loaded.q_norm.weight.dtype == torch.bfloat16
    assert loaded.indexer.weights_proj.weight.dtype == loaded.indexer.k_norm.bias.dtype == torch.float32
    for name, weight in loaded.to_hf(3).items():
        assert torch.equal(weight, exact[name])
    hidden = torch.randn(40, 96)
    assert relative_error(loaded(hidden.bfloat16()), layer(hidden)) < 0.2
    as_fp32 = SparseMLA.from_hf(state, config, 3, dtype=torch.float32)
    assert {p.dtype for p in as_fp32.parameters()} == {torch.float32}
    assert relative_error(loaded(hidden.bfloat16()), as_fp32(hidden)) < 0.1


@pytest.mark.parametrize(
    "blocks, scale, expected",
    [
        (
            [64, 128],
            [1, 1],
            "[1, 1] where [2, 1] is expected, one scale per block of {}=[64, 128] in [96, 80]",
        ),
        ([64, 64], [], "[] where [2, 2] is expected, one scale per block of {}=[64, 64] in"),
        (None, [2, 1], "[2, 1] where [1, 1] is expected, one scale per block of {}=[128, 128] (not in the"),
    ],
    ids=str,
)
def test_scales_that_do_not_fit_their_blocks_are_named(blocks, scale, expected):
    state = make().to_hf(3)
    name = PREFIX + "o_proj.weight"
    state[name], state[name + "_scale_inv"] = state[name].to(torch.float8_e4m3fn), torch.ones(scale)
    with pytest.raises(ValueError) as error:
        SparseMLA.from_hf(state, {**CONFIG, "quantization_config": {"weight_block_size": blocks}}, 3)
    expected = f"{name}_scale_inv of shape {expected.format('quantization_config.weight_block_size')}"
    assert expected in str(error.value)


@pytest.mark.parametrize("block", [128, [128], [0, 128], [64.0, 64]], ids=str)
def test_blocks_of_no_size_are_refused(block):
    config = {**CONFIG, "quantization_config": {"weight_block_size": block}}
    with pytest.raises(
        ValueError, match=r"quantization_config\.weight_block_size: expected two sizes .* got"
    ):
        SparseMLA.from_hf(make().to_hf(3), config, 3)


def test_dequantize_blocks_is_its_formula():
    weight = torch.randn(5, 7).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2)
    out = dequantize_blocks(weight, scale, (2, 4))
    for i in range(5):
        for j in range(7):
            assert out[i, j] == weight[i, j].float() * scale[i // 2, j // 4]
    with pytest.raises(ValueError, match=r"scale_inv: expected shape \[3, 2\] .* got \[2, 3\]"):
        dequantize_blocks(weight, scale.T, (2, 4))
    powers = torch.tensor([[0.5, 2.0]]).to(torch.float8_e8m0fnu)
    expected = weight[:2].float() * torch.tensor([0.5] * 4 + [2.0] * 3)
    assert torch.equal(dequantize_blocks(weight[:2], powers, (2, 4)), expected)


def test_files_are_read_a_tensor_at_a_time(tmp_path, monkeypatch):
    save_file = pytest.importorskip("safetensors.torch").save_file
    layer = make()
    state = {**layer.to_hf(3), "model.embed_tokens.weight": torch.zeros(100, 96)}
    names = sorted(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: state[name].contiguous() for name in held}, tmp_path / file)
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors = Safetensors(tmp_path)
    assert sorted(tensors) == names and len(tensors) == len(names)
    read = []
    get = Safetensors.__getitem__
    monkeypatch.setattr(
        Safetensors, "__getitem__", lambda self, name: (read.append(name), get(self, name))[1]
    )
    loaded = SparseMLA.from_hf(tensors, CONFIG, 3)
    assert sorted(read) == sorted(layer.to_hf(3))
    hidden = torch.randn(30, 96)
    assert torch.equal(loaded(hidden), layer(hidden))
    one = tmp_path / "one"
    one.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, one / "model.safetensors")
    for path in (one, str(one / "model.safetensors")):
        assert torch.equal(Safetensors(path)[names[0]], state[names[0]])
    with pytest.raises(FileNotFoundError, match=r"path: expected a .safetensors file, or a folder"):
        Safetensors(tmp_path / "nowhere")


def save(state, folder, files):
    """A checkpoint in so many files; one has no index."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    folder.mkdir()
    names = list(state)
    held = {f"{i}.safetensors" if files > 1 else "model.safetensors": names[i::files] for i in range(files)}
    for file, inside in held.items():
        save_file({name: state[name] for name in inside}, folder / file)
    if files > 1:
        weight_map = {name: file for file, inside in held.items() for name in inside}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return Safetensors(folder)


ROWS, COLUMNS = "wq_b.weight", "wo.weight"  # what is divided along dim 0 and dim 1
THEIRS = {ROWS: PREFIX + "q_b_proj.weight", COLUMNS: PREFIX + "o_proj.weight"}


def local_shapes(whole, parts):
    shapes = {name: list(tensor.shape) for name, tensor in whole.items()}
    for name, part in parts.items():
        shapes[name][part.dim] //= part.of
    return shapes


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, (128, 128), (100, 36), (7, 5)], ids=str)
def test_a_part_is_that_of_the_whole(kind, tmp_path, monkeypatch):
    """Bit for bit; from files, the rest of the weight is not read."""
    pytest.importorskip("safetensors")
    weights = {ROWS: torch.randn(24 * 15, 150), COLUMNS: torch.randn(150, 24 * 15)}
    state = {PREFIX + "q_a_layernorm.weight": torch.randn(150)}
    for name, theirs in THEIRS.items():
        if isinstance(kind, tuple):
            state[theirs], state[theirs + "_scale_inv"] = quantize(weights[name], kind)
        else:
            state[theirs] = weights[name].to(kind)
    block = kind if isinstance(kind, tuple) else None
    whole = from_hf(state, 3, {**local_shapes(weights, {}), "q_norm.weight": [150]}, block)
    sources = [state, save(state, tmp_path / "one", 1), save(state, tmp_path / "several", 3)]
    read = []
    get = Safetensors.__getitem__
    monkeypatch.setattr(
        Safetensors, "__getitem__", lambda self, name: (read.append(name), get(self, name))[1]
    )
    for of in (1, 2, 3, 4):
        for index in range(of):
            parts = {ROWS: Part(0, index, of), COLUMNS: Part(1, index, of)}
            for source in sources:
                loaded = from_hf(source, 3, local_shapes(whole, parts), block, parts)
                assert torch.equal(loaded["q_norm.weight"], whole["q_norm.weight"])
                for name, part in parts.items():
                    tensor = loaded[name]
                    assert tensor.dtype == whole[name].dtype and tensor.is_contiguous()
                    assert torch.equal(tensor, whole[name].chunk(of, part.dim)[index])
                    assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert set(read) == state.keys() - THEIRS.values()


@pytest.mark.parametrize("files", [0, 1, 2])
def test_the_whole_shape_is_expected_of_a_divided_weight(files, tmp_path):
    state = {THEIRS[ROWS]: torch.zeros(30, 8), THEIRS[COLUMNS]: torch.zeros(8, 24).to(torch.float8_e4m3fn)}
    state[THEIRS[COLUMNS] + "_scale_inv"] = torch.ones(2, 2)
    source = save(state, tmp_path / "model", files) if files else state
    parts = {ROWS: Part(0, 1, 4), COLUMNS: Part(1, 3, 4)}
    with pytest.raises(ValueError) as error:
        from_hf(source, 3, {ROWS: [8, 8], COLUMNS: [8, 6]}, (4, 5), parts)
    assert f"{THEIRS[ROWS]} of shape [30, 8] where [32, 8] is expected" in str(error.value)
    expected = (
        f"{THEIRS[COLUMNS]}_scale_inv of shape [2, 2] where [2, 5] is expected, one scale per block of "
    )
    assert expected + "quantization_config.weight_block_size=[4, 5]" in str(error.value)
    assert "in [8, 24]" in str(error.value)


def test_every_mismatch_is_named():
    state = make().to_hf(3)
    del state[PREFIX + "o_proj.weight"]
    state[PREFIX + "q_a_proj.bias"] = torch.zeros(48)
    state[PREFIX + "kv_b_proj.weight"] = torch.zeros(3, 40)
    state[PREFIX + "q_b_proj.weight"] = state[PREFIX + "q_b_proj.weight"].to(torch.float8_e4m3fn)
    state[PREFIX + "indexer.wk.weight_scale_inv"] = torch.ones(1, 1)
    with pytest.raises(ValueError, match="layer 3 does not fit") as error:
        SparseMLA.from_hf(state, CONFIG, 3)
    for part in (
        f"missing {PREFIX}o_proj.weight",
        f"unexpected {PREFIX}q_a_proj.bias",
        f"unexpected {PREFIX}indexer.wk.weight_scale_inv",
        f"{PREFIX}kv_b_proj.weight of shape [3, 40] where [176, 40] is expected",
        f"{PREFIX}q_b_proj.weight of dtype torch.float8_e4m3fn without q_b_proj.weight_scale_inv",
    ):
        assert part in str(error.value)


def test_wrong_layers_are_named():
    state = make().to_hf(3)
    with pytest.raises(ValueError, match=r"expected names with 'layers\.1\.self_attn\.', got none"):
        SparseMLA.from_hf(state, CONFIG, 1)
    with pytest.raises(ValueError, match="got none among names such as 'no tensor at all'"):
        SparseMLA.from_hf({}, CONFIG, 1)
    twice = {**state, **{f"draft.{name}": weight for name, weight in state.items()}}
    with pytest.raises(ValueError, match=r"expected one model, got .* under draft\.model.*, model\.layers"):
        SparseMLA.from_hf(twice, CONFIG, 3)
    shared = {name: weight for name, weight in state.items() if ".indexer." not in name}
    with pytest.raises(
        ValueError, match=r"missing .*indexer\.wk\.weight.* shares .* indexer_types in the config"
    ):
        SparseMLA.from_hf(shared, CONFIG, 3)
