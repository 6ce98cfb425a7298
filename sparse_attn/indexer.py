"""The lightning indexer: the small projections that decide which tokens a query attends to."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import DSAConfig
from .formats import fp8_scale, to_e4m3
from .rope import apply_rope, hadamard_transform, rope_cos_sin


class LightningIndexer(nn.Module):
    """Projects hidden states to index queries, one index key per token, and head weights.

    Weights carry DeepSeek's names (``wq_b, wk, k_norm, weights_proj``). Queries are projected from
    the *normalised* low-rank query of the attention layer, or from the hidden states when the
    config has no ``q_lora_rank``.

    Source: DeepSeek-V3.2 report, section 2, and its inference code.
    """

    def __init__(self, config: DSAConfig, *, dtype: torch.dtype | None = None, device=None) -> None:
        super().__init__()
        self.config = config
        factory = {"dtype": dtype, "device": device}
        heads, d = config.index_n_heads, config.index_head_dim
        self.wq_b = nn.Linear(config.q_lora_rank or config.hidden_size, heads * d, bias=False, **factory)
        self.wk = nn.Linear(config.hidden_size, d, bias=False, **factory)
        self.k_norm = nn.LayerNorm(d, eps=1e-6, **factory)
        self.weights_proj = nn.Linear(config.hidden_size, heads, bias=False, **factory)

    def forward(
        self, hidden_states: Tensor, q_lora: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs of :func:`sparse_attn.lightning_topk` for new tokens.

        Args:
            hidden_states: ``[tokens, hidden_size]``.
            q_lora: ``[tokens, q_lora_rank]`` (hidden states without a q_lora_rank).
            positions: ``[tokens]`` integers, each token's position in its sequence.

        Returns:
            q ``[tokens, index_n_heads, index_head_dim]``, k ``[tokens, index_head_dim]``, weights
            ``[tokens, index_n_heads]`` in fp32 (fp64 for fp64 hidden states).
        """
        q, weights = self.queries(hidden_states, q_lora, positions)
        return q, self.keys(hidden_states, positions), weights

    def queries(self, hidden_states: Tensor, q_lora: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """q and weights of :meth:`forward`."""
        q = rearrange(self.wq_b(q_lora), "t (h d) -> t h d", h=self.config.index_n_heads)
        # In fp32 whatever the module's dtype: the weights scale every score.
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        weights = F.linear(hidden_states.to(dtype), self.weights_proj.weight.to(dtype))
        weights = weights * (self.config.index_n_heads**-0.5 * self.config.index_head_dim**-0.5)
        return self._rotate(q, positions), weights

    def keys(self, hidden_states: Tensor, positions: Tensor) -> Tensor:
        """k of :meth:`forward`; a cache needs it even while all tokens are selected."""
        k, norm = self.wk(hidden_states), self.k_norm
        dtype = torch.promote_types(k.dtype, torch.float32)
        weight, bias = norm.weight.to(dtype), norm.bias.to(dtype)
        normed = F.layer_norm(k.to(dtype), norm.normalized_shape, weight, bias, norm.eps).to(k.dtype)
        return self._rotate(normed[:, None], positions)[:, 0]

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        cos, sin = rope_cos_sin(positions, self.config.index_rope_dim, self.config)
        x = apply_rope(x, cos, sin, self.config.indexer_rope)
        return simulate_fp8(hadamard_transform(x)) if self.config.indexer_fp8 else x


def simulate_fp8(x: Tensor) -> Tensor:
    """Round each last dimension to e4m3 under one power-of-two scale, and return it in x's dtype.

    The scale is ``2 ** ceil(log2(max(amax, 1e-4) / 448))``, as in DeepSeek's inference code. Values
    times a power of two are exact in bf16, so scores equal those of real fp8 operands.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = fp8_scale(wide.abs().amax(-1, keepdim=True))
    return (to_e4m3(wide / scale).to(wide.dtype) * scale).to(x.dtype)
