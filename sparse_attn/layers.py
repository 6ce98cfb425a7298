"""Attention layers that read only the tokens which the lightning indexer selects."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from . import checkpoint
from .cache import DSACache, Placement
from .checkpoint import Part
from .config import DSAConfig
from .distributed.division import Attention, Division
from .indexer import LightningIndexer
from .ops import check
from .ops.attention import sparse_gqa, sparse_mla
from .rope import apply_rope, rope_cos_sin


class _SparseAttention(nn.Module):
    """What both layers share: place the tokens, store their rows, select, attend."""

    indexer: LightningIndexer  # None if the layer shares a selection
    # Queries, the rows to store by their name in the cache, and the input of the indexer's queries.
    _project: Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor], Tensor]]
    # Attention over selected rows, and the last projection of its result, of this rank's heads.
    _attention: Attention
    _output: Callable[[Tensor], Tensor]
    _parts: dict[str, Part]  # of the weights that are divided over a mesh, this rank's
    _d_v: int  # columns of what _attention returns

    def __init__(
        self, config: DSAConfig, shares_selection: bool, backend: str, mesh: DeviceMesh | None, dtype, device
    ) -> None:
        super().__init__()
        self.config = config
        self.shares_selection = shares_selection
        self.backend = backend
        self.division = Division(mesh, config)
        indexer = None if shares_selection else LightningIndexer(config, dtype=dtype, device=device)
        self.register_module("indexer", indexer)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        cache: DSACache | None = None,
        cu_seqlens_q: Tensor | None = None,
        indices: Tensor | None = None,
        return_indices: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from new tokens to everything before them in their sequence, themselves included.

        Args:
            hidden_states: ``[tokens, hidden_size]``, the sequences of a batch one after the other.
            cache: holds the tokens of earlier calls; the new ones are appended, and read as it holds them.
                Without it the call is a causal prefill of its own.
            cu_seqlens_q: ``[batch_size + 1]`` int32 or int64, the boundaries of the sequences in
                hidden_states, starting at 0; a sequence may have no new tokens. Best kept on the CPU,
                since it is read there; with a capturable cache on its device. Default: all tokens belong
                to one sequence.
            indices: ``[tokens, topk]`` int32 for any topk, positions in each token's own sequence, which are
                read in place of the indexer's selection: one recorded before, or that of another layer.
                Negative ones, and those after the token itself, are ignored; duplicates count twice. Index
                keys are still stored, so the next step may select. Required with shares_selection.
            return_indices: whether to return the positions that were read.

        Returns:
            ``[tokens, hidden_size]``; with return_indices a tuple of it and the positions ``[tokens, k]``
            int32, -1 where there is none. Those that the layer selected are ascending, with -1 at the end,
            and k is the smaller of index_topk and the longest context (of a capturable cache, max_tokens).
            Given ones keep their places. As ``indices`` of the same call they give the same bits.

        Raises:
            TypeError, ValueError: wrong shape, dtype, device or boundaries; a full cache; no indices for a
                layer that shares a selection. A capturable cache finds wrong boundaries and a lack of room on
                the device, see :class:`DSACache`. After these and any other exception, such as a lack of
                memory or an interrupt, the cache holds what it held before, and the call may be made again.
        """
        with self.division.together():
            return self._forward(hidden_states, cache, cu_seqlens_q, indices, return_indices)

    def _forward(self, hidden_states, cache, cu_seqlens_q, indices, return_indices):
        self._check_inputs(hidden_states, cache, indices)
        tokens, device = hidden_states.shape[0], hidden_states.device
        boundaries = _boundaries(tokens, cache, cu_seqlens_q)
        if cache is None:
            nothing = torch.zeros_like(boundaries)
            placement = Placement.of(tokens, boundaries, nothing, boundaries, device)
        else:
            placement = cache.place(tokens, boundaries)
        q, rows, q_lora = self._project(hidden_states, placement.positions)
        stored = dict(rows)
        if not self.shares_selection:
            stored["index_k"] = self.indexer.keys(hidden_states, placement.positions)
        if cache is not None:
            cache.write(placement, **stored, backend=self.backend)
            rows = {name: cache[name] for name in rows}
        if indices is not None:
            positions = placement.seen(indices)
        elif placement.longest <= self.config.index_topk:
            positions = placement.all_seen()
        else:
            index_q, weights = self.indexer.queries(hidden_states, q_lora, placement.positions)
            inputs = index_q, stored["index_k"], weights, self.config.index_topk
            positions = self.division.select(*inputs, placement, cache, self.backend)
        out = self.division.attend(self._attention, q, rows, positions, placement, cache, self._d_v)
        out = self._output(out)
        if cache is not None:
            cache.commit(placement)
        return (out, positions) if return_indices else out

    def part_of(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of the weights of a layer that is not divided, for ``load_state_dict``."""
        return {name: checkpoint.part_of(weights, name, self._parts.get(name)) for name in weights}

    def _check_inputs(self, hidden_states: Tensor, cache: DSACache | None, indices: Tensor | None) -> None:
        weight = next(self.parameters())  # of a projection; those that may stay in fp32 come later
        dtype, device = weight.dtype, weight.device
        if isinstance(hidden_states, Tensor) and hidden_states.dim() == 3:
            raise ValueError(
                f"hidden_states: expected shape [tokens, hidden_size], got {list(hidden_states.shape)}; "
                "pack a batch along the first dimension and pass cu_seqlens_q"
            )
        dims = {"hidden_size": self.config.hidden_size}
        check.tensor("hidden_states", hidden_states, "tokens hidden_size", dims, (dtype,), device)
        if indices is None and self.shares_selection:
            raise ValueError(
                "indices: expected [tokens, topk], as the layer shares the selection of an earlier one "
                "(its return_indices=True gives them), got None"
            )
        check.optional("indices", indices, "tokens topk", dims, check.INT32, device)
        if cache is None:
            return
        if not isinstance(cache, DSACache):
            raise TypeError(f"cache: expected a DSACache, got {type(cache).__name__}")
        if cache.config != self.config:
            raise ValueError("cache: expected a cache made with this layer's config, got another config")
        if cache.shares_selection != self.shares_selection:
            raise ValueError(
                f"cache: expected one made with the layer's shares_selection={self.shares_selection}, "
                f"got {cache.shares_selection}"
            )
        shards, own = cache.shards, self.division
        if (shards.size > 1 and shards.ranks.group is not own.cp.group) or cache.kv_heads != own.kv_heads:
            raise ValueError("cache: expected one made with the layer's mesh, got another mesh or none")
        if cache.dtype == torch.float8_e4m3fn and dtype not in check.WRITER_FLOATS:
            raise TypeError(f"cache: float8_e4m3fn expects a layer of at most 32 bits, got {dtype}")
        if cache.dtype not in (dtype, torch.float8_e4m3fn) or cache.device != device:
            got = f"{cache.dtype} on {cache.device}"
            raise ValueError(f"cache: expected the layer's {dtype} on {device}, got {got}")


class SparseMLA(_SparseAttention):
    """Multi-head latent attention with a lightning indexer, computed in absorbed form.

    The layer of DeepSeek-V3.2 and GLM-5: weights under DeepSeek's names (``wq_a, q_norm, wq_b,
    wkv_a, kv_norm, wkv_b, wo, indexer.*``), so that its checkpoints load.

    Args:
        config: a :class:`DSAConfig` with ``kv_lora_rank``.
        shares_selection: the layer has no indexer; every call takes the ``indices`` of an earlier layer.
        backend: of the sparse operations: "auto", "cpu", "triton" or "reference".
        mesh: a DeviceMesh of torch.distributed whose dimensions are called "tp", "cp" or both. All its ranks
            make the layer together: each holds ``num_attention_heads / ranks`` of the heads, takes all hidden
            states and returns the whole output. A cache made with the mesh is divided along "cp". If a call
            fails on one rank it fails on all, with its message. Weights come from :meth:`from_hf`, or through
            :meth:`part_of`; drawn ones would differ between ranks that are not seeded alike.
        dtype, device: of the weights.
    """

    def __init__(
        self,
        config: DSAConfig,
        *,
        shares_selection: bool = False,
        backend: str = "auto",
        mesh: DeviceMesh | None = None,
        dtype: torch.dtype | None = None,
        device=None,
    ) -> None:
        if not config.is_mla:
            raise ValueError("config: SparseMLA expects a config with kv_lora_rank, got None (use SparseGQA)")
        super().__init__(config, shares_selection, backend, mesh, dtype, device)
        factory = {"dtype": dtype, "device": device}
        linear = {"bias": False, **factory}
        heads, hidden = self.division.heads, config.hidden_size
        nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.wq_a = nn.Linear(hidden, config.q_lora_rank, **linear)
        self.q_norm = nn.RMSNorm(config.q_lora_rank, eps=config.rms_norm_eps, **factory)
        self.wq_b = nn.Linear(config.q_lora_rank, heads * (nope + rope), **linear)
        self.wkv_a = nn.Linear(hidden, config.kv_lora_rank + rope, **linear)
        self.kv_norm = nn.RMSNorm(config.kv_lora_rank, eps=config.rms_norm_eps, **factory)
        self.wkv_b = nn.Linear(config.kv_lora_rank, heads * (nope + config.v_head_dim), **linear)
        self.wo = nn.Linear(heads * config.v_head_dim, hidden, **linear)
        self._parts = self.division.parts({"wq_b.weight": 0, "wkv_b.weight": 0, "wo.weight": 1})
        self._d_v = config.kv_lora_rank

    @classmethod
    def from_hf(
        cls,
        state_dict: Mapping[str, Tensor],
        config: DSAConfig | Mapping[str, Any],
        layer: int,
        *,
        backend: str = "auto",
        mesh: DeviceMesh | None = None,
        dtype: torch.dtype | None = None,
        device=None,
    ) -> "SparseMLA":
        """One layer of a Hugging Face checkpoint, as vLLM and SGLang compute it.

        ``q_norm`` and ``kv_norm`` take the config's ``rms_norm_eps`` (GLM-5: 1e-5), as in those engines.
        transformers' own GLM and DeepSeek-V3.2 classes, and so
        :func:`sparse_attn.integrations.transformers.enable`, take 1e-6 there, whatever the config says.

        Args:
            state_dict: tensors named ``...layers.{layer}.self_attn.*``; other names are ignored.
                :class:`sparse_attn.checkpoint.Safetensors` reads files lazily. e4m3 weights with
                ``weight_scale_inv`` are dequantised.
            config: the dict of the checkpoint's ``config.json``, or a :class:`DSAConfig`.
            layer: which layer. If the config says that it shares a selection it becomes one with
                shares_selection, and weights of an indexer that the checkpoint may hold for it are not read.
            backend, mesh, device: as for the class. Of weights that are divided over the mesh only this
                rank's part is read.
            dtype: of the weights; by default that of the checkpoint, bf16 for fp8. The weights of the
                indexer's norm and head weights stay in fp32 if they are stored so. Weights that need no
                conversion share their memory with ``state_dict``.

        Raises:
            ValueError: weights are missing, unexpected or of another shape; all of them are named.
        """
        block_size = None
        if not isinstance(config, DSAConfig):
            block_size = (config.get("quantization_config") or {}).get("weight_block_size")
            config = DSAConfig.from_dict(config)
        shares = config.shares_selection(layer)
        module = cls(config, shares_selection=shares, backend=backend, mesh=mesh, device="meta")
        shapes = {name: weight.shape for name, weight in module.state_dict().items()}
        weights = checkpoint.from_hf(state_dict, layer, shapes, block_size, module._parts)
        dtype = dtype or weights["wkv_b.weight"].dtype
        for name, weight in weights.items():
            keep = name in checkpoint.FP32 and weight.dtype == torch.float32
            weights[name] = weight.to(device=device, dtype=weight.dtype if keep else dtype)
        module.load_state_dict(weights, assign=True)
        return module

    def to_hf(self, layer: int) -> dict[str, Tensor]:
        """The weights under a Hugging Face model's names, ``model.layers.{layer}.self_attn.*``."""
        if self._parts:
            raise ValueError(
                "mesh: expected a layer that is not divided, as each rank has a part of the weights"
            )
        return checkpoint.to_hf(self.state_dict(), layer)

    def _project(self, hidden_states, positions):
        config = self.config
        nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        cos, sin = rope_cos_sin(positions, rope, config)
        q_lora = self.q_norm(self.wq_a(hidden_states))
        q = rearrange(self.wq_b(q_lora), "t (h d) -> t h d", h=self.division.heads)
        q_nope, q_rope = q.split([nope, rope], -1)
        # Absorb the key part of wkv_b into the query: scores are then taken with the latent itself.
        q_latent = einsum(q_nope, self._wkv_b()[:, :nope], "t h d, h d c -> t h c")
        q = torch.cat([q_latent, apply_rope(q_rope, cos, sin, "interleaved")], -1)
        latent, k_rope = self.wkv_a(hidden_states).split([config.kv_lora_rank, rope], -1)
        k_rope = apply_rope(k_rope[:, None], cos, sin, "interleaved")[:, 0]
        return q, {"kv": torch.cat([self.kv_norm(latent), k_rope], -1)}, q_lora

    def _attention(self, q, rows, indices, **options):
        options |= {"d_v": self._d_v, "softmax_scale": self.config.softmax_scale, "backend": self.backend}
        return sparse_mla(q, rows["kv"], indices, **options)

    def _output(self, out):
        values = value_part(self._wkv_b(), self.config.qk_nope_head_dim)
        out = einsum(out, values, "t h c, h d c -> t h d")
        return self.division.sum(self.wo(rearrange(out, "t h d -> t (h d)")))

    def _wkv_b(self) -> Tensor:
        """``[heads, qk_nope_head_dim + v_head_dim, kv_lora_rank]``."""
        return rearrange(self.wkv_b.weight, "(h d) c -> h d c", h=self.division.heads)


class SparseGQA(_SparseAttention):
    """Grouped-query attention with a lightning indexer, over ``q_proj, k_proj, v_proj, o_proj``.

    The layer of Llama-like models (half-split RoPE over the whole head) with one set of selected
    tokens for all heads. The indexer's queries are projected from the hidden states.

    Args:
        config: a :class:`DSAConfig` without ``kv_lora_rank``.
        shares_selection, backend, mesh, dtype, device: as for :class:`SparseMLA`. The ranks along "tp" divide
            the kv heads too.
    """

    def __init__(
        self,
        config: DSAConfig,
        *,
        shares_selection: bool = False,
        backend: str = "auto",
        mesh: DeviceMesh | None = None,
        dtype: torch.dtype | None = None,
        device=None,
    ) -> None:
        if config.is_mla:
            raise ValueError("config: SparseGQA expects a config without kv_lora_rank (use SparseMLA)")
        super().__init__(config, shares_selection, backend, mesh, dtype, device)
        linear = {"bias": bool(config.attention_bias), "dtype": dtype, "device": device}
        q_size = self.division.heads * config.head_dim
        kv_size = self.division.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, **linear)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, **linear)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, **linear)
        self.o_proj = nn.Linear(
            q_size, config.hidden_size, **{**linear, "bias": config.attention_bias is True}
        )
        of_keys = {f"{x}_proj.{name}": 0 for x in "kv" for name in ("weight", "bias")}
        self._parts = self.division.parts({"q_proj.weight": 0, "q_proj.bias": 0, "o_proj.weight": 1}, of_keys)
        self._d_v = config.head_dim

    def _project(self, hidden_states, positions):
        d = self.config.head_dim
        cos, sin = rope_cos_sin(positions, d, self.config)
        q, k, v = (
            rearrange(projection(hidden_states), "t (h d) -> t h d", d=d)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        rows = {"k": apply_rope(k, cos, sin, "half"), "v": v}
        return apply_rope(q, cos, sin, "half"), rows, hidden_states

    def _attention(self, q, rows, indices, **options):
        options |= {"softmax_scale": self.config.softmax_scale, "backend": self.backend}
        return sparse_gqa(q, rows["k"], rows["v"], indices, **options)

    def _output(self, out):
        out = rearrange(out, "t h d -> t (h d)")
        if self.division.size == 1:
            return self.o_proj(out)
        summed = self.division.sum(F.linear(out, self.o_proj.weight))
        return summed if self.o_proj.bias is None else summed + self.o_proj.bias


def value_part(kv_b: Tensor, qk_nope_head_dim: int) -> Tensor:
    """``[heads, v_head_dim, kv_lora_rank]`` of ``[heads, qk_nope_head_dim + v_head_dim, kv_lora_rank]``."""
    values = kv_b[:, qk_nope_head_dim:]
    # If it were not contiguous, torch's bf16 product on a CPU would transpose it at every call.
    return values.contiguous() if values.device.type == "cpu" and values.dtype == torch.bfloat16 else values


def _boundaries(tokens: int, cache: DSACache | None, cu_seqlens_q: Tensor | None) -> Tensor:
    """``[batch_size + 1]`` int64, checked and on the CPU; with a capturable cache on its device, not read."""
    device = cache.device if cache is not None and cache.capturable else None
    if cu_seqlens_q is None:
        if cache is not None and cache.batch_size > 1:
            raise ValueError(
                f"cu_seqlens_q: expected with a cache of batch_size={cache.batch_size}, got None"
            )
        return torch.arange(2, device=device or "cpu") * tokens
    dims = {} if cache is None else {"batch_size+1": cache.batch_size + 1}
    dtypes = torch.int32, torch.int64
    check.tensor("cu_seqlens_q", cu_seqlens_q, "batch_size+1", dims, dtypes, device)
    if device is not None:
        return cu_seqlens_q.long()
    boundaries = cu_seqlens_q.to("cpu", torch.int64)
    values = boundaries.tolist()
    if values[:1] != [0] or values[-1] != tokens or values != sorted(values):
        raise ValueError(
            f"cu_seqlens_q: expected ascending boundaries from 0 to {tokens} tokens, got {values}"
        )
    return boundaries
