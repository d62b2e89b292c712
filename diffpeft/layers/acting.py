"""The classes that let act what modules carry: forwards, and what is read of a module.

Where only slots are on a layer, the chain of its links is kept from one call to the next. Where a copy or a patch is there too, what acts is asked
for at each call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from diffpeft.layers.backends import KNOWN, backend_of_class
from diffpeft.layers.carried import (
    ADAPTERS,
    COPIES,
    RECORD,
    SHARED,
    Copy,
    Parameters,
    Record,
    State,
    Step,
    bare,
    base_class,
    escaped,
    layer_site,
    record_of,
)
from diffpeft.layers.chain import Base, Dial, Whole
from diffpeft.layers.hooks import is_cast
from diffpeft.layers.mixed import Ambiguous, ambiguous, by_rows, different
from diffpeft.layers.mixes import ChoiceLike, MomentLike
from diffpeft.layers.patches import Patch, input_of, patched
from diffpeft.layers.readers import as_read, reading
from diffpeft.layers.rows import Rows
from diffpeft.layers.sites import LayerSite
from diffpeft.layers.slot import Slot, blank, with_own_dtype
from diffpeft.layers.swap import Class, sized, subclass
from diffpeft.layers.views import Views, refuse_written
from diffpeft.methods.linalg import traced, wide_dtype


def state_with(module: nn.Module, record: Record | None, weights: Parameters | None = None) -> State:
    """The state in which a module carries `record`, or nothing if it is None or empty, and has these weights, or those it has."""
    base = base_class(module)
    if record is None or not (record.slots or record.copies or record.patches):
        return State(base, weights=weights)
    adapters = _container(record.slots) if record.slots else None
    if not (record.copies or record.patches):
        return State(adapted_class(base), record, adapters, None, weights)
    shown = {name: patch for name, patch in record.patches.items() if name not in record.hidden}
    copies = _container({**{name: whole.module for name, whole in record.copies.items()}, **shown})
    return State(carrying_class(base), record, adapters, copies if len(copies) else None, weights)


def _container(held: Mapping[str, nn.Module]) -> nn.ModuleDict:
    container = nn.ModuleDict.__new__(nn.ModuleDict)
    blank(container)
    for name, module in held.items():
        container._modules[escaped(name)] = module
        if isinstance(module, Slot) and module.hosts and module.bank is not None:
            container._modules[f"{escaped(name)}{SHARED}"] = module.bank
    return container


# The classes


_adapted: dict[Class, Class] = {}
_carrying: dict[Class, Class] = {}
_TABLES = ("_parameters", "_buffers", "_modules")
# methods of an nn.Sequential, which read `_modules` themselves
_ITEMS = ("__iter__", "__len__", "__getitem__")
_ABSENT = object()


def adapted_class(base: Class) -> Class:
    """The subclass of a layer's class that applies slots."""
    if base not in _adapted:
        forward = reading(base) or _chained(base)
        members = {"forward": forward, **_members(base)}
        _adapted[base] = subclass(base, adapted_class, "_diffpeft_base", beside=(Views,), **members)
    return _adapted[base]


def _chained(base: Class) -> Callable[..., object]:
    """The forward of a layer of this class that applies slots."""
    site = layer_site(base)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> object:
        record = self.__dict__.get(RECORD)
        if record is None:  # another thread has just taken the last adapter off
            return base.forward(self, *args, **kwargs)
        x, others, named = input_of(args, kwargs)
        dtype = _dtype(self, x, site)
        link = _link(self, record, base, site, others, named, dtype)
        if link is None:
            return base.forward(self, *args, **kwargs)
        return link(x.to(dtype) if x.dtype != dtype and x.is_floating_point() and site.targets else x)

    return forward


def carrying_class(base: Class) -> Class:
    """The subclass of a module's class that applies slots, copies and patches. Who reads a tensor of the module (`F.linear(x, self.head.weight)`)
    gets that of the acting copy, or table, as in PEFT."""
    if base not in _carrying:

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> object:
            record = record_of(self)
            if record is None:
                return base.forward(self, *args, **kwargs)
            moment = record.mix.current()
            if moment.rows:
                return by_rows(self, base, record, _run, moment, args, kwargs)
            return _run(self, base, record.acting(moment), args, kwargs)

        def attribute(self: nn.Module, name: str) -> object:
            record = record_of(self)
            # FSDP 1 takes a parameter away and looks whether it is gone
            known = name not in (ADAPTERS, COPIES) and any(name in self.__dict__[kind] for kind in _TABLES)
            value = _ABSENT if record is None or not known else _read(self, record, name)
            return base.__getattr__(self, name) if value is _ABSENT else value

        items = {name: _of_what_acts(name) for name in _ITEMS if hasattr(base, name)}
        members = {"forward": forward, "__getattr__": attribute, **_members(base), **items}
        _carrying[base] = subclass(base, carrying_class, "_diffpeft_base", beside=(Views,), **members)
    return _carrying[base]


def _members(base: Class) -> dict[str, Any]:
    """What both have beside a forward."""

    def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        adapters = self._modules.get(ADAPTERS)
        if adapters is None or not is_cast(self):
            module: nn.Module = base._apply(self, fn, recurse)
            return module
        self._modules[ADAPTERS] = None  # it is the layer that is stored in another dtype, not its adapters
        try:
            base._apply(self, fn, recurse)
        finally:
            self._modules[ADAPTERS] = adapters
        adapters._apply(with_own_dtype(fn))
        return self

    def extra_repr(self: nn.Module) -> str:
        return ", ".join(filter(None, (base.extra_repr(self), *_shown(self.__dict__[RECORD]))))

    set_sized = sized(base)

    def set_(self: nn.Module, name: str, value: object) -> None:
        refuse_written(self, name)
        set_sized(self, name, value)

    members = {"_apply": _apply, "extra_repr": extra_repr, "__setattr__": set_}
    return {**members, KNOWN: backend_of_class(base)}


def _shown(record: Record) -> list[str]:
    """What a printed layer says of each adapter: its strength, `inactive` or `fused`."""
    choice = record.mix.standing()
    strengths = {name: _level(choice, name, record.index) for name in choice.order}
    return [
        f"{name}={'fused at ' if name in record.fused else ''}{strengths.get(name, 'inactive')}"
        for name in record.names
    ]


def _level(choice: ChoiceLike, name: str, index: int) -> str:
    """An adapter's strength on a layer in words: a number, a schedule, or one a prompt."""
    if choice.rows:
        return " | ".join(_level(row, name, index) if name in row.order else "0" for row in choice.rows)
    level = choice.levels[name][index]
    return f"{level:g}" if isinstance(level, float) else repr(level)


# Slots alone: kept from one call to the next


def _dtype(module: nn.Module, x: Tensor, site: type[LayerSite]) -> torch.dtype:
    """What the layer computes in: autocast's choice, else the input's, or for a lookup the weight's. A norm only has its weight computed."""
    if not site.targets:
        return wide_dtype(cast(Tensor, module.weight).dtype)
    if not x.is_floating_point():
        return cast(Tensor, module.weight).dtype
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _link(
    module: nn.Module,
    record: Record,
    base: Class,
    site: type[LayerSite],
    others: tuple[object, ...],
    named: Mapping[str, object],
    dtype: torch.dtype,
) -> Whole | Rows | None:
    """The layer with the active slots on it; None if there is none. Kept from one call to the next while the mix is the same."""
    moment = record.mix.current()
    keep = not (others or named or traced())
    lasting = moment.of  # what stays from step to step
    if keep:
        before = record.kept.get("link")
        if before is not None and before[0] is lasting and before[1] == dtype:
            return cast("Whole | Rows | None", before[2])
    compiling = torch.compiler.is_compiling()
    mixes = moment.rows or (moment,)
    prompts = [_dialled(record, mix, compiling, row if moment.rows else None) for row, mix in enumerate(mixes)]
    link: Whole | Rows | None = None
    if any(prompts):
        op = site(module, *others, **named)
        plain = Base(op, lambda x: op.forward(base, x), dtype, record.kept)
        link = Rows(plain, prompts, record) if moment.rows else Whole(plain, prompts[0])
    if keep:
        record.kept["link"] = lasting, dtype, link
    return link


def _dialled(
    record: Record, moment: MomentLike, compiling: bool, row: int | None
) -> list[tuple[Slot, float | Dial | Tensor]]:
    """The active slots of a layer in activation order with their strengths. `row`: the prompt, where each has its mix.

    In eager code an adapter at strength 0 is left out, so that it costs nothing and changes nothing, and one that changes from step to step is a
    dial. In compiled code strengths are gathered from a table in the graph, so that changing one does not compile anew.
    """
    active = [
        (row, name, record.slots[name])
        for row, name in enumerate(moment.order)
        if name in record.slots and name not in record.fused
    ]
    if compiling:
        return [
            (slot, moment.table[row].index_select(0, record.column).to(slot.weight.device)[0])
            for row, _, slot in active
        ]
    levels = [(name, slot, moment.of.levels[name][record.index]) for _, name, slot in active]
    return [
        (slot, s if isinstance(s, float) else Dial(record.mix, row, name, record.index, s))
        for name, slot, s in levels
        if s != 0
    ]


# Whatever acts


def _run(
    module: nn.Module, base: Class, steps: Sequence[Step], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> object:
    """A module's forward (of its class `base`) with what acts."""
    if issubclass(base, nn.MultiheadAttention):
        return cast(Class, base).forward(as_read(module, steps), *args, **kwargs)
    ground = bare(module)
    if steps and isinstance(steps[0][0], Copy):
        ground, steps = steps[0][0].module, steps[1:]
        if not steps:
            return ground(*args, **kwargs)
    if not steps:
        return base.forward(ground, *args, **kwargs)
    kinds = {type(thing) for thing, _ in steps}
    if len(kinds) == 1 and issubclass(kind := kinds.pop(), Patch):
        return kind.run(ground, base, steps, args, kwargs)
    site = layer_site(base)
    x, others, named = input_of(args, kwargs)
    dtype = _dtype(ground, x, site)
    op = site(ground, *others, **named)
    link = Whole(Base(op, lambda x: op.forward(base, x), dtype, {}), steps)  # type: ignore[arg-type]
    return link(x.to(dtype) if x.is_floating_point() and site.targets else x)


def _all_that_act(record: Record) -> list[list[Step]]:
    """What acts: once, or each that differs of a batch with a mix for each row."""
    moment = record.mix.current()
    return different([record.acting(row) for row in moment.rows or (moment,)])


def _read(module: nn.Module, record: Record, name: str) -> object:
    """An attribute as it is with what acts. Where rows of a batch differ in it: a tensor that refuses arithmetic.

    Raises AdapterStateError for a module inside that rows differ in.
    """
    acting = _all_that_act(record)
    value = _attribute(module, acting[0], name)
    if len(acting) == 1 or value is _ABSENT:
        return value
    if isinstance(value, Tensor):
        return value.detach().as_subclass(Ambiguous)
    raise ambiguous(f"{name} of a {base_class(module).__name__}")


def _attribute(module: nn.Module, steps: Sequence[Step], name: str) -> object:
    """A parameter, a buffer or a module inside, as it is with what acts; `_ABSENT` if there is none of that name."""
    ground = steps[0][0].module if steps and isinstance(steps[0][0], Copy) else module
    value = next((table[name] for kind in _TABLES if name in (table := ground.__dict__[kind])), _ABSENT)
    shows = [(patch, s) for patch, s in steps if isinstance(patch, Patch) and patch.shows and name in patch.names]
    if not shows or not isinstance(value, Tensor) or value.is_meta:
        return value
    return patched(value, name, shows) if all(patch.whole(value) for patch, _ in shows) else value


def _of_what_acts(name: str) -> Callable[..., object]:
    """A Sequential's method on what acts: the copy, or the module without its copies."""

    def method(self: nn.Module, *args: object) -> object:
        record = record_of(self)
        acting: list[list[Step]] = [] if record is None else _all_that_act(record)
        if len(acting) > 1:
            raise ambiguous(f"the modules of a {base_class(self).__name__}")
        ground = acting[0][0][0] if acting and acting[0] else None
        return getattr(ground.module if isinstance(ground, Copy) else bare(self), name)(*args)

    return method
