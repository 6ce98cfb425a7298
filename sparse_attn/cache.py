"""The preallocated cache of one layer, and where the tokens of a call lie in it."""

import ctypes
import dataclasses
import sys

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .config import DSAConfig
from .distributed.division import CONTEXT, Division
from .distributed.shards import Shards
from .formats import INDEX_K_FORMATS, KV_FORMATS, index_k_views
from .ops import check
from .ops.attention import QUANTISED_D_V
from .ops.writers import write_index_k, write_kv

V32_KV, FP8_INDEX_K = KV_FORMATS["v32"], INDEX_K_FORMATS["fp8_index"]
FP8_SIZES = {
    "kv_lora_rank": QUANTISED_D_V,
    "qk_rope_head_dim": V32_KV.width - QUANTISED_D_V,
    "index_head_dim": FP8_INDEX_K.width,
}


@dataclasses.dataclass(frozen=True)
class Placement:
    """The new tokens of a call: their sequences, their positions, and the rows of their keys.

    Attributes:
        counts: ``[batch_size]`` int64, new tokens of each sequence, where its length is kept.
        cu_seqlens_q: ``[batch_size + 1]`` int32, where the tokens of each sequence begin and end.
        positions: ``[tokens]`` int64, the position of each token in its sequence.
        first_rows: ``[tokens]`` int64, the row that holds position 0 of its sequence.
        longest: the most tokens that a query of this call sees, itself included, or a bound of it.
    """

    counts: Tensor
    cu_seqlens_q: Tensor
    positions: Tensor
    first_rows: Tensor
    longest: int

    def seen(self, positions: Tensor) -> Tensor:
        """Those ``positions`` ``[tokens, topk]`` int32 that each query sees, -1 in place of the others."""
        positions = positions.contiguous()  # other strides may take another kernel, whose last bits differ
        seen = (positions >= 0) & (positions <= self.positions[:, None])
        return torch.where(seen, positions, -1)

    def rows(self, positions: Tensor) -> Tensor:
        """The rows of ``positions`` that are seen: ``[tokens, topk]`` int32, -1 where there is none."""
        return torch.where(positions >= 0, positions + self.first_rows[:, None].int(), -1)

    def all_seen(self) -> Tensor:
        """Every position that each query sees, ``[tokens, longest]`` int32, -1 after them."""
        position = torch.arange(self.longest, dtype=torch.int32, device=self.positions.device)
        return torch.where(position <= self.positions[:, None], position, -1)

    @classmethod
    def of(
        cls,
        tokens: int,
        cu_seqlens: Tensor,
        lengths: Tensor,
        starts: Tensor,
        device: torch.device,
        longest: int | None = None,
    ) -> "Placement":
        """On ``device``, for sequences that hold ``lengths`` tokens in rows from ``starts`` on.

        Without ``longest`` it is read from the positions, so the tensors have to lie on the CPU.
        """
        packed = torch.arange(tokens, device=cu_seqlens.device)
        # The first boundary beyond a token ends its sequence: those without new tokens end before.
        sequences = torch.bucketize(packed, cu_seqlens[1:], right=True)
        positions = packed - cu_seqlens[sequences] + lengths[sequences]
        if longest is None:
            longest = int(positions.max()) + 1 if tokens else 0
        placed = torch.cat([positions, starts[sequences], cu_seqlens]).to(device)  # one copy
        positions, first_rows, boundaries = placed.split([tokens, tokens, len(cu_seqlens)])
        return cls(cu_seqlens.diff(), boundaries.int(), positions, first_rows, longest)


class DSACache:
    """Keys, values and index keys of one attention layer for ``batch_size`` sequences.

    Everything is allocated once. Sequence b's token at position p lies in row
    ``b * max_tokens + p``, over several ranks in row ``b * capacity + shards.to_local(p)`` of one.
    Unused rows are never read, whatever they hold.

    Args:
        config: decides what is stored: for MLA the latent ``kv`` ``[batch_size, max_tokens,
            kv_lora_rank + qk_rope_head_dim]``, for GQA ``k`` and ``v`` ``[batch_size, max_tokens,
            num_key_value_heads, head_dim]``; and ``index_k`` ``[batch_size, max_tokens, index_head_dim]``,
            unless shares_selection.
        max_tokens: the most tokens per sequence.
        batch_size: number of sequences.
        dtype: that of the hidden states; default torch's default dtype. Or ``torch.float8_e4m3fn`` for MLA of
            DeepSeek-V3.2's sizes, whatever the layer's dtype: bytes as its engines keep them, ``kv``
            ``[..., 656]`` and ``index_k`` ``[..., 132]``, 56 % of bf16 (:mod:`sparse_attn.formats`; all keys
            of a sequence are one page, which a GPU reads fastest where max_tokens is a multiple of 4). Tokens
            are rounded once, when they are written.
        mesh, interleave: the layer's DeviceMesh, if it has one. Along its dimension "cp" each rank stores a
            part of every sequence, ``interleave`` consecutive positions in turn, ``capacity`` rows of it at
            most; without that dimension each stores all. max_tokens and lengths are those of whole sequences,
            and the same on all ranks.
        device: of all tensors.
        capturable: a step of a layer neither reads on the host nor copies from it, so that a CUDA graph can
            hold it (not with ``backend="reference"``). Lengths are kept on the device, and ``cu_seqlens_q``
            has to lie there; a replay reads both as they are then. Every step runs the indexer and holds
            logits of ``max_tokens`` columns, unless ``index_topk`` is no less. Wrong boundaries and a full
            cache are found on the device: on a CPU they raise RuntimeError; on a GPU the next synchronisation
            does, and the process cannot use the GPU any more.
        shares_selection: as for the layer, which then has no index keys to store.
    """

    def __init__(
        self,
        config: DSAConfig,
        max_tokens: int,
        batch_size: int = 1,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        capturable: bool = False,
        shares_selection: bool = False,
        mesh: DeviceMesh | None = None,
        interleave: int = 1,
    ) -> None:
        for name, value in (("max_tokens", max_tokens), ("batch_size", batch_size)):
            check.integer(name, value)
        if max_tokens * batch_size >= 2**31:
            raise ValueError(
                "max_tokens: expected batch_size * max_tokens below 2**31 (rows are int32), "
                f"got {batch_size} * {max_tokens}"
            )
        if dtype not in (None, *check.FLOATS, torch.float8_e4m3fn):
            raise TypeError(
                f"dtype: expected bfloat16, float16, float32, float64 or float8_e4m3fn, got {dtype}"
            )
        if interleave != 1 and (mesh is None or CONTEXT not in (mesh.mesh_dim_names or ())):
            raise ValueError(
                f"interleave: expected 1 without a mesh that has a dimension {CONTEXT!r}, got {interleave}"
            )
        division = Division(mesh, config)
        self.config = config
        self.kv_heads = division.kv_heads  # of this rank
        self.max_tokens = max_tokens
        self.batch_size = batch_size
        self.shards = Shards(division.cp, interleave)
        self.capacity = self.shards.rows(max_tokens) if self.shards.size > 1 else max_tokens
        self.capturable = capturable
        self.shares_selection = shares_selection
        if dtype == torch.float8_e4m3fn:
            found = {name: getattr(config, name) for name in FP8_SIZES}
            if found != FP8_SIZES:
                expected, got = (check.named(" ".join(sizes), sizes) for sizes in (FP8_SIZES, found))
                raise ValueError(f"dtype: float8_e4m3fn expects a config with {expected}, got {got}")
            rows, dtype = {"kv": (V32_KV.bytes,), "index_k": (FP8_INDEX_K.bytes,)}, torch.uint8
        elif config.is_mla:
            latent = (config.kv_lora_rank + config.qk_rope_head_dim,)
            rows = {"kv": latent, "index_k": (config.index_head_dim,)}
        else:
            heads = (self.kv_heads, config.head_dim)
            rows = {"k": heads, "v": heads, "index_k": (config.index_head_dim,)}
        if shares_selection:
            del rows["index_k"]
        # Tokens of other ranks are written to a spare row at the end.
        n, spare = batch_size * self.capacity, 1 if self.shards.size > 1 else 0
        self._tensors = {
            name: huge_pages(torch.empty(n + spare, *row, dtype=dtype, device=device))
            for name, row in rows.items()
        }
        where = self.device if capturable else "cpu"
        with torch.inference_mode(False):  # in-place changes must be allowed inside of it and outside
            self._lengths = torch.zeros(batch_size, dtype=torch.int64, device=where)
        self._starts = torch.arange(batch_size, device=where) * self.capacity

    def __getitem__(self, name: str) -> Tensor:
        """The tensor ``name`` ("kv", "k", "v" or "index_k"), ``[batch_size, capacity, ...]``."""
        return self._tensors[name][: self.batch_size * self.capacity].unflatten(0, (self.batch_size, -1))

    def index_keys(self, tokens: int) -> tuple[Tensor, Tensor | None]:
        """This rank's keys among the first ``tokens`` positions, ``[batch_size, rows, index_head_dim]``, and
        the scales of fp8 keys ``[batch_size, rows]``: views, whose pages are the sequences.
        """
        if self.shards.size > 1:
            tokens = self.shards.rows(tokens)
        if self.dtype != torch.float8_e4m3fn:
            return self["index_k"][:, :tokens], None
        k, scales = index_k_views(self["index_k"])
        return k[:, :tokens], scales[:, :tokens]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens held for each sequence. If the cache is capturable, this waits for the device."""
        return tuple(self._lengths.tolist())

    @property
    def dtype(self) -> torch.dtype:
        dtype = next(iter(self._tensors.values())).dtype
        return torch.float8_e4m3fn if dtype == torch.uint8 else dtype

    @property
    def device(self) -> torch.device:
        return next(iter(self._tensors.values())).device

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def place(self, tokens: int, cu_seqlens: Tensor) -> Placement:
        """Where ``tokens`` new tokens go, those of each sequence between its boundaries.

        Args:
            tokens: in all.
            cu_seqlens: ``[batch_size + 1]`` int64, checked and on the CPU; if capturable, on the device.

        Raises:
            ValueError: a sequence would outgrow ``max_tokens``; the cache is unchanged.
            RuntimeError: the same, or wrong boundaries, of a capturable cache on a CPU.
        """
        counts = cu_seqlens.diff()
        if self.capturable:
            fits = (counts >= 0) & (self._lengths + counts <= self.max_tokens)
            fits = fits.all() & (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens)
            torch._assert_async(  # pyright: ignore[reportPrivateImportUsage]
                fits,
                f"cu_seqlens_q: expected ascending boundaries from 0 to {tokens} tokens, "
                f"and no sequence of the cache longer than max_tokens={self.max_tokens}",
            )
            longest = self.max_tokens
        else:
            longest = None
            for b, (old, new) in enumerate(zip(self.lengths, counts.tolist(), strict=True)):
                if old + new > self.max_tokens:
                    raise ValueError(
                        f"cache: sequence {b} holds {old} of {self.max_tokens} tokens, no room for {new} "
                        "more; make a DSACache with a larger max_tokens, or truncate() this one"
                    )
        return Placement.of(tokens, cu_seqlens, self._lengths, self._starts, self.device, longest)

    def write(self, placement: Placement, *, backend: str = "auto", **rows: Tensor) -> None:
        """Write the new tokens' ``rows`` (one tensor ``[tokens, ...]`` for each tensor held).

        The tokens count from :meth:`commit` on: a call that fails in between leaves the cache as it was.
        """
        slots = placement.first_rows + placement.positions
        if self.shards.size > 1:
            local = self.shards.to_local(placement.positions)
            slots = torch.where(local >= 0, placement.first_rows + local, self.batch_size * self.capacity)
        if self.dtype == torch.float8_e4m3fn:
            write_kv(rows["kv"], self["kv"], slots, backend=backend)
            if not self.shares_selection:
                write_index_k(rows["index_k"], self["index_k"], slots, hadamard=False, backend=backend)
            return
        for name, tensor in self._tensors.items():
            tensor[slots] = rows[name]

    def commit(self, placement: Placement) -> None:
        """Count the new tokens of each sequence as held."""
        self._lengths.add_(placement.counts)

    def truncate(self, length: int, sequence: int = 0) -> None:
        """Forget the tokens of ``sequence`` from position ``length`` on, e.g. rejected draft tokens.

        If the cache is capturable, this waits for the device; replays see it.
        """
        if not 0 <= sequence < self.batch_size:
            raise ValueError(f"sequence: expected 0 to {self.batch_size - 1}, got {sequence}")
        held = self.lengths[sequence]
        if not 0 <= length <= held:
            raise ValueError(
                f"length: expected 0 to the {held} tokens held for sequence {sequence}, got {length}"
            )
        self._lengths[sequence] = length

    def reset(self) -> None:
        """Forget all tokens."""
        self._lengths.zero_()


HUGE_PAGE = 2 << 20
MADV_HUGEPAGE = 14  # of Linux's madvise


def huge_pages(tensor: Tensor) -> Tensor:
    """Ask Linux for huge pages under a CPU tensor that was not written yet; returns the tensor.

    Selected rows lie far apart: with pages of 4 KiB nearly every row misses the TLB. On other systems and
    devices nothing happens.
    """
    if sys.platform == "linux" and tensor.device.type == "cpu":
        start = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        size = (tensor.data_ptr() + tensor.nbytes - start) // HUGE_PAGE * HUGE_PAGE
        if size > 0:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_HUGEPAGE)
    return tensor
