"""One layer adapted in place: its class is swapped for a subclass that adds the active adapters to its output.

Parameters keep their names, `isinstance` keeps working, and swapping the class back leaves no trace. Why a class and not an
instance `forward`, a wrapper or a parametrisation: docs/decisions/001-in-place-means-a-class-swap.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from diffpeft.layers.site import held_forwards, site_of
from diffpeft.layers.slot import Slot

ADAPTERS, RECORD = "adapters", "_diffpeft"
_RESERVED = set(dir(nn.ModuleDict()))


@dataclass(frozen=True)
class Record:
    """What an adapted layer's forward reads, replaced as a whole: the strengths, which column of them is this layer's, and its slots by adapter name."""

    mix: Any
    column: Tensor  # [1], a tensor so that equal blocks share one compiled graph
    index: int  # the same as a number, for eager code
    slots: Mapping[str, Slot]


@dataclass(frozen=True)
class State:
    """All that tells an adapted layer from a plain one. `adapters` and `record` are None on a plain layer."""

    cls: type[nn.Module]
    adapters: nn.ModuleDict | None = None
    record: Record | None = None


def escaped(name: str) -> str:
    """An adapter's name as a module name: as it is, except for dots and names that nn.ModuleDict needs itself."""
    return name.replace(".", "%2E") + ("%" if name in _RESERVED else "")


def is_adapted(module: nn.Module) -> bool:
    """Whether a layer carries adapters of ours."""
    return RECORD in module.__dict__


def record_of(module: nn.Module) -> Record | None:
    """The record of an adapted layer, None for any other module."""
    return module.__dict__.get(RECORD)


def state_of(module: nn.Module) -> State:
    """The state a layer is in now."""
    return State(type(module), module._modules.get(ADAPTERS) if is_adapted(module) else None, record_of(module))  # type: ignore[arg-type]


def state_with(module: nn.Module, record: Record | None) -> State:
    """The state in which a layer carries `record`, or nothing if it is None or empty."""
    base = base_class(module)
    if record is None or not record.slots:
        return State(base)
    container = nn.ModuleDict()
    for name, slot in record.slots.items():
        container.add_module(escaped(name), slot)
    return State(adapted_class(base), container, record)


def enter(module: nn.Module, state: State) -> None:
    """Put a layer into `state`. Plain assignments: given a prepared state it cannot fail."""
    held = held_forwards(module)
    module.__class__ = state.cls
    if state.record is None:
        module._modules.pop(ADAPTERS, None)
        module.__dict__.pop(RECORD, None)
    else:
        module._modules[ADAPTERS] = state.adapters
        module.__dict__[RECORD] = state.record
    for place, key in held:
        place[key] = state.cls.forward.__get__(module)


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class a layer has without adapters."""
    return getattr(type(module), "_diffpeft_base", type(module))


_classes: dict[type, type] = {}


def adapted_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `base` that applies adapters. It carries the same name (accelerate compares names) and pickles as base plus state."""
    if base not in _classes:
        site = site_of(base)
        assert site is not None

        def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
            y = base.forward(self, *args, **kwargs)
            x = args[0] if args else next(iter(kwargs.values()))
            add = _compiled if torch.compiler.is_compiling() else _eager
            return add(self._diffpeft, site(self), x, y)

        def reduce(self: Any, protocol: Any) -> Any:
            # the state apart from the arguments: it may hold the layer itself, as accelerate's hooks do
            return _rebuild, (base,), self.__getstate__()

        _classes[base] = type(
            base.__name__,
            (base,),
            {
                "__module__": base.__module__,
                "__qualname__": base.__qualname__,
                "__doc__": base.__doc__,
                "_diffpeft_base": base,
                "forward": forward,
                "__reduce_ex__": reduce,
            },
        )
    return _classes[base]


def _eager(record: Record, op: Any, x: Tensor, y: Tensor) -> Tensor:
    """y + sum of strength x adapter, in activation order; an adapter at strength 0 costs nothing and changes nothing."""
    choice = record.mix.current()
    for name in choice.order:
        slot = record.slots.get(name)
        if slot is not None and (strength := choice.strengths[name][record.index]):
            y = slot(op, x, y, strength)
    return y


def _compiled(record: Record, op: Any, x: Tensor, y: Tensor) -> Tensor:
    """The same with strengths gathered from a table in the graph, so that changing one does not compile anew."""
    choice = record.mix.current()
    for row, name in enumerate(choice.order):
        slot = record.slots.get(name)
        if slot is not None:
            y = slot(op, x, y, choice.table[row].index_select(0, record.column).to(y.device))
    return y


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = adapted_class(base)
    return cls.__new__(cls)
