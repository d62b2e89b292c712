"""Whole modules that an adapter trains in a copy (PEFT's `modules_to_save`): the copy acts in the module's place while its adapter is active.

What else adapters do with a module as a whole takes the same way (patches.py). As with layers (docs/decisions/001) the module's class is swapped;
its own parameters keep their names and stay as they are. Whoever reads a tensor of the module (`F.linear(x, self.head.weight)`) gets that of the
acting copy, as in PEFT.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffpeft.layers.adapted import escaped
from diffpeft.layers.hooks import COPIES, held_forwards
from diffpeft.layers.mixed import Ambiguous, ambiguous, by_rows, different
from diffpeft.layers.swap import sized, subclass

CONTAINER = "copies"
_TABLES = ("_parameters", "_buffers", "_modules")
# methods of containers, which read `_modules` themselves
_ITEMS = ("__iter__", "__len__", "__getitem__", "__contains__", "keys", "values", "items")

# a module's table of parameters or buffers, a name in it, and new numbers or another parameter
Put = tuple[dict[str, Any], str, Any]


@dataclass(frozen=True)
class Copies:
    """The copies of one module by adapter name, and the strengths that say which one acts."""

    mix: Any
    modules: Mapping[str, nn.Module]
    fused: frozenset[str] = frozenset()  # adapters that are in the module's own parameters: never, of copies
    hidden: frozenset[str] = frozenset()  # those whose module is another's too, where it is trained and saved
    still: frozenset[str] = frozenset()  # those whose copy is never trained: it came with the adapter's file

    @property
    def where(self) -> str:
        """What a message calls the module; empty if it has no name."""
        return ""

    def without(self, names: set[str]) -> Any:
        """These copies without those of some adapters; None if none remains."""
        left = {name: module for name, module in self.modules.items() if name not in names}
        return replace(self, modules=left, hidden=self.hidden - names, still=self.still - names) if left else None

    def clashing(self, one: str, other: str) -> bool:
        """Whether two adapters cannot act together: each has a copy, and not the same from its file."""
        if not {one, other} <= self.still:
            return True
        a, b = (self.modules[name].state_dict() for name in (one, other))
        return not all(torch.equal(a[key], b[key]) for key in a)

    def acting(self, choice: Any) -> Any:
        """What acts: the copy of the last active adapter that has one and a strength, or None."""
        return next(
            (self.modules[n] for n in reversed(choice.order) if n in self.modules and choice.given[n] != 0), None
        )

    def run(self, module: Any, base: Any, acting: Any, args: Any, kwargs: Any) -> Any:
        """The module's forward with what acts; `base` is its class."""
        return base.forward(bare(module), *args, **kwargs) if acting is None else acting(*args, **kwargs)

    def attribute(self, module: nn.Module, acting: Any, name: str) -> Any:
        """A parameter, a buffer or a module inside, as it is with what acts; `_ABSENT` if there is none of that name."""
        return _held(module if acting is None else acting, name)

    def merged(self, module: nn.Module, choice: Any) -> list[Put]:
        """The numbers that the module has with what acts under a choice in it for good."""
        acting = self.acting(choice)
        if acting is None:
            return []
        return [
            (table, name, theirs[name].data)
            for own, other in zip(bare(module).modules(), acting.modules(), strict=True)
            for table, theirs in ((own._parameters, other._parameters), (own._buffers, other._buffers))
            for name, tensor in table.items()
            if tensor is not None
        ]


_ABSENT = object()


def _held(module: nn.Module, name: str) -> Any:
    return next((table[name] for kind in _TABLES if name in (table := module.__dict__[kind])), _ABSENT)


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


def bare(module: Any) -> Any:
    """The same parameters and modules inside, without the copies: what writes to its tables writes to the module's."""
    if not copied(module):
        return module
    base = base_of(module)
    own = base.__new__(base)
    own.__dict__.update(module.__dict__)
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
                return by_rows(self, base, copies, choice, args, kwargs)
            return copies.run(self, base, copies.acting(choice), args, kwargs)

        def attribute(self: Any, name: str) -> Any:
            copies = copies_of(self)
            found = _ABSENT if copies is None or name == CONTAINER else _read(self, copies, name)
            return base.__getattr__(self, name) if found is _ABSENT else found

        items = {name: _of_what_acts(name) for name in _ITEMS if hasattr(base, name)}
        members = {"forward": forward, "__getattr__": attribute, "__setattr__": sized(base), **items}
        _classes[base] = subclass(base, _class, "_diffpeft_whole", **members)
    return _classes[base]


def _read(module: nn.Module, copies: Copies, name: str) -> Any:
    """An attribute as it is with what acts. Where rows of a batch differ in it: a tensor that refuses arithmetic.

    Raises AdapterStateError for a module inside that rows differ in.
    """
    acting = _of_all_rows(copies)
    found = copies.attribute(module, acting[0], name)
    if len(acting) == 1 or found is _ABSENT:
        return found
    if isinstance(found, Tensor):
        return found.detach().as_subclass(Ambiguous)
    raise ambiguous(f"{name} of a {base_of(module).__name__}")


def _of_all_rows(copies: Copies) -> list[Any]:
    """What acts: one thing, or those that differ of a batch with a mix for each row."""
    choice = copies.mix.current()
    return different([copies.acting(row) for row in choice.rows or (choice,)])


def _of_what_acts(name: str) -> Any:
    """A container's method on what acts: the copy, or the module without its copies."""

    def method(self: Any, *args: Any) -> Any:
        copies = copies_of(self)
        acting = [] if copies is None else _of_all_rows(copies)
        if len(acting) > 1:
            raise ambiguous(f"the modules of a {base_of(self).__name__}")
        whole = acting and isinstance(acting[0], nn.Module)
        return getattr(acting[0] if whole else bare(self), name)(*args)

    return method
