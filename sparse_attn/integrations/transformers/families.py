"""Which classes of transformers become which of ours: one line for each family that has an indexer."""

import importlib
import inspect

from torch import nn

from .blocks import BlockAttention, BlockIndexer
from .deepseek_v4 import CompressedAttention, CompressedIndexer, Compressor
from .inputs import ACCEPTED
from .latent import Dots3Attention, LatentAttention
from .pools import Glm5NextAttention, Glm5NextIndexer, Qwen4ExpAttention, Qwen4ExpIndexer
from .tokens import HYV4Indexer, MistralIndexer, TokenIndexer

SPARSE: dict[type[nn.Module], type[nn.Module]] = {}  # transformers' class: ours
DENSE: dict[type[nn.Module], type[nn.Module]] = {}  # ours, also those of attach(): transformers'
SUPPORTED: list[str] = []  # families, by model_type
HALF, INTERLEAVED = "apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave"  # names of their functions


def _family(
    name: str, prefix: str, attention: type, indexer: type, rotation: str | None = None, **others: type
) -> None:
    """Make the classes of one family, if this release of transformers has it."""
    try:
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    except ModuleNotFoundError:
        return
    theirs = getattr(module, f"{prefix}Attention")
    accepted = accepted_by(theirs)
    SPARSE[theirs] = subclass(theirs, attention, accepted=accepted)
    theirs = next(
        x for name, x in vars(module).items() if name.startswith(prefix) and name.endswith("Indexer")
    )
    SPARSE[theirs] = subclass(theirs, indexer, **_rotation(module, rotation))
    for part, ours in others.items():
        theirs = getattr(module, f"{prefix}{part}")
        SPARSE[theirs] = subclass(theirs, ours)
    SUPPORTED.append(name)


def accepted_by(theirs: type) -> frozenset[str]:
    """Names of the arguments that an attention class may be given."""
    return frozenset(inspect.signature(theirs.forward).parameters) | ACCEPTED


def attention_names(model: nn.Module) -> list[str]:
    """Names of the classes of a model's attention layers."""
    return sorted({name for m in model.modules() if (name := type(m).__name__).endswith("Attention")})


def _rotation(module, name: str | None) -> dict:
    return {} if name is None else {"rotation": staticmethod(getattr(module, name))}


def subclass(theirs: type, mixin: type, **attributes) -> type:
    """In this module's namespace, so that models can be pickled."""
    name = f"Sparse{theirs.__name__}"
    globals()[name] = ours = type(name, (mixin, theirs), {"__module__": __name__, **attributes})
    DENSE[ours] = theirs  # pyright: ignore[reportArgumentType]
    return ours


_family("deepseek_v32", "DeepseekV32", LatentAttention, TokenIndexer, HALF)
_family("glm_moe_dsa", "GlmMoeDsa", LatentAttention, TokenIndexer, INTERLEAVED)
_family("axk2", "AXK2", LatentAttention, TokenIndexer, HALF)
_family("hy_v4", "HYV4", LatentAttention, HYV4Indexer, HALF)
_family("hy_v4_vl", "HYV4VL", LatentAttention, HYV4Indexer, HALF)
_family("dots3_note", "Dots3NoteText", Dots3Attention, TokenIndexer, INTERLEAVED)
_family("mistral_large4", "MistralLarge4Text", LatentAttention, MistralIndexer, INTERLEAVED)
_family("glm5_next", "Glm5NextText", Glm5NextAttention, Glm5NextIndexer)
_family("qwen4_exp", "Qwen4ExpText", Qwen4ExpAttention, Qwen4ExpIndexer, HALF)
_family("minimax_m3_vl", "MiniMaxM3VL", BlockAttention, BlockIndexer, HALF)
_family(
    *("deepseek_v4", "DeepseekV4", CompressedAttention, CompressedIndexer),
    CSACompressor=Compressor,
    HCACompressor=Compressor,
)
