"""A stand-in for CUDA graphs without a GPU: records the ops of a call, and runs them again on its tensors.

It refuses ops that read data on the host, copy from it or have shapes that depend on data. Copies between
devices cannot be seen on a CPU. Unlike those of a CUDA graph, the ops also run while they are recorded. An op
of ``sparse_attn`` is recorded whole, whatever is inside.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
REFUSED = {
    *(aten._local_scalar_dense, aten.equal, aten.lift_fresh, aten.lift_fresh_copy),
    *(aten.nonzero, aten.masked_select, aten.bincount, aten.repeat_interleave.Tensor),
    *(aten._unique2, aten.unique_dim, aten.unique_consecutive),
}
BY_INDEX = {aten.index, aten.index_put, aten.index_put_}  # data-dependent if an index is a mask


class Graph(TorchDispatchMode):
    """Runs ``function`` and keeps its ``result``, which :meth:`replay` fills again."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__()
        self.ops: list[tuple[Callable[..., Any], Any, Any, Any]] = []
        with mock.patch.object(Tensor, "tolist", lambda x: refuse("tolist")), self:  # it comes as no op
            self.result = function()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        packet, kwargs = function.overloadpacket, kwargs or {}
        masked = packet in BY_INDEX and any(x is not None and x.dtype == torch.bool for x in args[1])
        if masked or packet in REFUSED or function in REFUSED:
            refuse(function)
        result = function(*args, **kwargs)
        if not function.is_view:  # a view shows what its base holds then
            self.ops.append((function, args, kwargs, result))
        return result

    def replay(self) -> None:
        for function, args, kwargs, result in self.ops:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old is not new:
                    old.copy_(new)


def refuse(what: object) -> None:
    raise RuntimeError(f"cannot be captured: {what} reads data on the host, copies from it, or sizes by data")
