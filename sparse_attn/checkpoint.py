"""Attention weights in Hugging Face checkpoints: names, fp8 blocks, files that are read by tensor."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# DeepSeek's names of a layer's modules, which the layers here carry, and Hugging Face's.
NAMES = {
    "wq_a": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "wq_b": "q_b_proj",
    "wkv_a": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "wkv_b": "kv_b_proj",
    "wo": "o_proj",
    **{f"indexer.{name}": f"indexer.{name}" for name in ("wq_b", "wk", "k_norm", "weights_proj")},
}
FP32 = ("indexer.weights_proj.weight", "indexer.k_norm.weight", "indexer.k_norm.bias")  # kept so if stored so
INDEXER = "indexer."
SCALE = "_scale_inv"  # what the name of an fp8 weight's block scales adds to the weight's
BLOCK_FIELD = "quantization_config.weight_block_size"
BLOCK = (128, 128)  # of DeepSeek's checkpoints, for configs without that field


@dataclass(frozen=True)
class Part:
    """One of ``of`` equal parts of a tensor along ``dim``."""

    dim: int
    index: int
    of: int


class Safetensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name; each is read from its file when it is asked for.

    Args:
        path: a .safetensors file, or a folder that holds one or, with
            ``model.safetensors.index.json``, several.

    Needs the package safetensors.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        index = path / "model.safetensors.index.json"
        single = path if path.is_file() else path / "model.safetensors"
        if index.exists():
            files = json.loads(index.read_text())["weight_map"]
            self._files = {name: path / file for name, file in files.items()}
        elif single.exists():
            with _open(single) as file:
                self._files = dict.fromkeys(file.keys(), single)
        else:
            raise FileNotFoundError(
                f"path: expected a .safetensors file, or a folder with model.safetensors or {index.name}, "
                f"got {path}"
            )

    def __getitem__(self, name: str) -> Tensor:
        with _open(self._files[name]) as file:
            return file.get_tensor(name)

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor, which is not read."""
        with _open(self._files[name]) as file:
            return file.get_slice(name).get_shape()

    def part(self, name: str, part: Part) -> Tensor:
        """A part of a tensor, the rest of which is not read."""
        with _open(self._files[name]) as file:
            stored = file.get_slice(name)
            return _cut(stored, stored.get_shape(), part)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _open(file: Path):
    from safetensors import safe_open

    return safe_open(file, framework="pt")


def _cut(stored, shape: Sequence[int], part: Part) -> Tensor:
    size = shape[part.dim] // part.of
    cut = slice(part.index * size, (part.index + 1) * size)
    # A copy, as a view would keep the memory or the file of the whole.
    return stored[(slice(None),) * part.dim + (cut,)].clone(memory_format=torch.contiguous_format)


def shape_of(state_dict: Mapping[str, Tensor], name: str) -> list[int]:
    """The shape of a tensor, which is not read from a file of :class:`Safetensors`."""
    return state_dict.shape(name) if isinstance(state_dict, Safetensors) else list(state_dict[name].shape)


def part_of(state_dict: Mapping[str, Tensor], name: str, part: Part | None) -> Tensor:
    """A part of a tensor, contiguous and in memory of its own; without ``part`` the tensor as it is held."""
    if part is None:
        return state_dict[name]
    if isinstance(state_dict, Safetensors):
        return state_dict.part(name, part)
    return _cut(state_dict[name], state_dict[name].shape, part)


def from_hf(
    state_dict: Mapping[str, Tensor],
    layer: int,
    shapes: Mapping[str, Sequence[int]],
    block_size: Sequence[int] | None = None,
    parts: Mapping[str, Part] | None = None,
) -> dict[str, Tensor]:
    """The weights of one attention layer under DeepSeek's names, fp8 blocks dequantised.

    Args:
        state_dict: all or some of a model's tensors, under names ending in
            ``layers.{layer}.self_attn.*``; only those of the layer are read.
        layer: which layer.
        shapes: the names that are expected and their shapes. Without an indexer's, those of the layer are
            left alone.
        block_size: rows and columns that share a scale in fp8 weights; None if the config does not say it.
        parts: for some of the names, which part of the stored tensor is read, where ``shapes`` has the
            part's shape. Block scales are read whole.

    Returns:
        A tensor for each of ``shapes``, in the dtype in which it is stored; fp8 becomes bf16.

    Raises:
        ValueError: tensors that are missing, unexpected or of another shape, all of them named.
    """
    prefix = _prefix(state_dict, layer)
    stored = {name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)}
    theirs = {_hf_name(name): name for name in shapes}
    if not any(name.startswith(INDEXER) for name in theirs):
        stored = {name for name in stored if not name.startswith(INDEXER)}
    missing = [name for name in theirs if name not in stored]
    wrong = [f"missing {prefix}{name}" for name in missing]
    if missing and all(name.startswith(INDEXER) for name in missing):
        wrong.append(
            "if the layer shares another layer's selection, indexer_types in the config has to say it"
        )
    block = block_size or BLOCK
    sizes = block if isinstance(block, Sequence) else ()
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"{BLOCK_FIELD}: expected two sizes of at least 1, got {block_size}")
    weights = {}
    for name in [name for name in theirs if name in stored]:
        key, shape, scaled = prefix + name, list(shapes[theirs[name]]), name + SCALE in stored
        part, start = (parts or {}).get(theirs[name]), [0] * len(shape)
        if part:
            start[part.dim] = part.index * shape[part.dim]
            shape[part.dim] *= part.of
        tensor = state_dict[key] if part is None else None  # a part is read once the shape is right
        found = shape_of(state_dict, key) if tensor is None else list(tensor.shape)
        if found != shape:
            wrong.append(f"{key} of shape {found} where {shape} is expected")
            continue
        if tensor is None:
            tensor = part_of(state_dict, key, part)
        if scaled and tensor.dtype == torch.float8_e4m3fn:
            stored.remove(name + SCALE)
            scale, blocks = state_dict[key + SCALE], _blocks(shape, block)
            if list(scale.shape) == blocks:
                weights[theirs[name]] = _dequantize(tensor, scale, block, start).bfloat16()
            else:
                source = "" if block_size else " (not in the config, assumed)"
                wrong.append(
                    f"{key}{SCALE} of shape {list(scale.shape)} where {blocks} is expected, one "
                    f"scale per block of {BLOCK_FIELD}={list(block)}{source} in {shape}"
                )
        elif tensor.is_floating_point() and tensor.element_size() > 1:
            weights[theirs[name]] = tensor
        else:
            wrong.append(
                f"{key} of dtype {tensor.dtype} with{'' if scaled else 'out'} {name}{SCALE}, where "
                f"a floating-point dtype, or float8_e4m3fn with {name}{SCALE}, is expected"
            )
    wrong += [f"unexpected {prefix}{name}" for name in sorted(stored - theirs.keys())]
    if wrong:
        raise ValueError(f"state_dict: layer {layer} does not fit: {'; '.join(wrong)}")
    return weights


def to_hf(weights: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """One attention layer's weights under the names ``model.layers.{layer}.self_attn.*``: the way back."""
    return {f"model.layers.{layer}.self_attn.{_hf_name(name)}": w for name, w in weights.items()}


def _hf_name(name: str) -> str:
    module, _, parameter = name.rpartition(".")
    return f"{NAMES[module]}.{parameter}"


def _prefix(state_dict: Mapping[str, Tensor], layer: int) -> str:
    """What stands before the parameters of the layer, the same for all of them."""
    part = f"layers.{layer}.self_attn."
    found = {name[: name.index(part)] + part for name in state_dict if f".{part}" in f".{name}"}
    if len(found) == 1:
        return found.pop()
    example = next(iter(state_dict), "no tensor at all")
    if not found:
        raise ValueError(
            f"state_dict: expected names with {part!r}, got none among names such as {example!r}"
        )
    raise ValueError(f"state_dict: expected one model, got {part!r} under {', '.join(sorted(found))}")


def _blocks(shape: Sequence[int], block_size: Sequence[int]) -> list[int]:
    """How many blocks each dimension has, the last one of which may be cut."""
    return [-(-size // block) for size, block in zip(shape, block_size, strict=True)]


def dequantize_blocks(weight: Tensor, scale_inv: Tensor, block_size: Sequence[int] = BLOCK) -> Tensor:
    """fp32 ``[n, m]`` from e4m3 values with one scale for each block of them.

    Args:
        weight: ``[n, m]`` float8_e4m3fn.
        scale_inv: ``[ceil(n / block_size[0]), ceil(m / block_size[1])]``, what a value is multiplied by.
        block_size: rows and columns that share a scale.

    Source: DeepSeek-V3 report, section 3.3.2; ``weight_scale_inv`` in its checkpoints.
    """
    blocks = _blocks(weight.shape, block_size)
    if list(scale_inv.shape) != blocks:
        raise ValueError(
            f"scale_inv: expected shape {blocks} for a weight {list(weight.shape)} in blocks of "
            f"{list(block_size)}, got {list(scale_inv.shape)}"
        )
    return _dequantize(weight, scale_inv, block_size, (0, 0))


def _dequantize(weight: Tensor, scale_inv: Tensor, block_size: Sequence[int], start: Sequence[int]) -> Tensor:
    """The same for a part that begins at ``start`` in the weight whose scales are given."""
    scale = scale_inv.float()
    for dim, (first, size, block) in enumerate(zip(start, weight.shape, block_size, strict=True)):
        blocks = torch.arange(first, first + size, device=scale.device) // block
        scale = scale.index_select(dim, blocks)
    return weight.float() * scale
