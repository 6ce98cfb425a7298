"""Multi-head latent attention over the selected rows, inside the forwards of transformers' own layers.

Those forwards project, rotate, store the latents, call the indexer, expand every latent into keys and values
of every head, and hand all of that to an attention function. Here nothing is expanded: the function gets the
latents, takes the key part of kv_b_proj into the queries and the value part into the output. What differs
between families (gates, sinks, scales, norms, shared latents) stays in their own code.
"""

import torch
from einops import einsum
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...checkpoint import dequantize_blocks
from ...layers import value_part
from ...ops.attention import sparse_mla
from .attention import SparseAttention
from .dense import dense
from .inputs import query_chunks, slots_of


class LatentAttention(SparseAttention):
    """Mixed into an attention class of transformers."""

    def expand_kv(self, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Called in the forward; what it returns are the key and value of :meth:`attend`."""
        return latent, k_rope

    def attend(
        self,
        query: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        mask: Tensor | None,
        *,
        scaling: float,
        indices: Tensor,
        s_aux: Tensor | None = None,
        **known,
    ) -> Tensor:
        """The attention function.

        Args:
            query: ``[B, heads, S, qk_nope_head_dim + qk_rope_head_dim]``.
            latent, k_rope: ``[B, 1, T, kv_lora_rank]``, ``[B, 1, T, qk_rope_head_dim]``.
            mask: not read; the selection holds no row that a token may not read.
            indices: ``[B, S, topk]`` int32, negative for none.
            s_aux: ``[heads]``, attention sinks.
            known: what :func:`~.inputs.check` let through.

        Returns:
            ``[B, S, heads, v_head_dim]``.
        """
        latent, k_rope, kv_b = latent[:, 0], k_rope[:, 0], self._kv_b()
        (batch, rows, d_v), (s_q, topk) = latent.shape, indices.shape[1:]
        # Decode joins latent and rope of the rows that it reads, a prompt joins those of all rows once.
        kv = None if s_q * topk < rows else torch.cat([latent, k_rope], -1).flatten(0, 1)
        key, value = kv_b[:, : self.qk_nope_head_dim], value_part(kv_b, self.qk_nope_head_dim)
        sinks = None if s_aux is None else local(s_aux).float()
        outs = []
        for t in query_chunks(s_q, batch * len(kv_b) * (d_v + k_rope.shape[-1]) * query.element_size()):
            nope, rope = query[:, :, t].transpose(1, 2).tensor_split([self.qk_nope_head_dim], -1)
            q = torch.cat([einsum(nope, key, "b s h d, h d c -> b s h c"), rope], -1)
            selected = indices[:, t]
            held, slots = (
                (kv, slots_of(selected, rows)) if kv is not None else gather(selected, latent, k_rope)
            )
            out = sparse_mla(
                q.flatten(0, 1), held, slots, d_v=d_v, softmax_scale=scaling, attn_sink=sinks
            ).unflatten(0, (batch, -1))
            outs.append(einsum(out, value, "b s h c, h d c -> b s h d"))
        return torch.cat(outs, 1)

    def _kv_b(self) -> Tensor:
        """``[heads, qk_nope_head_dim + v_head_dim, kv_lora_rank]``, of this process's heads."""
        weight = local(self.kv_b_proj.weight)
        if is_block_fp8(self.kv_b_proj):
            scale = local(self.kv_b_proj.weight_scale_inv)
            weight = dequantize_blocks(weight, scale, self.kv_b_proj.block_size)
            weight = weight.to(self.o_proj.weight.dtype)
        return weight.unflatten(0, (-1, self.qk_nope_head_dim + self.v_head_dim))


class Dots3Attention(LatentAttention):
    """Some of its layers have no indexer and read all rows, or a window of them."""

    def expand_kv(self, latent, k_rope):
        if self.indexer is None:
            return super(LatentAttention, self).expand_kv(latent, k_rope)  # type: ignore[misc]
        return super().expand_kv(latent, k_rope)

    def attend(self, query, latent, k_rope, mask, *, scaling, indices, sliding_window=None, **known):
        if self.indexer is None:
            return dense(query, latent, k_rope, mask, scaling, sliding_window)
        return super().attend(query, latent, k_rope, mask, scaling=scaling, indices=indices, **known)


def gather(selected: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
    """The selected rows of ``parts`` ``[B, T, d]``, joined, and where each stands among them."""
    taken = selected.flatten(1).clamp_min(0)  # [B, s_q * topk]
    sequence = torch.arange(len(taken), device=taken.device)[:, None]
    rows = torch.cat([part[sequence, taken] for part in parts], -1).flatten(0, 1)
    order = torch.arange(taken.numel(), dtype=torch.int32, device=taken.device).view_as(selected)
    return rows, torch.where(selected >= 0, order, -1).flatten(0, 1)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a weight that tensor parallelism divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check_kv_b_proj(linear: nn.Module) -> None:
    """Its weight is read without its forward, so nothing may stand between the two."""
    weight = getattr(linear, "weight", None)
    held = isinstance(weight, Tensor)
    plain = held and type(linear) is nn.Linear and weight.is_floating_point() and weight.element_size() > 1
    if not held or not (plain or is_block_fp8(linear)):
        dtype = weight.dtype if held else "no"
        raise TypeError(
            "kv_b_proj: expected torch.nn.Linear with a floating-point weight, or one in fp8 with "
            f"weight_scale_inv, got {type(linear).__name__} with {dtype} weight; merge adapters and "
            "dequantise this projection first"
        )
    if weight.is_meta:
        raise TypeError(
            "kv_b_proj: expected a weight in memory, got one on the meta device; "
            "layers whose weights are offloaded are not supported"
        )


def is_block_fp8(linear: nn.Module) -> bool:
    weight, scale = getattr(linear, "weight", None), getattr(linear, "weight_scale_inv", None)
    if weight is None or scale is None:
        return False
    return weight.dtype == torch.float8_e4m3fn and scale.dim() == 2
