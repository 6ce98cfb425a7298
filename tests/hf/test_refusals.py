"""enable() and disable(), and what is refused instead of being computed wrongly."""

import copy

import pytest
import torch
from tiny import (
    KINDS,
    MODEL_TYPES,
    VOCABULARY,
    assert_same,
    layers,
    make,
    make_pair,
    models,
    sa,
    transformers,
)

from sparse_attn.checkpoint import dequantize_blocks


@pytest.fixture
def ids():
    torch.manual_seed(1)
    return torch.randint(3, VOCABULARY, (2, 70))


def test_every_family_that_is_supported_has_a_tiny_model():
    assert {MODEL_TYPES.get(kind) for kind in KINDS} - {None} == {*sa.SUPPORTED}


@pytest.mark.parametrize("kind", KINDS)
def test_disable_undoes_enable(ids, kind):
    model = make(kind)
    before, names = model(ids).logits, list(model.state_dict())
    classes = [type(m) for m in model.modules()]
    implementations = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    sa.enable(model)
    sa.enable(model)
    assert model.config.get_text_config()._attn_implementation == "sparse_attn"
    assert_same(model(ids).logits, before)
    assert list(model.state_dict()) == names
    assert_same(copy.deepcopy(model)(ids).logits, before)
    sa.disable(model)
    sa.disable(model)
    assert [type(m) for m in model.modules()] == classes
    again = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    assert again == implementations
    assert torch.equal(model(ids).logits, before)


def test_a_saved_model_knows_nothing_of_us(ids, tmp_path):
    models("v32")[1].save_pretrained(tmp_path)
    assert "sparse_attn" not in (tmp_path / "config.json").read_text()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(loaded(ids).logits, models("v32")[0](ids).logits)


def test_accelerates_hooks_stay(ids):
    hooks = pytest.importorskip("accelerate.hooks")
    model = make("v32")
    before = model(ids).logits
    layer = layers(model)[1].self_attn
    hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(io_same_device=True))
    sa.enable(model)
    assert_same(model(ids).logits, before)
    ran = []
    layer._hf_hook.pre_forward = lambda module, *args, **kwargs: (ran.append(type(module)), (args, kwargs))[1]
    model(ids)
    assert ran == [type(layer)] == [sa.SPARSE[type(layers(make("v32"))[1].self_attn)]]
    assert layer._old_forward.__func__ is type(layer).forward
    sa.disable(model)
    assert torch.equal(model(ids).logits, before)


def test_kv_b_proj_in_block_fp8(ids):
    """Other fp8 projections need a GPU; this one is read directly, so it is tested here."""
    _, model = make_pair("v32")
    expected = copy.deepcopy(model)
    for ours, exact in zip(layers(model), layers(expected), strict=True):
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
        rf"model: expected one of {', '.join(sa.SUPPORTED)} \(transformers 5.*, tested with "
        r"5\.20\.x to 5\.24\.x\), got llama with LlamaAttention"
    )
    with pytest.raises(TypeError, match=message):
        sa.enable(llama)
    with pytest.raises(TypeError, match="transformers model, got Linear"):
        sa.enable(torch.nn.Linear(2, 2))
    sa.disable(llama)
    llama.set_attn_implementation("sparse_attn")
    with pytest.raises(TypeError, match=r"LlamaAttention, whose class was not changed; call .*enable"):
        llama(torch.ones(1, 4).long())


def test_other_kv_b_projections_are_refused():
    class Adapter(torch.nn.Linear):
        pass

    model = make("v32")
    layer = layers(model)[1].self_attn
    for projection, message in (
        (Adapter(40, 176, bias=False), r"kv_b_proj: expected torch.nn.Linear .* got Adapter"),
        (torch.nn.Identity(), r"kv_b_proj: .* got Identity with no weight"),
        (layer.kv_b_proj.to("meta"), r"kv_b_proj: .*meta device"),
    ):
        layer.kv_b_proj = projection
        with pytest.raises(TypeError, match=message):
            sa.enable(model)
    assert not any(type(module) in sa.DENSE for module in model.modules())


@pytest.mark.parametrize("kind", ["glm-shared", "mistral", "v4"])
def test_what_cannot_be_right_is_refused(ids, kind):
    if kind not in KINDS:
        pytest.skip("not in this release of transformers")
    model = models(kind)[1]
    name = type(layers(model)[0].self_attn).__name__
    longer = torch.ones(2, 80).triu(1).long()
    for error, changes, message in (
        (
            ValueError,
            {"attention_mask": torch.ones(2, 1, 70, 70)},
            "attention_mask: .* got a 4-D mask of torch.float32",
        ),
        (
            ValueError,
            {"attention_mask": longer, "use_cache": False},
            r"expected shape \[2, 70\], got \[2, 80\]",
        ),
        (
            TypeError,
            {"output_attentions": True},
            rf"output_attentions: {name} does not know .* no .S, T. matrix",
        ),
        (ValueError, {"is_causal": False}, r"expected causal attention, .* got .*bidirectional"),
        (TypeError, {"cu_seq_lens_q": torch.arange(2)}, "cu_seq_lens_q: .* are found from position_ids"),
        (TypeError, {"head_mask": 1}, "head_mask: .* does not know this argument, got 1$"),
    ):
        with pytest.raises(error, match=message):
            model(ids, **changes)
    with torch.enable_grad(), pytest.raises(ValueError, match=r"gradients: .*no_grad"):
        model(ids)
    model = copy.deepcopy(model).train()
    with pytest.raises(ValueError, match=f"training mode in {name}"):
        model(ids)
    model.gradient_checkpointing_enable()
    with torch.enable_grad(), pytest.raises(ValueError, match="no gradient checkpointing"):
        model(ids)
    model.eval()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"attn_implementation: expected 'sparse_attn' .* got 'eager'"):
        model(ids)


def test_a_layer_without_an_indexer_wants_a_selection():
    model = models("glm-shared")[1]
    x = torch.randn(1, 3, 96)
    layer = layers(model)[1].self_attn
    with pytest.raises(ValueError, match="top-k indices from a previous"):
        layer(x, model.model.rotary_emb(x, torch.arange(3)[None]), sa.inputs.visible_rows(1, 3, 3))


@pytest.mark.parametrize("version", ["5.19.0", "5.25.0.dev0", "4.57.1", "6.0"])
def test_other_releases_are_refused(version):
    with pytest.raises(ImportError, match=rf"is tested with 5\.20\.x to 5\.24\.x, got {version}"):
        sa._check_version(version)
    sa._check_version(transformers.__version__)
