"""Whole modules that an adapter trains in a copy (PEFT's `modules_to_save`): the copy acts in the module's place while its adapter is active.

What else adapters do with a module as a whole takes the same way (patches.py). As with layers (docs/decisions/001) the module's class is swapped;
its own parameters keep their names and stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffpeft.errors import ShapeMismatchError
from diffpeft.layers.adapted import escaped
from diffpeft.layers.site import COPIES, held_forwards
from diffpeft.layers.swap import subclass

CONTAINER = "copies"


@dataclass(frozen=True)
class Copies:
    """The copies of one module by adapter name, and the strengths that say which one acts."""

    mix: Any
    modules: Mapping[str, nn.Module]
    fused: frozenset[str] = frozenset()  # adapters that are in the module's own parameters: never, of copies
    hidden: frozenset[str] = frozenset()  # those whose module is another's too, where it is trained and saved

    def without(self, names: set[str]) -> Any:
        """What is left; None if nothing is."""
        left = {name: module for name, module in self.modules.items() if name not in names}
        return replace(self, modules=left) if left else None

    def acting(self, choice: Any) -> Any:
        """What acts: the copy of the last active adapter that has one and a strength, or None."""
        return next(
            (self.modules[n] for n in reversed(choice.order) if n in self.modules and choice.given[n] != 0), None
        )

    def run(self, module: Any, base: Any, acting: Any, args: Any, kwargs: Any) -> Any:
        """The module's forward with what acts; `base` is its class."""
        return base.forward(module, *args, **kwargs) if acting is None else acting(*args, **kwargs)

    def merged(self, module: nn.Module, order: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        """(parameter or buffer, the numbers that it has with these adapters in it for good)."""
        acting = next((self.modules[name] for name in reversed(order) if name in self.modules), None)
        if acting is None:
            return []
        own = bare(module)
        return [
            (mine, other.data)
            for mine, other in zip(
                (*own.parameters(), *own.buffers()), (*acting.parameters(), *acting.buffers()), strict=True
            )
        ]


def copies_of(module: nn.Module) -> Copies | None:
    """A module's copies, None for any other module."""
    return module.__dict__.get(COPIES)


def copied(module: nn.Module) -> bool:
    """Whether a module has copies."""
    return COPIES in module.__dict__


def place(module: Any, copies: Copies | None) -> None:
    """Give a module these copies, or none. Plain assignments: it cannot fail."""
    base, held = base_of(module), held_forwards(module)
    module.__class__ = base if copies is None else _class(base)
    module._modules.pop(CONTAINER, None)
    if copies is None:
        module.__dict__.pop(COPIES, None)
    else:
        module.__dict__[COPIES] = copies
        shown = {escaped(name): own for name, own in copies.modules.items() if name not in copies.hidden}
        if shown:
            container = nn.ModuleDict()
            container._modules.update(shown)
            module._modules[CONTAINER] = container
    for where, key in held:
        where[key] = type(module).forward.__get__(module)


def base_of(module: nn.Module) -> Any:
    """The class that a module has without copies."""
    return getattr(type(module), "_diffpeft_whole", type(module))


def bare(module: nn.Module) -> nn.Module:
    """The same parameters and modules inside, without the copies."""
    if not copied(module):
        return module
    own = copy.copy(module)
    own.__class__ = base_of(module)
    own.__dict__.pop(COPIES)
    own.__dict__["_modules"] = {name: child for name, child in module._modules.items() if name != CONTAINER}
    return own


def bare_copy(module: nn.Module) -> nn.Module:
    """A module like this one, without the copies it has."""
    return copy.deepcopy(bare(module))


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
            return copies.run(self, base, copies.acting(choice), args, kwargs)

        _classes[base] = subclass(base, _class, "_diffpeft_whole", forward=forward)
    return _classes[base]


def _by_rows(module: Any, base: Any, copies: Copies, choice: Any, args: Any, kwargs: Any) -> Any:
    """Each row of the batch through the module as its mix says. Row i has mix (i // images) % number of mixes.

    What the model has split further (tokens, one below the other) has several rows for each of the batch.
    """
    rows = next(len(t) for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
    each, rest = divmod(rows, choice.batch or rows)
    if rest or not each:
        raise ShapeMismatchError(
            f"{rows} rows do not divide into a batch of {choice.batch}", where=f"a {base.__name__} with adapters"
        )
    acting = [copies.acting(row) for row in choice.rows]
    owner = [acting[(i // (each * choice.images)) % len(acting)] for i in range(rows)]
    out: Tensor | None = None
    for own in _different(acting):
        at = torch.tensor([i for i, other in enumerate(owner) if other == own])
        if not len(at):
            continue

        def some(t: Any, at: Tensor = at) -> Any:
            return t[at.to(t.device)] if isinstance(t, Tensor) and t.dim() and len(t) == rows else t

        given = [some(t) for t in args], {name: some(t) for name, t in kwargs.items()}
        found = copies.run(module, base, own, *given)
        out = found.new_empty(rows, *found.shape[1:]) if out is None else out
        out = out.index_copy(0, at.to(found.device), found.to(out.dtype))
    return out


def _different(values: Sequence[Any]) -> list[Any]:
    """Each value once."""
    return [value for i, value in enumerate(values) if value not in values[:i]]
