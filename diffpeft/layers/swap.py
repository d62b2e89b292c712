"""The class that a module gets in place of its own while something of ours is on it. Why a class: docs/decisions/001-in-place-means-a-class-swap.md."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

from torch import Tensor, nn

from diffpeft.errors import AdapterStateError

Class = type[nn.Module]
SIZES = ("num_embeddings", "out_features")  # attributes of a table or a head that count its rows
_here = threading.local()  # `resizing`, in this thread's blocks


@contextlib.contextmanager
def resizing() -> Iterator[None]:
    """Inside this block (of this thread) tables with adapters may be given another number of rows: whoever opens it sees to the adapters."""
    before, _here.resizing = getattr(_here, "resizing", False), True
    try:
        yield
    finally:
        _here.resizing = before


def sized(base: Class) -> Callable[[nn.Module, str, object], None]:
    """`__setattr__` of a class on top of `base` that notices transformers giving a module other rows, which its adapters do not have.

    At that moment the weight has them already; what was added to it is taken off again.
    """

    def set_(self: nn.Module, name: str, value: Any) -> None:
        old = self.__dict__.get(name) if name in SIZES else None
        if old is not None and old != value and not getattr(_here, "resizing", False):
            for weight in (
                cast(Tensor, self.weight),
                getattr(self, "__dict__", {}).get("_parameters", {}).get("weight"),
            ):
                if weight is not None and len(weight) > old:
                    weight.data = weight.data[:old].clone()
            raise AdapterStateError(
                f"a {base.__name__} that carries adapters would get {value} rows instead of {old}",
                remedy="Call resize_token_embeddings of the PeftModel, or before adapters are on the embeddings.",
            )
        base.__setattr__(self, name, value)

    return set_


def subclass(
    base: Class,
    made: Callable[[Class], Class],
    mark: str,
    pickles: bool = True,
    beside: tuple[type, ...] = (),
    **members: object,
) -> Class:
    """A subclass of `base` that carries its name (accelerate compares names) and pickles as base plus state.

    Args:
        made: the function of a module that gives this class for `base`: pickle calls it.
        mark: the attribute that holds `base`.
        pickles: False where the class has a way to pickle itself.
        beside: further bases, which yield to `base`.
    """

    def reduce(self: nn.Module, protocol: object) -> tuple[object, ...]:
        # the state apart from the arguments: it may hold the module itself, as accelerate's hooks do
        return _rebuilt, (made, base), self.__getstate__()

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__, mark: base}
    return type(base.__name__, (base, *beside), {**names, **({"__reduce_ex__": reduce} if pickles else {}), **members})


def _rebuilt(made: Callable[[Class], Class], base: Class) -> nn.Module:
    cls = made(base)
    return cls.__new__(cls)
