"""Whole modules that an adapter trains in a copy (PEFT's `modules_to_save`): the copy acts in the module's place while its adapter is active.

As with layers (docs/decisions/001) the module's class is swapped; its own parameters keep their names and stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffpeft.layers.adapted import escaped
from diffpeft.layers.site import COPIES

CONTAINER = "copies"


@dataclass(frozen=True)
class Copies:
    """The copies of one module by adapter name, and the strengths that say which one acts."""

    mix: Any
    modules: Mapping[str, nn.Module]

    def without(self, names: set[str]) -> Copies | None:
        """What is left; None if nothing is."""
        left = {name: module for name, module in self.modules.items() if name not in names}
        return Copies(self.mix, left) if left else None

    def acting(self, choice: Any) -> nn.Module | None:
        """The copy of the last active adapter that has one and a strength."""
        return next(
            (self.modules[n] for n in reversed(choice.order) if n in self.modules and choice.given[n] != 0), None
        )


def copies_of(module: nn.Module) -> Copies | None:
    """A module's copies, None for any other module."""
    return module.__dict__.get(COPIES)


def copied(module: nn.Module) -> bool:
    """Whether a module has copies."""
    return COPIES in module.__dict__


def replace_tensors(module: nn.Module, by: nn.Module) -> None:
    """Give a module's parameters and buffers, which stay the same objects, another one's numbers."""
    for own, other in zip((*module.parameters(), *module.buffers()), (*by.parameters(), *by.buffers()), strict=True):
        own.data = other.data


def place(module: Any, copies: Copies | None) -> None:
    """Give a module these copies, or none. Plain assignments: it cannot fail."""
    base = getattr(type(module), "_diffpeft_whole", type(module))
    if copies is None:
        module.__class__ = base
        module._modules.pop(CONTAINER, None)
        module.__dict__.pop(COPIES, None)
        return
    module.__class__ = _class(base)
    container = nn.ModuleDict()
    container._modules.update((escaped(name), own) for name, own in copies.modules.items())
    module._modules[CONTAINER] = container
    module.__dict__[COPIES] = copies


def bare_copy(module: nn.Module) -> nn.Module:
    """A module like this one, without the copies it has."""
    own = copies_of(module)
    if own is None:
        return copy.deepcopy(module)
    bare = copy.copy(module)
    bare.__dict__["_modules"] = dict(module._modules)
    place(bare, None)
    return copy.deepcopy(bare)


_classes: dict[type, type] = {}


def _class(base: Any) -> type:
    if base not in _classes:

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            copies = copies_of(self)
            if copies is None:
                return base.forward(self, *args, **kwargs)
            choice = copies.mix.current()
            if choice.rows:
                return _by_rows(self, base, copies, choice, args, kwargs)
            acting = copies.acting(choice)
            return base.forward(self, *args, **kwargs) if acting is None else acting(*args, **kwargs)

        def reduce(self: Any, protocol: Any) -> Any:
            return _rebuild, (base,), self.__getstate__()

        _classes[base] = type(
            base.__name__,
            (base,),
            {
                "__module__": base.__module__,
                "__qualname__": base.__qualname__,
                "__doc__": base.__doc__,
                "_diffpeft_whole": base,
                "forward": forward,
                "__reduce_ex__": reduce,
            },
        )
    return _classes[base]


def _rebuild(base: Any) -> Any:
    cls: Any = _class(base)
    return cls.__new__(cls)


def _by_rows(module: Any, base: Any, copies: Copies, choice: Any, args: Any, kwargs: Any) -> Any:
    """Each row of the batch through the module that its mix says. Row i has mix (i // images) % number of mixes."""
    rows = next(len(t) for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
    acting = [copies.acting(row) for row in choice.rows]
    owner = [acting[(i // choice.images) % len(acting)] for i in range(rows)]
    out: Tensor | None = None
    for own in dict.fromkeys(owner):
        at = torch.tensor([i for i, other in enumerate(owner) if other is own])

        def some(t: Any, at: Tensor = at) -> Any:
            return t[at.to(t.device)] if isinstance(t, Tensor) and t.dim() and len(t) == rows else t

        given = [some(t) for t in args], {name: some(t) for name, t in kwargs.items()}
        found = base.forward(module, *given[0], **given[1]) if own is None else own(*given[0], **given[1])
        out = found.new_empty(rows, *found.shape[1:]) if out is None else out
        out = out.index_copy(0, at.to(found.device), found.to(out.dtype))
    return out
