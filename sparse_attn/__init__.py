"""DeepSeek Sparse Attention for PyTorch: exact, deterministic, bounded in memory, on every device."""

from ._version import __version__
from .functional import (
    index_logits,
    lightning_topk,
    merge_attention,
    select_topk,
    sparse_gqa,
    sparse_mla,
)

__all__ = [
    "__version__",
    "index_logits",
    "lightning_topk",
    "merge_attention",
    "select_topk",
    "sparse_gqa",
    "sparse_mla",
]
