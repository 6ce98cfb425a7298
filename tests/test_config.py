"""Which configs become a layer: those of models whose attention is computed, and no other."""

import dataclasses

import pytest
import torch

from sparse_attn import DSAConfig, SparseGQA
from sparse_attn.testing import relative_error

V32 = {  # the published config.json
    **{"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "torch_dtype": "bfloat16"},
    **{
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "transformers_version": "4.44.2",
    },
    **{"attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02},
    **{"bos_token_id": 0, "eos_token_id": 1, "vocab_size": 129280, "tie_word_embeddings": False},
    **{"hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048},
    **{
        "num_hidden_layers": 61,
        "num_nextn_predict_layers": 1,
        "first_k_dense_replace": 3,
        "moe_layer_freq": 1,
    },
    **{"n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "ep_size": 1, "n_group": 8},
    **{"topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True},
    **{"routed_scaling_factor": 2.5, "aux_loss_alpha": 0.001, "seq_aux": True, "pretraining_tp": 1},
    **{"num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512},
    **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "rms_norm_eps": 1e-6},
    **{"index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048, "use_cache": True},
    **{"max_position_embeddings": 163840, "rope_theta": 10000},
    "rope_scaling": {
        **{"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
        **{"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "quantization_config": {
        **{"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "activation_scheme": "dynamic"},
        "weight_block_size": [128, 128],
    },
}
GLM5 = {  # the published config.json, in what concerns attention
    **{"architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa", "dtype": "bfloat16"},
    **{"attention_bias": False, "attention_dropout": 0.0, "head_dim": 64, "hidden_size": 6144},
    **{
        "first_k_dense_replace": 3,
        "num_hidden_layers": 78,
        "routed_scaling_factor": 2.5,
        "moe_layer_freq": 1,
    },
    **{"index_head_dim": 128, "index_n_heads": 32, "index_topk": 2048, "indexer_rope_interleave": True},
    **{"num_attention_heads": 64, "num_key_value_heads": 64, "q_lora_rank": 2048, "kv_lora_rank": 512},
    **{"qk_head_dim": 256, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256},
    **{"rms_norm_eps": 1e-5, "rope_interleave": True, "max_position_embeddings": 202752},
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
}
GLM52 = {
    **{**GLM5, "head_dim": 192, "moe_router_dtype": "float32", "index_share_for_mtp_iteration": True},
    **{"index_topk_freq": 4, "index_skip_topk_offset": 3, "index_topk_pattern": None},
}
INDEX = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8, "indexer_rope": "half"}
GQA = {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
ELSEWHERE = (  # families whose attention transformers computes, with what tells them from MLA or GQA
    *(
        "axk2",
        "deepseek_v4",
        "dots3_note",
        "dots3_note_text",
        "glm5_next",
        "glm5_next_text",
        "hy_v4",
        "hy_v4_vl",
    ),
    *("hy_v4_vl_text", "minimax_m3_vl", "minimax_m3_vl_text", "mistral_large4", "mistral_large4_text"),
    *("qwen4_exp", "qwen4_exp_text", "qwen3", "gemma2", "gpt_oss"),
)


def test_published_configs_are_the_presets():
    assert DSAConfig.from_dict(V32) == DSAConfig.deepseek_v32(num_key_value_heads=128)
    glm5 = DSAConfig.glm5(num_key_value_heads=64, head_dim=64)
    assert DSAConfig.from_dict(GLM5) == glm5
    shared = DSAConfig.from_dict(GLM52)
    assert dataclasses.replace(shared, indexer_types=(), head_dim=64) == glm5
    full = [layer for layer in range(79) if not shared.shares_selection(layer)]
    assert full == [0, 1, *range(2, 78, 4), 78]  # 78 is the draft layer, beyond the list


@pytest.mark.parametrize("kind", ["DeepseekV3", "DeepseekV32", "GlmMoeDsa", "Llama", "Mixtral", "Qwen2"])
def test_configs_of_transformers(kind):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip("an older transformers")
    theirs = getattr(transformers, f"{kind}Config")()
    index = {} if hasattr(theirs, "index_topk") else {**INDEX, "index_head_dim": 64}
    config = DSAConfig.from_dict(theirs.to_dict(), **index)
    assert config.num_attention_heads == theirs.num_attention_heads
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]


def test_a_layer_of_qwen2_has_biases_but_for_its_output():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen2Config(
        **{**GQA, "num_hidden_layers": 1, "vocab_size": 32, "intermediate_size": 32}, rms_norm_eps=1e-5
    )
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(theirs, attn_implementation="eager").eval()
    attention, hidden = model.layers[0].self_attn, torch.randn(1, 30, 96)
    for parameter in attention.parameters():
        parameter.copy_(0.2 * torch.randn_like(parameter))
    layer = SparseGQA(DSAConfig.from_dict({**theirs.to_dict(), **INDEX, "index_topk": 30}))
    assert not layer.load_state_dict(attention.state_dict(), strict=False).unexpected_keys
    rope = model.rotary_emb(hidden, torch.arange(30)[None])
    mask = torch.full((1, 1, 30, 30), torch.finfo(torch.float32).min).triu(1)
    assert relative_error(layer(hidden[0]), attention(hidden, rope, mask)[0][0]) < 5e-6


@pytest.mark.parametrize("model_type", ELSEWHERE)
def test_other_model_types_are_refused(model_type):
    with pytest.raises(ValueError, match=f"model_type: .*got '{model_type}'.*integrations.transformers runs"):
        DSAConfig.from_dict({**GLM5, "model_type": model_type})


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("index_kpool", 16, "index_kpool=16"),
        ("gated_norm_rank", 16, "gated_norm_rank=16"),
        ("layer_types", ["indexed_attention", "sliding_attention"], r"layer_types=\['indexed_attention', 's"),
        ("layer_types", ["linear_attention"] * 2, r"layer_types=\['linear_attention'\]"),
        ("sliding_window", 512, "sliding_window=512"),
        ("compress_ratios", [0, 4], r"compress_ratios=\[0, 4\]"),
        ("o_lora_rank", 1024, "o_lora_rank=1024"),
        ("learnable_sink_init", 0.5, "learnable_sink_init=0.5"),
        ("no_rope_layers", [1, 0], r"no_rope_layers=\[1, 0\]"),
        ("use_qk_norm", True, "use_qk_norm=True"),
        ("attn_output_gate", True, "attn_output_gate=True"),
        ("attn_logit_softcapping", 50.0, "attn_logit_softcapping=50.0"),
        ("rope_interleave", False, "rope_interleave=False"),
        ("qk_head_dim", 192, "qk_head_dim=192"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor=0.5"),
        ("is_causal", False, "is_causal=False"),
        ("per_layer_config", {"2": {"num_attention_heads": 4}}, "per_layer_config="),
        ("attention_bias", True, "attention_bias: expected False for MLA .* got True"),
        ("num_key_value_heads", 8, "num_key_value_heads: expected None or 64 for MLA .* got 8"),
        ("indexer_types", ["full", "half"], r"indexer_types: expected .*got \['full', 'half'\]"),
        ("indexer_types", ["shared", "full"], "indexer_types: expected .* 'full' for the first"),
        ("index_topk_pattern", "FXS", r"indexer_types: expected .*got \['full', 'X', 'shared'\]"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "rope_scaling: expected it or rope_parameters"),
        ("rope_parameters", {"rope_theta": 1e4, "factor": 4.0}, "type 'default' .*factor=4.0"),
        ("rope_parameters", {"mrope_section": [8, 8, 16]}, r"mrope_section=\[8, 8, 16\]"),
        ("rope_parameters", {"full_attention": {"rope_theta": 1e4}}, "full_attention="),
    ],
)
def test_a_field_that_changes_attention_is_refused_by_name(field, value, words):
    for config in (GLM5, {**GLM5, "model_type": None, "indexer_rope_interleave": True}):
        with pytest.raises(ValueError, match=words):
            DSAConfig.from_dict({**config, field: value})


def test_all_refused_fields_are_named():
    with pytest.raises(ValueError, match="no layer here computes index_kpool=4, sliding_window=128; take"):
        DSAConfig.from_dict({**GLM5, "index_kpool": 4, "sliding_window": 128})


@pytest.mark.parametrize(
    "config",
    [
        {"attention_dropout": 0.1, "partial_rotary_factor": 1.0, "position_embedding_type": "rope"},
        {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "is_causal": True},
        {
            "layer_types": ["full_attention"] * 2,
            "attn_output_gate": False,
            "index_kpool": None,
            "window_layers": [],
        },
        {"indexer_types": ["full"] * 2, "_attn_implementation": "sdpa", "router_scaling": 2.0, "top_k": 50},
        {
            "mlp_layer_types": ["sparse"],
            "final_logit_softcapping": 30.0,
            "num_sparse_experts": 4,
            "hc_mult": 4,
        },
        {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}},
        {"rope_interleave": False, "v_head_dim": 24, "image_token_index": 7},
    ],
    ids=lambda config: next(iter(config)),
)
def test_a_field_that_changes_nothing_is_not_refused(config):
    DSAConfig.from_dict({**GQA, **INDEX, **config})


@pytest.mark.parametrize("field", ["q_lora_rank", "qk_rope_head_dim", "v_head_dim"])
def test_sizes_of_latent_attention_make_no_grouped_query_layer(field):
    with pytest.raises(ValueError, match=f"{field}: expected None.* for GQA .* got 16"):
        DSAConfig.from_dict({**GQA, **INDEX, field: 16})


def test_yarn_computes_what_the_dict_says():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    scale = 0.1 * torch.tensor(4.0).log().item() + 1
    for given in (
        {"attention_factor": scale, "truncate": True, "rope_theta": 1e4},
        {"attention_factor": None},
    ):
        config = DSAConfig.from_dict({**GQA, **INDEX, "rope_scaling": {**yarn, **given}})
        assert config.rope_scaling.rotation_scale == pytest.approx(scale)
    for given, words in (
        ({"attention_factor": 1.0}, "type 'yarn' is not computed with attention_factor=1.0"),
        ({"truncate": False}, "truncate=False"),
        ({"llama_4_scaling_beta": 0.1, "truncate": False}, "llama_4_scaling_beta=0.1, truncate=False"),
    ):
        with pytest.raises(ValueError, match=words):
            DSAConfig.from_dict({**GQA, **INDEX, "rope_scaling": {**yarn, **given}})


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"indexer_types": ["full", "shared", "full", "shared"], "index_topk_freq": 4}, "fsfs"),
        ({"index_topk_pattern": "FFSS"}, "ffss"),
        ({"index_topk_pattern": ["full", "shared", "shared", "full"]}, "fssf"),
        ({"index_topk_freq": 2}, "ffsf"),
        ({"index_topk_freq": 3, "index_skip_topk_offset": 1}, "fssf"),
        ({"index_topk_freq": 1, "index_skip_topk_offset": 1}, "ffff"),
        ({}, "ffff"),
    ],
)
def test_the_layers_that_share_as_transformers_reads_them(given, expected):
    config = {**GLM5, "num_hidden_layers": 4, **given}
    shares = DSAConfig.from_dict(config).shares_selection
    assert "".join("fs"[shares(layer)] for layer in range(4)) == expected
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "GlmMoeDsaConfig"):
        pytest.skip("an older transformers")
    theirs = transformers.GlmMoeDsaConfig(**{**config, "dtype": None})
    assert "".join(name[0] for name in theirs.indexer_types) == expected
    assert DSAConfig.from_dict(theirs.to_dict()).indexer_types == tuple(theirs.indexer_types)


def test_a_frequency_needs_the_number_of_layers():
    with pytest.raises(ValueError, match="num_hidden_layers: expected with index_topk_freq=4, got None"):
        DSAConfig.from_dict({name: value for name, value in GLM52.items() if name != "num_hidden_layers"})
