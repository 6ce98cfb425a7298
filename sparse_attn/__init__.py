"""DeepSeek Sparse Attention for PyTorch: exact, deterministic, bounded in memory, on every device."""

from ._version import __version__
from .cache import DSACache
from .config import DSAConfig, YaRN
from .indexer import LightningIndexer
from .layers import SparseGQA, SparseMLA
from .ops.attention import merge_attention, sparse_gqa, sparse_mla
from .ops.index import index_logits, lightning_topk, physical_slots, select_topk
from .ops.writers import quantise_index_q, write_index_k, write_kv

__all__ = [
    "DSACache",
    "DSAConfig",
    "LightningIndexer",
    "SparseGQA",
    "SparseMLA",
    "YaRN",
    "__version__",
    "index_logits",
    "lightning_topk",
    "merge_attention",
    "physical_slots",
    "quantise_index_q",
    "select_topk",
    "sparse_gqa",
    "sparse_mla",
    "write_index_k",
    "write_kv",
]
