"""What the attention classes here share: transformers' own forward, called with what it may be given."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .growth import growing
from .inputs import check


class SparseAttention:
    """Mixed into an attention class of transformers, beside an ``attend`` that its forward calls."""

    accepted: frozenset[str]  # names of arguments
    __getattr__: Callable[[str], Any]  # for type checkers: the other attributes are those of transformers

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Any:
        check(self, hidden_states, kwargs)
        for name in ("cache", "past_key_values"):
            if name in kwargs:
                kwargs[name] = growing(kwargs[name])
        kwargs |= self.selection(hidden_states, kwargs)
        return super().forward(hidden_states, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def selection(self, hidden_states: Tensor, kwargs: dict) -> dict:
        """Further arguments for ``attend``, of a class whose own forward has no indexer."""
        return {}
