"""Tiny DSA models with random weights, as folders that both vLLM and transformers load.

A latent has the sizes of DeepSeek-V3.2 (512 + 64 values, index heads of 128), which vLLM's caches fix; the
rest is small. Weights are larger than usual, so that attention is far from uniform and errors show.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import DeepseekV32Config, GlmMoeDsaConfig, PreTrainedTokenizerFast
from transformers import DeepseekV32ForCausalLM as DeepseekV32
from transformers import GlmMoeDsaForCausalLM as GlmMoeDsa

TOPK, VOCABULARY, MAX_LENGTH = 32, 272, 2048
EMBEDDED = 0.5
SIZES = {
    **{"hidden_size": 256, "num_hidden_layers": 2, "first_k_dense_replace": 1, "intermediate_size": 256},
    **{"num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": 128, "kv_lora_rank": 512},
    **{"qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128},
    **{"index_n_heads": 16, "index_head_dim": 128, "index_topk": TOPK},
    **{"moe_intermediate_size": 64, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    **{"n_group": 2, "topk_group": 1, "vocab_size": VOCABULARY, "max_position_embeddings": MAX_LENGTH},
    **{"bos_token_id": 256, "eos_token_id": 257, "initializer_range": 0.06},
    # transformers norms latents with this whatever the config says, vLLM with what the config says.
    "rms_norm_eps": 1e-6,
}
YARN = {
    **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512},
    **{"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
}
# What transformers leaves out of a config and vLLM reads.
ROUTING = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1, "ep_size": 1}
MODELS = {
    "v32": (DeepseekV32, DeepseekV32Config(**SIZES, rope_parameters=YARN)),
    "glm": (GlmMoeDsa, GlmMoeDsaConfig(**SIZES)),
}


def make(name: str, folder: Path) -> Path:
    """The model ``name`` in a new folder inside ``folder``."""
    torch.manual_seed(0)
    cls, config = MODELS[name]
    model = cls(config)
    for key, weight in model.named_parameters():
        if any(part in key for part in ("indexer.wq_b", "indexer.wk", "indexer.weights_proj")):
            torch.nn.init.normal_(weight, std=0.3)
    target = folder / name
    model.bfloat16().save_pretrained(target)
    _tokenizer().save_pretrained(target)
    _change_config(target, ROUTING | ({"indexer_rope_interleave": True} if name == "glm" else {}))
    return target


def add_mtp_layer(source: Path, target: Path) -> Path:
    """A copy of a DeepSeek-V3.2 folder with a layer that drafts tokens.

    That is the last layer once more, applied to the model's result plus EMBEDDED times the next token's
    embedding, both normed: enough like the model that some drafts are right and some are wrong.
    """
    layers = SIZES["num_hidden_layers"]
    weights = load_file(source / "model.safetensors")
    last, draft = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    weights |= {k.replace(last, draft): v.clone() for k, v in weights.items() if k.startswith(last)}
    hidden = SIZES["hidden_size"]
    weights |= {
        f"{draft}eh_proj.weight": torch.cat([EMBEDDED * torch.eye(hidden), torch.eye(hidden)], 1).bfloat16(),
        f"{draft}enorm.weight": torch.ones(hidden).bfloat16(),
        f"{draft}hnorm.weight": torch.ones(hidden).bfloat16(),
        f"{draft}shared_head.norm.weight": weights["model.norm.weight"].clone(),
        f"{draft}shared_head.head.weight": weights["lm_head.weight"].clone(),
        f"{draft}embed_tokens.weight": weights["model.embed_tokens.weight"].clone(),
    }
    target.mkdir()
    for file in source.iterdir():
        if file.suffix == ".json":
            (target / file.name).write_text(file.read_text())
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    _change_config(target, {"num_nextn_predict_layers": 1}, without=("layer_types", "mlp_layer_types"))
    return target


def _change_config(folder: Path, changes: dict, without=()) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in without}))


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate([*alphabet, "<bos>", "<eos>"])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return fast
