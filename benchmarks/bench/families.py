"""A model of one attention layer for each family of transformers that has an indexer.

Hidden size 1024 and 16 heads; everything else has the size of the family's own models, but what stands
beside the attention (experts, vocabulary) is tiny: a call of the model is little more than one of its layer.
"""

import copy
from typing import Any

import torch
import transformers

import sparse_attn.integrations.transformers

COMMON = {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 1, "vocab_size": 32}
COMMON |= {"intermediate_size": 64, "moe_intermediate_size": 64, "max_position_embeddings": 1 << 17}
COMMON |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": 1}
MLA = {"num_key_value_heads": 16, "q_lora_rank": 512, "kv_lora_rank": 512, "qk_nope_head_dim": 128}
MLA |= {"qk_rope_head_dim": 64, "v_head_dim": 128, "index_head_dim": 128, "index_topk": 2048}
MLA |= {"n_routed_experts": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
DENSE_MLP = {"mlp_layer_types": ["dense"]}
INDEXED = {"layer_types": ["indexed_attention"]}

# By model_type: the class of the text's config, and its sizes.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v32": ("DeepseekV32Config", {**MLA, **DENSE_MLP, "index_n_heads": 16}),
    "glm_moe_dsa": ("GlmMoeDsaConfig", {**MLA, **DENSE_MLP, "index_n_heads": 16}),
    "axk2": ("AXK2Config", {**MLA, **DENSE_MLP, "index_n_heads": 16}),
    "hy_v4": ("HYV4Config", {**MLA, **DENSE_MLP, "index_n_heads": 16, "hc_mult": 2}),
    "dots3_note": (
        "Dots3NoteTextConfig",
        {**MLA, **DENSE_MLP, **INDEXED, "index_n_heads": 16, "head_dim": 192},
    ),
    "mistral_large4": ("MistralLarge4TextConfig", {**MLA, **DENSE_MLP, "index_n_heads": 16}),
    "deepseek_v4": (
        "DeepseekV4Config",  # entries of 4 tokens beside a window of 128
        {
            **{"num_key_value_heads": 1, "head_dim": 512, "qk_rope_head_dim": 64, "q_lora_rank": 512},
            **{"index_n_heads": 16, "index_head_dim": 128, "index_topk": 512, "sliding_window": 128},
            **{"o_groups": 4, "o_lora_rank": 256, "hc_mult": 2, "n_routed_experts": 2, "n_shared_experts": 1},
            **{"layer_types": ["compressed_sparse_attention"], "mlp_layer_types": ["moe"]},
        },
    ),
    "glm5_next": (
        "Glm5NextTextConfig",
        {
            **{**MLA, **DENSE_MLP, **INDEXED, "qk_rope_head_dim": 0, "qk_nope_head_dim": 192, "hc_mult": 2},
            **{"index_n_heads": 16, "index_kpool": 4, "indexer_types": ["full"]},
        },
    ),
    "qwen4_exp": (
        "Qwen4ExpTextConfig",
        {
            **{**INDEXED, "num_key_value_heads": 2, "head_dim": 256, "num_experts": 2, "hc_count": 2},
            **{"hc_lowrank": 16, "shared_expert_intermediate_size": 64, "indexer_kv_heads": 1},
            **{"indexer_n_heads": 16, "indexer_head_dim": 128, "indexer_budget": 2048},
            **{"indexer_compress_ratio": 4, "num_attention_heads": 16},
            "rope_parameters": {
                **{"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
                "mrope_section": [11, 11, 10],
            },
        },
    ),
    "minimax_m3_vl": (
        "MiniMaxM3VLTextConfig",
        {
            **{"num_key_value_heads": 4, "head_dim": 128, "index_n_heads": 4, "index_head_dim": 128},
            **{"dense_intermediate_size": 64, "shared_intermediate_size": 64, "num_local_experts": 2},
            **{**DENSE_MLP, "layer_types": ["minimax_m3_sparse"]},
        },
    ),
}


def names() -> list[str]:
    """The families that this release of transformers has."""
    return [name for name in FAMILIES if name in sparse_attn.integrations.transformers.SUPPORTED]


def pair(family: str, dtype: torch.dtype, attention: str) -> tuple[Any, Any]:
    """The model with transformers' own attention, and a copy that enable() changed."""
    config_class, sizes = FAMILIES[family]
    config = getattr(transformers, config_class)(**{**COMMON, **sizes})
    torch.manual_seed(0)
    dense = transformers.AutoModel.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    if dense._supports_sdpa:
        dense.set_attn_implementation(attention)
    for name, parameter in dense.named_parameters():
        if "self_attn" in name and parameter.dim() > 1:
            parameter.data.mul_(4)  # else every score is nearly the same
        if name.endswith(("compress_ape", "compress_gate", "position_bias", "sinks")):  # zeros
            parameter.data.normal_(std=0.1)
        if "indexer.weights_proj" not in name:  # loaded models have it in fp32, whatever their dtype
            parameter.data = parameter.data.to(dtype)
    sparse = copy.deepcopy(dense)
    sparse_attn.integrations.transformers.enable(sparse)
    return dense, sparse
