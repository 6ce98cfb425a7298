"""What the arguments of the public functions must be; each check says what came instead.

``dims`` collects the size that each name was first seen with, so that a later tensor which disagrees is told
what was expected of it. Some checks return their argument in the form that the ops take.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .formats import INDEX_K_FORMATS, KV_FORMATS, Format, format_of
from .reference import compute_dtype

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
WRITER_FLOATS = FLOATS[:3]
PAIRINGS = ("half", "interleaved")
QUANTISED_D_V = 512  # of every latent format
E2M1_WIDTH = 128  # index_head_dim of e2m1 queries and keys
TRITON_KV_BYTES = (656, 584)  # a token, in the quantised caches that the Triton kernels read


def check_tensor(
    name: str,
    tensor: Tensor,
    spec: str,
    dims: dict[str, int],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor [{named(spec, dims)}], got {type(tensor).__name__}")
    axes, shape = spec.split(), tensor.shape
    fits = len(axes) == len(shape)
    for axis, n in zip(axes, shape, strict=False):  # a generator would cost more than the rest of a check
        fits = fits and n == (int(axis) if axis.isdigit() else dims.get(axis, n))
    if not fits:
        raise ValueError(f"{name}: expected shape [{named(spec, dims)}], got {list(shape)}")
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {expected}, got {str(tensor.dtype).removeprefix('torch.')}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")
    dims.update(zip(axes, shape, strict=True))


def named(spec: str, dims: dict[str, int]) -> str:
    """The axes of a shape, with their sizes where they are known."""
    return ", ".join(
        f"{axis}={dims[axis]}" if axis in dims and not axis.isdigit() else axis for axis in spec.split()
    )


class _IndexKeys(NamedTuple):
    """Where the keys are, and the scales of both operands, as the ops take them."""

    k: Tensor  # values [s_kv, ...] or [pages, page_size, ...], whatever they came in
    q_scale: Tensor | None  # [s_q, index_n_heads, 4] ue8m0 bytes
    k_scale: Tensor | None  # [...] fp32, or [..., 4] ue8m0 bytes
    block_table: Tensor | None


def check_index_inputs(
    q, k, weights, ks, ke, q_scale, k_scale, block_table, backend: str
) -> tuple[_IndexKeys, int]:
    """The keys and scales for the op, and the width of a row of logits."""
    dims: dict[str, int] = {}
    q_scale = _check_index_q(q, q_scale, dims)
    k, k_scale, block_table = _check_index_k(k, k_scale, block_table, q, dims)
    check_tensor("weights", weights, "s_q index_n_heads", dims, (compute_dtype(q.dtype),), q.device)
    check_ranges(ks, ke, dims, q.device)
    check_call(backend, q.device, q, k, weights)
    if runs_triton(backend, q.device) and q.dtype == torch.float16 and k.dtype == torch.uint8:
        raise TypeError("q: expected bfloat16 or float32, as k is e2m1, got float16 (triton backend)")
    width = k.shape[0]
    if block_table is not None:
        check_block_table(block_table, dims, q.shape[0], q.device)
        width = block_table.shape[1] * k.shape[1]
    return _IndexKeys(k, q_scale, k_scale, block_table), width


def _check_index_q(q: Tensor, q_scale: Tensor | None, dims: dict[str, int]) -> Tensor | None:
    """The scales of q, in bytes."""
    if isinstance(q, Tensor) and q.dtype == torch.uint8:
        check_tensor("q", q, f"s_q index_n_heads {E2M1_WIDTH // 2}", dims, (torch.uint8,))
        dims["index_head_dim"] = E2M1_WIDTH
        check_tensor("q_scale", q_scale, "s_q index_n_heads", dims, (torch.int32,), q.device)
        return _ue8m0_bytes(q_scale)
    check_tensor("q", q, "s_q index_n_heads index_head_dim", dims, (*FLOATS, torch.float8_e4m3fn))
    if q_scale is not None:
        raise ValueError("q_scale: expected None, as q is not e2m1 (scales of e4m3 go into weights)")
    return None


def _check_index_k(k, k_scale, block_table, q: Tensor, dims: dict[str, int]):
    """k, its scales and the block table as the ops take them; a packed cache becomes views of its parts."""
    dtype = k.dtype if isinstance(k, Tensor) else None
    if dtype == torch.uint8 and k_scale is None:
        fmt = format_of("k", k, INDEX_K_FORMATS)
        check_tensor("k", k, f"pages page_size {fmt.bytes}", dims, (torch.uint8,), q.device)
        _check_format("k", k, fmt, dims["index_head_dim"], "index_head_dim")
        if block_table is None:
            block_table = torch.arange(k.shape[0], dtype=torch.int32, device=k.device)[None]
        return *fmt.views(k), block_table
    rows = "s_kv" if block_table is None else "pages page_size"
    if dtype == torch.uint8:
        if dims["index_head_dim"] != E2M1_WIDTH:
            raise ValueError(
                f"q: expected index_head_dim={E2M1_WIDTH}, as k is e2m1, got {dims['index_head_dim']}"
            )
        check_tensor("k", k, f"{rows} {E2M1_WIDTH // 2}", dims, (torch.uint8,), q.device)
        check_tensor("k_scale", k_scale, rows, dims, (torch.int32,), q.device)
        return k, _ue8m0_bytes(k_scale), block_table
    if dtype == torch.float8_e4m3fn:
        check_tensor("k", k, f"{rows} index_head_dim", dims, (torch.float8_e4m3fn,), q.device)
        check_tensor("k_scale", k_scale, rows, dims, (torch.float32,), q.device)
        return k, k_scale, block_table
    if q.dtype not in FLOATS:
        kind = type(k).__name__ if dtype is None else str(dtype).removeprefix("torch.")
        raise TypeError(f"k: expected quantised keys (float8_e4m3fn or uint8), as q is quantised, got {kind}")
    check_tensor("k", k, f"{rows} index_head_dim", dims, (q.dtype,), q.device)
    if k_scale is not None:
        raise ValueError("k_scale: expected None, as k is not quantised")
    return k, None, block_table


def _ue8m0_bytes(scales: Tensor) -> Tensor:
    """``[..., 4]`` uint8 of int32 scales, the low byte first; a view."""
    return scales[..., None].view(torch.uint8)


def check_block_table(block_table: Tensor, dims: dict[str, int], s_q: int, device: torch.device) -> None:
    check_tensor("block_table", block_table, "n max_pages", dims, (torch.int32,), device)
    n = block_table.shape[0]
    if (n == 0 and s_q > 0) or (n > 0 and s_q % n):
        raise ValueError(f"block_table: expected a number of rows that divides s_q={s_q}, got {n}")


def _check_format(name: str, cache: Tensor, fmt: Format, width: int, width_name: str) -> None:
    if width != fmt.width:
        raise ValueError(
            f"q: expected {width_name}={fmt.width}, as {name} has {fmt.bytes} bytes a token, got {width}"
        )
    fmt.check_in_place(name, cache)


def check_ranges(ks: Tensor, ke: Tensor, dims: dict[str, int], device: torch.device) -> None:
    check_tensor("ks", ks, "s_q", dims, (torch.int32,), device)
    check_tensor("ke", ke, "s_q", dims, (torch.int32,), device)


def check_slots(slots: Tensor, dims: dict[str, int], device: torch.device) -> None:
    check_tensor("slots", slots, "tokens", dims, (torch.int32, torch.int64), device)


def check_rope(cos, sin, pairing, columns: str, d: int, dims: dict[str, int], device) -> None:
    """cos and sin of a rotation of at most d dimensions, or neither."""
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin: expected both or neither")
    if cos is None:
        return
    check_tensor("cos", cos, f"tokens {columns}", dims, (torch.float32,), device)
    check_tensor("sin", sin, f"tokens {columns}", dims, (torch.float32,), device)
    if 2 * cos.shape[1] > d:
        raise ValueError(f"cos: expected at most {d // 2} columns, got {cos.shape[1]}")
    if pairing not in PAIRINGS:
        raise ValueError(f"pairing: expected 'half' or 'interleaved' with cos, got {pairing!r}")


def check_scale(min_scale: float) -> None:
    if not min_scale > 0:
        raise ValueError(f"min_scale: expected a positive number, got {min_scale}")


def check_topk(topk: int) -> None:
    if isinstance(topk, bool | Tensor | float):
        raise TypeError(f"topk: expected an int, got {type(topk).__name__}")
    if topk < 1:
        raise ValueError(f"topk: expected at least 1, got {topk}")


def check_selection(name, indices, spec, length_name, length, dims, device) -> None:
    check_tensor(name, indices, spec, dims, (torch.int32,), device)
    if length is not None:
        check_tensor(length_name, length, "s_q", dims, (torch.int32,), device)


def check_sink(attn_sink: Tensor | None, dims: dict[str, int], device: torch.device) -> None:
    if attn_sink is not None:
        check_tensor("attn_sink", attn_sink, "h_q", dims, (torch.float32,), device)


def check_call(backend: str, device: torch.device, *tensors: Tensor | None) -> None:
    ops.check_backend(backend, device)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError(
            "gradients: sparse_attn is for inference and has no backward, but an input requires grad; "
            "call it under torch.no_grad() or torch.inference_mode()"
        )
    if runs_triton(backend, device) and any(t is not None and t.dtype == torch.float64 for t in tensors):
        raise TypeError("dtype: the triton backend takes bfloat16, float16 or float32, got float64")


def runs_triton(backend: str, device: torch.device) -> bool:
    return backend == "triton" or (backend == "auto" and device.type == "cuda")


def check_triton_latent(name: str, kv: Tensor | None, q: Tensor) -> None:
    if kv is None or kv.dtype != torch.uint8:
        return
    if kv.shape[-1] not in TRITON_KV_BYTES:
        sizes = " or ".join(map(str, TRITON_KV_BYTES))
        raise ValueError(
            f"{name}: the triton backend reads {sizes} bytes a token, got {kv.shape[-1]}; unpack it"
        )
    if q.dtype == torch.float16:  # a value times its scale need not fit
        raise TypeError(
            f"q: expected bfloat16 or float32, as {name} is quantised, got float16 (triton backend)"
        )


def check_warp_specialized(variant, backend, q, kv, extra_kv, d_v, scale, out) -> None:
    if variant != "warp_specialized":
        raise ValueError(f"variant: expected None or 'warp_specialized', got {variant!r}")
    if backend not in ("auto", "triton") or q.device.type != "cuda":
        raise ValueError(
            f"variant: {variant!r} needs backend 'triton' and cuda tensors, got {backend!r} and {q.device}"
        )
    major, minor = torch.cuda.get_device_capability(q.device)
    if (major, minor) != (9, 0):
        raise ValueError(f"variant: {variant!r} needs sm_90, {q.device} is sm_{major}{minor}")
    _, h_q, d_qk = q.shape
    if h_q % 64:
        raise ValueError(f"q: expected h_q to be a multiple of 64 for {variant!r}, got {h_q}")
    if (d_qk, d_v) != (576, 512):
        raise ValueError(f"q, d_v: expected d_qk=576 and d_v=512 for {variant!r}, got {d_qk} and {d_v}")
    if not scale > 0:
        raise ValueError(f"softmax_scale: expected a positive number for {variant!r}, got {scale}")
    for name, tensor in (("q", q), ("kv", kv), ("extra_kv", extra_kv), ("out", out)):
        if tensor is None:
            continue
        if tensor.dtype != torch.bfloat16:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise TypeError(f"{name}: expected dtype bfloat16 for {variant!r}, got {dtype}")
        if tensor.stride(-1) != 1 or any(n % 16 for n in (tensor.storage_offset(), *tensor.stride()[:-1])):
            raise ValueError(
                f"{name}: expected contiguous rows that begin at multiples of 32 bytes for {variant!r}, "
                f"got strides {tensor.stride()} and offset {tensor.storage_offset()}"
            )
    for name, tensor in (("kv", kv), ("extra_kv", extra_kv)):
        if tensor is not None and tensor.shape[0] * tensor.stride(0) >= 2**36:
            raise ValueError(f"{name}: expected less than 128 GiB for {variant!r}, got {list(tensor.shape)}")


def check_latent(name: str, kv: Tensor, dims: dict[str, int], q: Tensor, d_v: int) -> Tensor:
    """kv as the ops take it: rows ``[slots, d_qk]`` or pages ``[pages, page_size, bytes]``, never a copy."""
    if isinstance(kv, Tensor) and kv.dtype == torch.uint8:
        return _check_quantised_latent(name, kv, q, d_v)
    specs = {3: "pages page_size d_qk", 4: "pages page_size 1 d_qk"}
    spec = specs.get(kv.dim(), "s_kv d_qk") if isinstance(kv, Tensor) else "s_kv d_qk"
    check_tensor(name, kv, spec, dict(dims), (q.dtype,), q.device)
    if kv.dim() == 2:
        return kv
    if kv.dim() == 4:
        kv = kv.squeeze(2)
    pages, page_size, size = kv.shape
    if page_size == 1:  # whose stride says nothing
        return kv[:, 0]
    if pages > 1 and kv.stride(0) != page_size * kv.stride(1):
        raise ValueError(
            f"{name}: expected pages that follow each other without gaps, got strides {kv.stride()}; "
            "a slot number could not address it without a copy of the cache"
        )
    return kv.as_strided((pages * page_size, size), kv.stride()[1:])


def _check_quantised_latent(name: str, kv: Tensor, q: Tensor, d_v: int) -> Tensor:
    fmt = format_of(name, kv, KV_FORMATS)
    kv = check_quantised_pages(name, kv, fmt, q.device)
    _check_format(name, kv, fmt, q.shape[2], "d_qk")
    if d_v != QUANTISED_D_V:
        raise ValueError(f"d_v: expected {QUANTISED_D_V}, as {name} is quantised, got {d_v}")
    return kv


def check_quantised_pages(name: str, kv: Tensor, fmt: Format, device: torch.device) -> Tensor:
    """A view ``[pages, page_size, bytes]`` of a cache in any of its shapes."""
    specs = {2: f"s_kv {fmt.bytes}", 3: f"pages page_size {fmt.bytes}", 4: f"pages page_size 1 {fmt.bytes}"}
    rank = kv.dim() if kv.dim() in specs and not (fmt.by_page and kv.dim() == 2) else 3
    check_tensor(name, kv, specs[rank], {}, (torch.uint8,), device)
    if rank == 2:
        return kv[:, None]  # pages of one token
    return kv.squeeze(2) if rank == 4 else kv


def check_parts(name: str, parts: Tensor | Sequence[Tensor]) -> Tensor:
    if isinstance(parts, Tensor):
        return parts
    if not isinstance(parts, Sequence) or not parts or not all(isinstance(p, Tensor) for p in parts):
        raise TypeError(f"{name}: expected a tensor or a non-empty sequence of tensors, got {parts!r:.80}")
    if any(p.shape != parts[0].shape for p in parts):
        shapes = ", ".join(str(list(p.shape)) for p in parts)
        raise ValueError(f"{name}: expected parts of one shape, got {shapes}")
    return torch.stack(list(parts))


def check_output(
    name: str, out: Tensor | None, dims: dict[str, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    if out is None:
        return torch.empty(tuple(dims.values()), dtype=dtype, device=device)
    check_tensor(name, out, " ".join(dims), dims, (dtype,), device)
    return out


def check_attention_outputs(out, q: Tensor, d_v: int, asked: dict[str, bool]) -> tuple[Tensor, ...]:
    """What the op fills: out ``[s_q, h_q, d_v]``, and one ``[s_q, h_q]`` for each name of ``asked``.

    The caller may own those that it asked for: ``out`` is then the first of them, or the tuple of all.
    """
    returned = ["out", *(name for name, wanted in asked.items() if wanted)]
    if out is None or len(returned) == 1:
        out = (out,)
    elif not isinstance(out, tuple) or len(out) != len(returned):
        got = f"{len(out)} of them" if isinstance(out, tuple) else type(out).__name__
        raise TypeError(f"out: expected the tuple ({', '.join(returned)}), as these are returned, got {got}")
    given = dict(zip(returned, out, strict=False))
    dims = {"s_q": q.shape[-3], "h_q": q.shape[-2]}
    result = check_output("out", given.get("out"), {**dims, "d_v": d_v}, q.dtype, q.device)
    dtype = compute_dtype(q.dtype)
    return result, *(check_output(name, given.get(name), dims, dtype, q.device) for name in asked)
