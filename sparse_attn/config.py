"""The configuration of a DSA layer, with the field names of DeepSeek's and Hugging Face's configs."""

import dataclasses
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

# Model types whose attention is computed here, and the indexer_rope of those that have an indexer.
MODEL_TYPES: dict[Any, str | None] = {
    "deepseek_v3": None,
    "deepseek_v32": "half",
    "glm_moe_dsa": "interleaved",
    "llama": None,
    "mistral": None,
    "mixtral": None,
    "qwen2": None,
}
# A field that is not read is refused if its name has one of these words, which speak of attention ...
ATTENTION = re.compile(
    r"att(n|ention)|index|rope|rotary|alibi|position|head|kv|query|key|value|(^|_)(q|k|v|o|qk|qkv)(_|$)|sink|"
    r"causal|window|sliding|gat(e|ed|ing)(_|$)|soft_?cap|scal(e|ing)|compress|pool|lora|per_layer|block|"
    r"linear_|conv|mamba|ssm"
)
# ... and none of these, which place it elsewhere in the model, in training or in generation.
ELSEWHERE = re.compile(
    r"dropout|attn_implementation|^output_(attentions|router)|expert|moe|rout|mlp|_dense_|mtp|lm_head|"
    r"logits?_scal|final_logit|token_i(d|ndex)|^top_k$"
)
# One of these for all layers, as a config here describes each of them.
LAYER_TYPES = ("full_attention", "indexed_attention", "deepseek_sparse_attention")
# Of a size that only the other kind of layer has. The fields are ints to a type checker, because
# DSAConfig refuses to be made without the sizes of its own kind.
ABSENT: Any = None


def _known(cls: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """What ``config`` gives for the fields of a dataclass."""
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: value for name, value in config.items() if name in names and value is not None}


def _missing(cls: Any, values: Mapping[str, Any]) -> str:
    """The fields without a default that ``values`` lacks."""
    required = (field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING)
    return ", ".join(name for name in required if name not in values)


def _not_computed(fields: Mapping[str, Any], computed: Mapping[str, Any]) -> str:
    """The fields, with their values, that are neither as computed nor, when it does not name them, off."""
    wrong = []
    for name, value in fields.items():
        expected = computed.get(name)
        if isinstance(value, float | int) and isinstance(expected, float):
            fits = math.isclose(value, expected, rel_tol=1e-6)
        else:
            fits = value == expected if name in computed else not value
        if value is not None and not fits:
            wrong.append(f"{name}={reprlib.repr(value)}")
    return ", ".join(wrong)


@dataclasses.dataclass(frozen=True, kw_only=True)
class YaRN:
    """YaRN context extension, as in the ``rope_scaling`` of DeepSeek's configs.

    Source: "YaRN: Efficient Context Window Extension of Large Language Models", section 3.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    @property
    def rotation_scale(self) -> float:
        """Multiplies cos and sin; 1 when mscale and mscale_all_dim agree."""
        return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)

    @property
    def softmax_factor(self) -> float:
        """Multiplies the softmax scale."""
        return self._mscale(self.mscale_all_dim) ** 2

    def _mscale(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    @classmethod
    def from_dict(cls, scaling: Mapping[str, Any]) -> "YaRN | None":
        """From a ``rope_scaling`` or ``rope_parameters`` dict; None for the default type."""
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in ("default", "yarn"):
            raise ValueError(f"rope_scaling: expected type 'yarn' or 'default', got {kind!r}")
        yarn, read, computed = None, {"rope_type", "type", "rope_theta"}, {"partial_rotary_factor": 1.0}
        if kind == "yarn":
            values = _known(cls, scaling)
            if missing := _missing(cls, values):
                raise ValueError(f"rope_scaling: expected {missing} for YaRN, got {dict(scaling)}")
            yarn = cls(**values)
            read |= values.keys()
            computed |= {"attention_factor": yarn.rotation_scale, "truncate": True}
        if others := _not_computed({n: v for n, v in scaling.items() if n not in read}, computed):
            raise ValueError(f"rope_scaling: RoPE of type {kind!r} is not computed with {others}")
        return yarn


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    old, new = (dict(config.get(name) or {}) for name in ("rope_scaling", "rope_parameters"))
    if old and new and old != new:
        raise ValueError(f"rope_scaling: expected it or rope_parameters, got both: {old} and {new}")
    return new or old


def _indexer_types(config: Mapping[str, Any]) -> Sequence[str]:
    """Which layers run their indexer, as GLM-5.2's config and the engines say it."""
    if types := config.get("indexer_types"):
        return types
    if pattern := config.get("index_topk_pattern"):
        return [{"F": "full", "S": "shared"}.get(letter) or letter for letter in pattern]
    every, first = config.get("index_topk_freq") or 1, config.get("index_skip_topk_offset")
    if every == 1:
        return ()
    if "num_hidden_layers" not in config:
        raise ValueError(f"num_hidden_layers: expected with index_topk_freq={every}, got None")
    first = 2 if first is None else first
    layers = range(config["num_hidden_layers"])
    return ["shared" if max(layer - first + 1, 0) % every else "full" for layer in layers]


def _other_attention(config: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """The fields of a model's config, with their values, that ask for attention which no layer computes."""
    read = {field.name for field in dataclasses.fields(DSAConfig)} | {
        *("rope_parameters", "indexer_rope_interleave"),
        *("index_topk_pattern", "index_topk_freq", "index_skip_topk_offset"),
    }
    if config.get("use_sliding_window") is False:
        read |= {"sliding_window", "max_window_layers"}
    fields = {
        name: value
        for name, value in config.items()
        if name not in read and ATTENTION.search(name) and not ELSEWHERE.search(name)
    }
    kinds = sorted(set(config.get("layer_types") or ()))
    if kinds not in ([], *([kind] for kind in LAYER_TYPES)):
        fields["layer_types"] = kinds
    is_mla = "kv_lora_rank" in values
    computed = {
        "rope_interleave": is_mla,
        "partial_rotary_factor": 1.0,
        "position_embedding_type": "rope",
        "is_causal": True,
    }
    if is_mla:
        computed["qk_head_dim"] = values.get("qk_nope_head_dim", 0) + values.get("qk_rope_head_dim", 0)
    return _not_computed(fields, computed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DSAConfig:
    """Sizes and conventions of one sparse attention layer.

    A config with ``kv_lora_rank`` describes multi-head latent attention (:class:`SparseMLA`) and needs the
    sizes from ``q_lora_rank`` to ``v_head_dim``. One without describes grouped-query attention
    (:class:`SparseGQA`) and needs ``num_key_value_heads`` and ``head_dim``.

    Args:
        indexer_rope: how the indexer pairs the dimensions that RoPE rotates: "half" (DeepSeek-V3.2)
            or "interleaved" (GLM-5). It has no default, because the wrong one silently loses
            accuracy. The main attention is interleaved for MLA and half-split for GQA.
        index_rope_head_dim: leading dimensions of the index head that RoPE rotates; by default those
            of the main attention.
        indexer_fp8: rotate index queries and keys by a Hadamard matrix and round them to fp8 as
            DeepSeek's own inference code does. Off by default: bf16 index keys are more exact.
        indexer_types: "full" or "shared" for each layer of the model; a shared one has no indexer and takes
            the selection of the last full one before it. Layers beyond the list are full.
        attention_bias: whether the projections of GQA have biases; "qkv" for all but the output's (Qwen2).
        rms_norm_eps: of the norms of MLA's latents.
        rope_scaling: :class:`YaRN`, or a Hugging Face ``rope_scaling`` dict.
    """

    hidden_size: int
    num_attention_heads: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    indexer_rope: Literal["half", "interleaved"]
    q_lora_rank: int = ABSENT
    kv_lora_rank: int = ABSENT
    qk_nope_head_dim: int = ABSENT
    qk_rope_head_dim: int = ABSENT
    v_head_dim: int = ABSENT
    num_key_value_heads: int = ABSENT
    head_dim: int = ABSENT
    index_rope_head_dim: int | None = None
    indexer_fp8: bool = False
    indexer_types: tuple[str, ...] = ()
    attention_bias: bool | Literal["qkv"] = False
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: YaRN | None = None
    max_position_embeddings: int = 163840

    def __post_init__(self) -> None:
        if isinstance(self.rope_scaling, Mapping):
            object.__setattr__(self, "rope_scaling", YaRN.from_dict(self.rope_scaling))
        if self.indexer_rope not in ("half", "interleaved"):
            raise ValueError(f"indexer_rope: expected 'half' or 'interleaved', got {self.indexer_rope!r}")
        object.__setattr__(self, "indexer_types", tuple(self.indexer_types))  # JSON gives a list
        if set(self.indexer_types) - {"full", "shared"} or self.shares_selection(0):
            raise ValueError(
                "indexer_types: expected 'full' or 'shared' for each layer, and 'full' for the first, "
                f"got {list(self.indexer_types)}"
            )
        self._check_kind()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type not in (int, int | None) or value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{field.name}: expected an int, got {value!r}")
            if value < (0 if field.name == "qk_nope_head_dim" else 1):
                raise ValueError(f"{field.name}: expected a positive size, got {value}")
        self._check_divisions()

    def _check_kind(self) -> None:
        """The sizes of this kind of attention are given, and nothing that it does not compute."""
        latent = ("q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim")
        if self.is_mla:
            kind, needed = "MLA (kv_lora_rank is given)", (*latent, "v_head_dim")
            computed = {"num_key_value_heads": (None, self.num_attention_heads), "attention_bias": (False,)}
        else:
            kind, needed = "GQA (kv_lora_rank is None)", ("num_key_value_heads", "head_dim")
            computed = {name: (None,) for name in latent}
            computed |= {"v_head_dim": (None, self.head_dim), "attention_bias": (False, True, "qkv")}
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(f"{name}: expected a size for {kind}, got None")
        for name, values in computed.items():
            if getattr(self, name) not in values:
                expected = " or ".join(map(repr, values))
                raise ValueError(f"{name}: expected {expected} for {kind}, got {getattr(self, name)!r}")

    def _check_divisions(self) -> None:
        heads, kv_heads, d = self.num_attention_heads, self.num_key_value_heads, self.index_head_dim
        if not self.is_mla and heads % kv_heads:
            raise ValueError(
                f"num_attention_heads: expected a multiple of num_key_value_heads={kv_heads}, got {heads}"
            )
        if self.rope_dim % 2:
            raise ValueError(f"qk_rope_head_dim: expected an even size, got {self.rope_dim}")
        if self.index_rope_dim % 2 or self.index_rope_dim > d:
            raise ValueError(
                f"index_rope_head_dim: expected an even size of at most index_head_dim={d}, "
                f"got {self.index_rope_dim}"
            )
        if self.indexer_fp8 and d & (d - 1):
            raise ValueError(f"index_head_dim: expected a power of two with indexer_fp8, got {d}")

    @property
    def is_mla(self) -> bool:
        return self.kv_lora_rank is not None

    @property
    def rope_dim(self) -> int:
        """Dimensions of a main-attention head that RoPE rotates."""
        return self.qk_rope_head_dim if self.is_mla else self.head_dim

    @property
    def index_rope_dim(self) -> int:
        """Leading dimensions of an index head that RoPE rotates."""
        if self.index_rope_head_dim is not None:
            return self.index_rope_head_dim
        return self.rope_dim if self.is_mla else min(self.rope_dim, self.index_head_dim)

    @property
    def softmax_scale(self) -> float:
        """Scale of the unabsorbed head; under YaRN times the square of its mscale."""
        d = self.qk_nope_head_dim + self.qk_rope_head_dim if self.is_mla else self.head_dim
        return d**-0.5 * (self.rope_scaling.softmax_factor if self.rope_scaling else 1.0)

    def shares_selection(self, layer: int) -> bool:
        """Whether this layer of the model takes the selection of an earlier one."""
        return layer < len(self.indexer_types) and self.indexer_types[layer] == "shared"

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], **overrides: Any) -> "DSAConfig":
        """From a Hugging Face ``config.json`` dict.

        RoPE is read from ``rope_theta`` and ``rope_scaling``, or from the newer ``rope_parameters``.
        ``indexer_rope`` follows from ``indexer_rope_interleave``, or from ``model_type`` for deepseek_v32
        and glm_moe_dsa, and must be given otherwise. ``indexer_types`` may also be said by
        ``index_topk_pattern``, or by ``index_topk_freq`` and ``index_skip_topk_offset``.

        Fields of other parts of the model are ignored. What changes attention and is not computed here is
        refused: a ``model_type`` of other attention, and by its name every field about attention that is
        not read, unless it is off (None, False, 0, empty) or says what is computed anyway.

        Raises:
            ValueError: a required field is missing (all of them are named), has a wrong value or is refused.
        """
        model_type = config.get("model_type")
        if model_type not in (None, "", *MODEL_TYPES):
            raise ValueError(
                f"model_type: expected one whose attention is computed here ({', '.join(MODEL_TYPES)}), got "
                f"{model_type!r}; sparse_attn.integrations.transformers runs other models with an indexer in "
                "transformers; a dict without model_type is taken at its word"
            )
        values = _known(cls, config)
        rope = _rope(config)
        if "rope_theta" in rope:
            values["rope_theta"] = rope["rope_theta"]
        values["rope_scaling"] = YaRN.from_dict(rope)
        interleave = config.get("indexer_rope_interleave")
        if interleave is None:
            values.setdefault("indexer_rope", MODEL_TYPES.get(model_type))
        else:
            values.setdefault("indexer_rope", "interleaved" if interleave else "half")
        values["indexer_types"] = _indexer_types(config)
        if model_type == "qwen2":
            values["attention_bias"] = "qkv"  # its code says so, and no field of its config
        if "kv_lora_rank" not in values and "num_attention_heads" in values and "hidden_size" in values:
            values.setdefault("num_key_value_heads", values["num_attention_heads"])
            values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
        values.update(overrides)
        values = {name: value for name, value in values.items() if value is not None}
        if refused := _other_attention(config, values):
            raise ValueError(
                f"config: no layer here computes {refused}; take out of the dict what changes no attention"
            )
        if missing := _missing(cls, values):
            raise ValueError(
                f"config: missing {missing} (model_type {config.get('model_type')!r}); "
                "pass them as keyword arguments"
            )
        return cls(**values)

    @classmethod
    def deepseek_v32(cls, **overrides: Any) -> "DSAConfig":
        """DeepSeek-V3.2, from its published config.json; the defaults of the fields are its values too."""
        values = {
            "hidden_size": 7168,
            "num_attention_heads": 128,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "index_n_heads": 64,
            "index_head_dim": 128,
            "index_topk": 2048,
            "indexer_rope": "half",
            "rope_scaling": YaRN(factor=40.0, original_max_position_embeddings=4096, mscale_all_dim=1.0),
        }
        return cls(**{**values, **overrides})

    @classmethod
    def glm5(cls, **overrides: Any) -> "DSAConfig":
        """GLM-5, from its published config.json."""
        values = {
            "hidden_size": 6144,
            "num_attention_heads": 64,
            "q_lora_rank": 2048,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 192,
            "qk_rope_head_dim": 64,
            "v_head_dim": 256,
            "index_n_heads": 32,
            "index_head_dim": 128,
            "index_topk": 2048,
            "indexer_rope": "interleaved",
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "max_position_embeddings": 202752,
        }
        return cls(**{**values, **overrides})
