"""The class that a module gets in place of its own while something of ours is on it. Why a class: docs/decisions/001-in-place-means-a-class-swap.md."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
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
    alike: bool = False,
    **members: object,
) -> Class:
    """A subclass of `base` that carries its name (accelerate compares names) and pickles as base plus state.

    Args:
        made: the function of a module that gives this class for `base`: pickle calls it.
        mark: the attribute that holds `base`.
        pickles: False where the class has a way to pickle itself.
        beside: further bases, which yield to `base`.
        alike: whether the class is equal to the plain one that it stands for: pipelines look which classes their components are of.
    """

    def reduce(self: nn.Module, protocol: object) -> tuple[object, ...]:
        # the state apart from the arguments: it may hold the module itself, as accelerate's hooks do
        return _rebuilt, (_steps(made, base), plain_class(base)), self.__getstate__()

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__, mark: base}
    kind = _alike(type(base)) if alike else type(base)
    cls: Class = kind(
        base.__name__, (base, *beside), {**names, **({"__reduce_ex__": reduce} if pickles else {}), **members}
    )
    _origins[cls] = made, base
    return cls


_Making = Callable[[Class], Class]
_origins: weakref.WeakKeyDictionary[type, tuple[_Making, Class]] = weakref.WeakKeyDictionary()


def plain_class(cls: Class) -> Class:
    """The class that is in no way ours, which a class is made from in one or more steps."""
    while cls in _origins:
        cls = _origins[cls][1]
    return cls


def _steps(made: _Making, base: Class) -> tuple[_Making, ...]:
    """How to come from the plain class to the one that `made` gives for `base`."""
    steps = [made]
    while base in _origins:
        step, base = _origins[base]
        steps.append(step)
    return tuple(reversed(steps))


def _rebuilt(steps: Sequence[_Making], base: Class) -> nn.Module:
    for made in steps:
        base = made(base)
    return base.__new__(base)


_kinds: dict[type, type] = {}


def _alike(kind: type) -> type:
    """A class of classes, derived from `kind`, that are equal to the plain ones that they stand for. In tables each stands by itself: their hashes differ."""
    if kind not in _kinds:

        def equals(cls: Class, other: object) -> bool:
            return cls is other or plain_class(cls) is other

        _kinds[kind] = type(kind.__name__, (kind,), {"__eq__": equals, "__hash__": kind.__hash__})
    return _kinds[kind]
