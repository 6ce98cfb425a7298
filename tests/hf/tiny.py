"""Tiny models of every family of transformers that has an indexer, and how their results are compared.

Weights are random and made larger than usual, so that attention is far from uniform and errors show;
32 index heads, so that no score is exactly zero and the selections of both sides must be equal.
"""

import copy
import functools

import pytest
import torch

transformers = pytest.importorskip("transformers")
try:
    import sparse_attn.integrations.transformers as sa
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

TOPK, VOCABULARY, TOLERANCE = 24, 256, 1e-5
COMMON = {
    **{"vocab_size": VOCABULARY, "hidden_size": 96, "max_position_embeddings": 2048, "num_hidden_layers": 2},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "intermediate_size": 128},
    **{"moe_intermediate_size": 32, "num_experts_per_tok": 2},
}
EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
MLA = {
    **COMMON,
    **EXPERTS,
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 48, "kv_lora_rank": 40},
    **{"qk_rope_head_dim": 16, "qk_nope_head_dim": 24, "v_head_dim": 20},
    **{"index_topk": TOPK, "index_head_dim": 32, "index_n_heads": 32},
}
FIRST_DENSE = {"first_k_dense_replace": 1}
YARN = {
    **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32},
    **{"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
}
SHARED = {"num_hidden_layers": 4, "indexer_types": ["full", "shared", "shared", "full"]}
V4 = {  # windows of 16 tokens; entries of 4 tokens, of which 6 are selected, and of 8
    **{"num_hidden_layers": 3, "head_dim": 64, "sliding_window": 16, "index_topk": 6},
    **{"compress_rate_csa": 4, "compress_rate_hca": 8, "num_hash_layers": 1},
    **{"o_groups": 2, "o_lora_rank": 24, "hc_mult": 2, "num_key_value_heads": 1},
    "layer_types": [f"{name}_attention" for name in ("heavily_compressed", "compressed_sparse", "sliding")],
}
DOTS = {
    **{"num_hidden_layers": 4, "head_dim": 40, "sliding_window": 16, "shared_experts_intermediate_size": 32},
    "layer_types": [f"{name}_attention" for name in ("indexed", "sliding", "full", "indexed")],
    **{f"swa_{name}": size for name, size in (("num_attention_heads", 2), ("num_key_value_heads", 2))},
    **{"swa_q_lora_rank": 24, "swa_kv_lora_rank": 32, "swa_head_dim": 24, "swa_qk_nope_head_dim": 16},
    **{"swa_v_head_dim": 12, "use_dsa": None},
}
MISTRAL = {  # no RoPE in the second layer; the third reads the first's latents, the fourth the second's
    **{"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0], "kv_source_layers": [0, 1, 0, 1]},
    "indexer_types": ["full", "full", "shared", "full"],
    "rope_parameters": {**YARN, "attention_factor": 1.0},
}
KPOOL = {  # pools of 4 tokens, of which 6 are selected; no positions; the first layer is linear
    **{"index_kpool": 4, "qk_rope_head_dim": 0, "num_hidden_layers": 3, "hc_mult": 2},
    **{"linear_head_dim": 16, "linear_num_heads": 2, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "layer_types": ["linear_attention", "indexed_attention", "indexed_attention"],
    "indexer_types": ["full", "full", "full"],
}
QSA = {  # blocks of 4 tokens, of which 6 are selected; the first layer is linear
    **{"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    **{"indexer_n_heads": 32, "indexer_kv_heads": 1, "indexer_head_dim": 32, "indexer_budget": TOPK},
    **{"indexer_compress_ratio": 4, "num_experts": 4, "shared_expert_intermediate_size": 32},
    **{"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2},
    **{"linear_num_value_heads": 4, "hc_count": 2, "hc_lowrank": 16},
    "layer_types": ["linear_attention", "indexed_attention", "indexed_attention"],
    "rope_parameters": {
        **{"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "mrope_section": [4, 2, 2],
    },
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}}
PIXTRAL = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
PIXTRAL |= {"num_attention_heads": 2, "head_dim": 16}
HY_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
HY_VISION |= {"out_hidden_size": 96, "max_image_size": 64}
GLM_VISION = {"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 96}

GQA = {**COMMON, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}
M3 = {  # blocks of 8 rows, of which each of two kv heads reads 3, its own with them
    **{"num_hidden_layers": 3, "num_local_experts": 4, "shared_intermediate_size": 32},
    **{"dense_intermediate_size": 64, "index_n_heads": 2, "index_head_dim": 32, "index_block_size": 8},
    **{"index_topk_blocks": 3, "index_local_blocks": 1, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}
M3_VISION = {"hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
M3_VISION |= {"image_size": 28}


def _dots(**sizes):
    return transformers.Dots3NoteTextConfig(**sizes)


def _with_vision(name, vision):
    def config(**sizes):
        tokens = {key: sizes[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
        return getattr(transformers, f"{name}Config")(text_config=sizes, vision_config=vision, **tokens)

    return config


def _plain(name):
    return lambda **sizes: getattr(transformers, f"{name}Config")(**sizes)


# The config and its sizes, by kind; a family may have several.
KINDS = {
    "v32": (_plain("DeepseekV32"), {**MLA, **FIRST_DENSE}),
    "v32-yarn": (
        _plain("DeepseekV32"),
        {**MLA, **FIRST_DENSE, "rope_parameters": YARN, "attention_bias": True},
    ),
    "glm": (_plain("GlmMoeDsa"), {**MLA, **FIRST_DENSE}),
    "glm-shared": (_plain("GlmMoeDsa"), {**MLA, **FIRST_DENSE, **SHARED}),
    "axk2": (_plain("AXK2"), MLA),
    "hy": (_plain("HYV4"), {**MLA, **SHARED, "hc_mult": 2}),
    "hy-vl": (_with_vision("HYV4VL", HY_VISION), {**MLA, **SHARED, **MROPE, "hc_mult": 2}),
    "dots": (_dots, {**MLA, **DOTS}),
    "mistral": (_with_vision("MistralLarge4", PIXTRAL), {**MLA, **FIRST_DENSE, **MISTRAL}),
    "v4": (_plain("DeepseekV4"), {**MLA, **V4}),
    "m3": (_plain("MiniMaxM3VLText"), {**GQA, **M3}),
    "m3-vl": (_with_vision("MiniMaxM3VL", M3_VISION), {**GQA, **M3}),
    "glm5": (_with_vision("Glm5Next", GLM_VISION), {**MLA, **KPOOL}),
    "glm5-shared": (
        _with_vision("Glm5Next", GLM_VISION),
        {**MLA, **KPOOL, "indexer_types": ["full", "full", "shared"]},
    ),
    "qwen4": (_plain("Qwen4ExpText"), {**COMMON, **QSA}),
}
FAMILY = {"v32-yarn": "v32", "glm-shared": "glm", "glm5-shared": "glm5", "m3-vl": "m3"}
MODEL_TYPES = {
    **{"v32": "deepseek_v32", "glm": "glm_moe_dsa", "axk2": "axk2", "hy": "hy_v4", "hy-vl": "hy_v4_vl"},
    **{"dots": "dots3_note", "mistral": "mistral_large4", "v4": "deepseek_v4"},
    **{"glm5": "glm5_next", "qwen4": "qwen4_exp", "m3": "minimax_m3_vl"},
}
KINDS = {kind: made for kind, made in KINDS.items() if MODEL_TYPES[FAMILY.get(kind, kind)] in sa.SUPPORTED}


@torch.no_grad()
def make(kind, **changes):
    """A model with transformers' attention."""
    config_class, sizes = KINDS[kind]
    torch.manual_seed(0)
    config = config_class(**{**sizes, **changes})
    auto = transformers.AutoModelForCausalLM
    if config.get_text_config() is not config:
        auto = transformers.AutoModelForImageTextToText
    # Eager attention of Qwen4-Exp gave NaN to padded batches before release 5.23.
    old = tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 23)
    attention = "sdpa" if kind == "qwen4" and old else "eager"
    model = auto.from_config(config, dtype=torch.float32, attn_implementation=attention).eval()
    for name, parameter in model.named_parameters():
        if "attn." in name and parameter.dim() > 1:
            parameter.mul_(4)
        if name.endswith((".sinks", ".position_bias", "compress_ape")):  # zeros
            parameter.normal_()
        if name.endswith("compress_gate"):  # ones
            parameter.normal_(std=0.2)
        if "softmax_scaling" in name or name.endswith("rotary_emb.alpha"):  # neutral
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.get_input_embeddings().weight[0] = 0.02  # else a generated pad token scores 0 everywhere: all ties
    return model


def make_pair(kind, **changes):
    """A model with transformers' attention and a copy with ours."""
    dense = make(kind, **changes)
    sparse = copy.deepcopy(dense)
    sa.enable(sparse)
    return dense, sparse


_pair = functools.cache(make_pair)


def models(kind):
    """The pair of a kind, made once, without what models with images remember of their last prompt."""
    for module in (module for model in _pair(kind) for module in model.modules()):
        if hasattr(module, "rope_deltas"):
            module.rope_deltas = None
    return _pair(kind)


def layers(model):
    """The decoder's layers."""
    return model.get_decoder().layers


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
