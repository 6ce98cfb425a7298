"""Wrong variants of FlashMLA's and DeepGEMM's functions: mistakes that ports make, each caught by a check.

A variant wraps the functions of a right module: it changes their arguments or their results.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

Arguments = dict[str, Any]
Wrapper = Callable[[Callable[..., Any], Arguments], Any]  # (right function, keyword arguments) -> result
Mistakes = dict[str, dict[str, Wrapper]]  # by the check that finds them, and by name


class Variant(NamedTuple):
    """One mistake in some functions, and the check that finds it."""

    name: str
    functions: tuple[str, ...]
    wrapper: Wrapper
    check: str

    def of(self, module: ModuleType) -> ModuleType:
        """``module`` with the mistake in it."""
        variant = ModuleType(module.__name__)
        vars(variant).update(vars(module))
        for name in self.functions:
            setattr(variant, name, self._mistaken(getattr(module, name)))
        return variant

    def _mistaken(self, right: Callable[..., Any]) -> Callable[..., Any]:
        return lambda **arguments: self.wrapper(right, arguments)


def variants(functions: tuple[str, ...], mistakes: Mistakes) -> list[Variant]:
    return [
        Variant(name, functions, wrapper, check)
        for check, found in mistakes.items()
        for name, wrapper in found.items()
    ]


def before(change: Callable[[Arguments], Arguments | None]) -> Wrapper:
    """Change the arguments: those that ``change`` returns replace the given ones."""
    return lambda right, arguments: right(**{**arguments, **(change(arguments) or {})})


def after(change: Callable[[Arguments, Any], Any]) -> Wrapper:
    """Change the results."""
    return lambda right, arguments: change(arguments, right(**arguments))


def drop(*names: str) -> Wrapper:
    """Leave out arguments."""
    return lambda right, arguments: right(**{n: v for n, v in arguments.items() if n not in names})


def only_if(name: str, change: Callable[[Arguments], Arguments]) -> Wrapper:
    """As :func:`before`, where argument ``name`` is given."""
    return before(lambda a: change(a) if a.get(name) is not None else None)


def refuse(condition: bool) -> None:
    """For :func:`before`: raise as a function that does not take such arguments."""
    if condition:
        raise NotImplementedError


def pages_in_order(block_table: Tensor) -> Tensor:
    """The table under which a paged cache is read as a contiguous one."""
    pages = torch.arange(block_table.numel(), dtype=torch.int32, device=block_table.device)
    return pages.view_as(block_table)
