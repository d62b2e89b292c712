"""The class that a module gets in place of its own while something of ours is on it. Why a class: docs/decisions/001-in-place-means-a-class-swap.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def subclass(base: Any, made: Callable[[Any], type], mark: str, pickles: bool = True, **members: Any) -> type:
    """A subclass of `base` that carries its name (accelerate compares names) and pickles as base plus state.

    Args:
        made: the function of a module that gives this class for `base`: pickle calls it.
        mark: the attribute that holds `base`.
        pickles: False where the class has a way to pickle itself.
    """

    def reduce(self: Any, protocol: Any) -> Any:
        # the state apart from the arguments: it may hold the module itself, as accelerate's hooks do
        return _rebuilt, (made, base), self.__getstate__()

    own = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__, mark: base}
    return type(base.__name__, (base,), {**own, **({"__reduce_ex__": reduce} if pickles else {}), **members})


def _rebuilt(made: Callable[[Any], Any], base: Any) -> Any:
    cls = made(base)
    return cls.__new__(cls)
