"""Exact DSA over several processes, on torch.distributed.

A context longer than one device's memory, or a layer wider than one device: keys or heads are spread over the
ranks of a DeviceMesh. ``SparseMLA(config, mesh=mesh)`` and ``DSACache(config, max_tokens, mesh=mesh)`` do all
of it. What they are made of, for engines: :class:`Shards` says who stores which position,
:func:`global_topk` selects what one process would select, :func:`global_merge` joins partial attention.
"""

from .ranks import EndedError, Ranks
from .shards import Shards, global_merge, global_topk

__all__ = ["EndedError", "Ranks", "Shards", "global_merge", "global_topk"]
