"""What decides whether an engine was right: transformers' own eager model, in fp32, with full masks.

vLLM keeps index keys in fp8, which transformers does not. So the indexer's forward is written down once more
here, with the same rounding, in plain torch and without sparse_attn; the rest is transformers' code.
"""

import json
import types
from pathlib import Path

import torch
from checkpoints import EMBEDDED
from torch import Tensor
from transformers import DeepseekV32ForCausalLM, GlmMoeDsaForCausalLM
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as v32

KEY_EPS, QUERY_EPS = 1e-4, 1e-10  # vLLM's, of what a scale is computed from
NOISE = 1e-6  # of the largest value; an engine sums the same fp32 products in another order


class Teacher:
    def __init__(self, folder: Path, fp8_latents: bool = False):
        # By name, since vLLM tells AutoModel that this family is DeepSeek-V3.
        glm = json.loads((folder / "config.json").read_text())["model_type"] == "glm_moe_dsa"
        cls = GlmMoeDsaForCausalLM if glm else DeepseekV32ForCausalLM
        options = {"dtype": torch.float32, "attn_implementation": "eager"}
        self.model = cls.from_pretrained(folder, **options).eval()
        self.noise: torch.Generator | None = None
        for module in self.model.modules():
            if type(module).__name__.endswith("Indexer"):
                module.forward = types.MethodType(self._index, module)
            elif fp8_latents and hasattr(module, "expand_kv"):
                module.expand_kv = _expand_rounded(module.expand_kv)

    @torch.no_grad()
    def log_probs(self, ids: list[int]) -> Tensor:
        """``[len(ids), vocabulary]``: row t is the distribution of token t + 1."""
        logits = self.model(torch.tensor([ids]), use_cache=False).logits
        return logits[0].double().log_softmax(-1)

    @torch.no_grad()
    def drafts(self, ids: list[int]) -> list[int]:
        """Item p is the token p + 2 that the layer of checkpoints.add_mtp_layer proposes."""
        model = self.model.model
        hidden = model(torch.tensor([ids]), use_cache=False).last_hidden_state[:, :-1]
        embedded = model.embed_tokens(torch.tensor([ids[1:]]))
        embedded[:, 0] = 0  # vLLM's layer sees no embedding beside the first token
        x = EMBEDDED * _unit(embedded) + _unit(hidden)
        positions = torch.arange(x.shape[1])[None]
        rope = model.rotary_emb(x, position_ids=positions)
        mask = torch.full(2 * positions.shape[1:], -torch.inf).triu(1)[None, None]
        options = {"attention_mask": mask, "position_embeddings": rope, "position_ids": positions}
        return self.model.lm_head(model.norm(model.layers[-1](x, **options)))[0].argmax(-1).tolist()

    def is_robust(self, ids: list[int], draws: int = 6) -> bool:
        """Whether noise of one rounding in the index queries and keys selects the same tokens.

        Rounding to fp8 turns such noise into jumps, and a near tie at the edge of the top-k then into another
        selection. Only sequences without one can tell a right engine from a wrong one.
        """
        exact = self.log_probs(ids)
        for seed in range(draws):
            self.noise = torch.Generator().manual_seed(seed)
            noisy = self.log_probs(ids)
            self.noise = None
            if (noisy - exact).abs().max() > 1e-6:
                return False
        return True

    def _index(
        self, indexer, hidden_states, q_resid, position_embeddings, attention_mask, *rest, **options
    ) -> Tensor:
        """Equation 1 of the DeepSeek-V3.2 report with queries and keys rounded to e4m3."""
        rope = indexer.qk_rope_head_dim
        rotate = v32.apply_rotary_pos_emb
        if "Glm" in type(indexer).__name__:
            rotate = v32.apply_rotary_pos_emb_interleave
        q = indexer.wq_b(q_resid).unflatten(-1, (indexer.n_heads, indexer.head_dim))
        k = indexer.k_norm(indexer.wk(hidden_states)).unsqueeze(2)
        q_rope, k_rope = rotate(q[..., :rope], k[..., :rope], *position_embeddings, unsqueeze_dim=2)
        q = self._rounded(torch.cat([q_rope, q[..., rope:]], -1), QUERY_EPS)
        k = self._rounded(torch.cat([k_rope, k[..., rope:]], -1), KEY_EPS)
        heads = torch.einsum("bqhd,bkd->bqhk", q, k.squeeze(2)).relu()
        weights = indexer.weights_proj(hidden_states).float() * (indexer.n_heads * indexer.head_dim) ** -0.5
        scores = torch.einsum("bqhk,bqh->bqk", heads, weights) + attention_mask
        return scores.topk(min(indexer.index_topk, scores.shape[-1])).indices.int()

    def _rounded(self, x: Tensor, eps: float) -> Tensor:
        x = x.float()
        if self.noise is not None:
            x = x + NOISE * x.abs().amax(-1, keepdim=True) * torch.randn(x.shape, generator=self.noise)
        return round_to_e4m3(x, eps)


def _unit(x: Tensor) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


def round_to_e4m3(x: Tensor, eps: float) -> Tensor:
    """To e4m3 and back, with one power of two as the scale of the last dimension."""
    scale = torch.exp2(((x.abs().amax(-1, keepdim=True).clamp_min(eps)) / 448).log2().ceil())
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def _expand_rounded(expand_kv):
    """Latents as 656 bytes hold them: tiles of 128 values in e4m3, the RoPE dimensions in bf16."""

    def expand(latent: Tensor, rope: Tensor):
        tiles = round_to_e4m3(latent.float().unflatten(-1, (-1, 128)), 1e-4)
        return expand_kv(tiles.flatten(-2).to(latent.dtype), rope.bfloat16().to(rope.dtype))

    return expand
