"""Wrong variants of FlashMLA's and DeepGEMM's functions: mistakes that ports make, each caught by a check.

A variant wraps a right module: it changes the arguments on their way in, or the results on their way out.
"""

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

Arguments = dict[str, Any]
Wrapper = Callable[[Callable[..., Any], Arguments], Any]  # (right function, keyword arguments) -> result


class Variant(NamedTuple):
    """One mistake in some functions, and the check that finds it."""

    name: str
    functions: tuple[str, ...]
    wrapper: Wrapper
    check: str

    def of(self, module: ModuleType) -> SimpleNamespace:
        """``module`` with the mistake in it."""
        mistaken = {name: self._mistaken(getattr(module, name)) for name in self.functions}
        public = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        return SimpleNamespace(**{**public, **mistaken})

    def _mistaken(self, right: Callable[..., Any]) -> Callable[..., Any]:
        return lambda **arguments: self.wrapper(right, arguments)


def before(change: Callable[[Arguments], Arguments | None]) -> Wrapper:
    """Change the arguments: those that ``change`` returns take the place of the given ones."""
    return lambda right, arguments: right(**{**arguments, **(change(arguments) or {})})


def after(change: Callable[[Arguments, tuple], Any]) -> Wrapper:
    """Change the results."""
    return lambda right, arguments: change(arguments, right(**arguments))


def drop(*names: str) -> Wrapper:
    """The arguments have no effect."""
    return lambda right, arguments: right(**{n: v for n, v in arguments.items() if n not in names})


def only_if(name: str, change: Callable[[Arguments], Arguments]) -> Wrapper:
    """As :func:`before`, where argument ``name`` is given."""
    return before(lambda a: change(a) if a.get(name) is not None else None)


def refuse(condition: bool) -> None:
    """For :func:`before`: raise, as a function does that does not take such arguments."""
    if condition:
        raise NotImplementedError


def pages_in_order(block_table: Tensor) -> Tensor:
    """The table of those who take a paged cache for a contiguous one."""
    pages = torch.arange(block_table.numel(), dtype=torch.int32, device=block_table.device)
    return pages.view_as(block_table)
