"""One layer adapted in place: its class is swapped for a subclass that adds the active adapters to its output.

Parameters keep their names, `isinstance` keeps working, and swapping the class back leaves no trace. Why a class and not an
instance `forward`, a wrapper or a parametrisation: docs/decisions/001-in-place-means-a-class-swap.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from diffpeft.layers.chain import Base, Dial, Whole
from diffpeft.layers.hooks import held_forwards, is_cast
from diffpeft.layers.rows import Rows
from diffpeft.layers.sites import site_of
from diffpeft.layers.slot import Slot, at_rest, stamp_of, with_own_dtype
from diffpeft.layers.swap import sized, subclass
from diffpeft.methods.linalg import traced, wide_dtype

ADAPTERS, RECORD = "adapters", "_diffpeft"
_RESERVED = set(dir(nn.ModuleDict()))


Weights = tuple[Tensor, Tensor | None]  # a layer's weight and bias


@dataclass(frozen=True)
class Record:
    """What an adapted layer's forward reads, replaced as a whole: the strengths, which column of them is this layer's, and its slots by adapter name."""

    mix: Any
    column: Tensor  # [1], a tensor so that equal blocks share one compiled graph
    index: int  # the same as a number, for eager code
    slots: Mapping[str, Slot]
    fused: frozenset[str] = frozenset()  # adapters that are in the weight
    base: Weights | None = None  # what the weight was before, if it was kept
    sample: Weights | None = None  # of what fusing has put in its place: some numbers by which it is known again
    kept: dict[Any, Any] = field(
        default_factory=dict, init=False
    )  # what was worked out: never more than this record and its layer say

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": {}}  # a copy has a weight of its own


@dataclass(frozen=True)
class State:
    """All that tells an adapted layer from a plain one. `adapters` and `record` are None on a plain layer; `weights` are None if they stay as they are."""

    cls: type[nn.Module]
    adapters: nn.ModuleDict | None = None
    record: Record | None = None
    weights: Weights | None = None


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
    adapters: Any = module._modules.get(ADAPTERS) if is_adapted(module) else None
    return State(type(module), adapters, record_of(module), weights_of(module))


def weights_of(module: Any) -> Weights:
    """The tensors behind a layer's weight and bias."""
    bias = getattr(module, "bias", None)
    return module.weight.data, None if bias is None else bias.data


def state_with(module: nn.Module, record: Record | None, weights: Weights | None = None) -> State:
    """The state in which a layer carries `record`, or nothing if it is None or empty, and has these weights, or those it has."""
    base = base_class(module)
    if record is None or not record.slots:
        return State(base, weights=weights)
    container = nn.ModuleDict()
    container._modules.update((escaped(name), slot) for name, slot in record.slots.items())
    return State(adapted_class(base), container, record, weights)


def enter(module: Any, state: State) -> None:
    """Put a layer into `state`. Plain assignments: given a prepared state it cannot fail."""
    held = held_forwards(module)
    old, new = record_of(module), state.record
    if old is not None and old is not new:
        if new is not None and new.fused == old.fused and FUSED in old.kept:
            new.kept[FUSED] = old.kept[FUSED]
        old.kept.clear()  # it refers to the layer, which would keep adapters alive until a garbage collection
    module.__class__ = state.cls
    if state.record is None:
        module._modules.pop(ADAPTERS, None)
        module.__dict__.pop(RECORD, None)
    else:
        module._modules[ADAPTERS] = state.adapters
        module.__dict__[RECORD] = state.record
    if state.weights is not None:
        module.weight.data = state.weights[0]
        if state.weights[1] is not None:
            module.bias.data = state.weights[1]
        if new is not None and new.fused:
            new.kept[FUSED] = stamps_of(module)
    for place, key in held:
        place[key] = state.cls.forward.__get__(module)


FUSED = "fused"  # where a record keeps how to tell the weights that fusing has put there


def stamps_of(module: Any) -> Any:
    """What stays while a layer has the same parameters with the same numbers in them; None where torch does not count changes."""
    parameters = module.weight, getattr(module, "bias", None)
    try:
        return [None if p is None else (id(p), stamp_of(p)) for p in parameters]
    except RuntimeError:  # tensors made in inference mode
        return None


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class a layer has without adapters."""
    return getattr(type(module), "_diffpeft_base", type(module))


def op_of(module: nn.Module) -> Any:
    """What a layer, adapted or not, lends a method (methods.Op), with its own weight."""
    site = site_of(base_class(module))
    assert site is not None
    return site(module)


_classes: dict[type, type] = {}


def adapted_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `base` that applies adapters."""
    if base not in _classes:
        site = site_of(base)
        assert site is not None

        def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
            record = getattr(self, RECORD, None)
            if record is None:  # another thread has just taken the last adapter off
                return base.forward(self, *args, **kwargs)
            x, rest, named = _taken(args, kwargs)
            dtype = _dtype(self, x, site)
            link = _link(self, record, base, site, rest, named, dtype)
            if link is None:
                return base.forward(self, *args, **kwargs)
            return link(x.to(dtype) if x.is_floating_point() and site.targets else x)

        def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
            adapters = self._modules.get(ADAPTERS)
            if adapters is None or not is_cast(self):
                return base._apply(self, fn, recurse)
            self._modules[ADAPTERS] = None  # it is the layer that is stored in another dtype, not its adapters
            try:
                base._apply(self, fn, recurse)
            finally:
                self._modules[ADAPTERS] = adapters
            adapters._apply(with_own_dtype(fn))
            return self

        def extra_repr(self: Any) -> str:
            return ", ".join(filter(None, (base.extra_repr(self), *_shown(self._diffpeft))))

        members: dict[str, Any] = {"forward": forward, "_apply": _apply, "extra_repr": extra_repr}
        _classes[base] = subclass(base, adapted_class, "_diffpeft_base", **members, __setattr__=sized(base))
    return _classes[base]


def _shown(record: Record) -> list[str]:
    """What a printed layer says of each adapter: its strength, `inactive` or `fused`."""
    choice = record.mix.standing()
    strengths = {name: _level(choice, name, record.index) for name in choice.order}
    return [
        f"{name}={'fused at ' if name in record.fused else ''}{strengths.get(name, 'inactive')}"
        for name in record.slots
    ]


def _level(choice: Any, name: str, index: int) -> str:
    """An adapter's strength on a layer in words: a number, a schedule, or one a prompt."""
    if choice.rows:
        return " | ".join(_level(row, name, index) if name in row.order else "0" for row in choice.rows)
    level = choice.levels[name][index]
    return f"{level:g}" if isinstance(level, float) else repr(level)


def _taken(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """The input, and the other arguments of a forward."""
    if args:
        return args[0], args[1:], kwargs
    name = next(iter(kwargs))
    return kwargs[name], (), {k: v for k, v in kwargs.items() if k != name}


def _dtype(module: Any, x: Tensor, site: Any) -> torch.dtype:
    """What the layer computes in: autocast's choice, else the input's, or for a lookup the weight's. A norm only has its weight computed."""
    if not site.targets:
        return wide_dtype(module.weight.dtype)
    if not x.is_floating_point():
        return module.weight.dtype
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _link(
    module: Any,
    record: Record,
    base: Any,
    site: Any,
    rest: tuple[Any, ...],
    named: dict[str, Any],
    dtype: torch.dtype,
) -> Whole | Rows | None:
    """The layer with the active adapters on it; None if there is none. Kept from one call to the next while the mix is the same."""
    choice = record.mix.current()
    compiling = torch.compiler.is_compiling()
    keep = not (traced() or rest or named)
    lasting = choice.of or choice  # what stays from step to step
    if keep:
        kept = record.kept.get("link")
        if kept is not None and kept[0] is lasting and kept[1] == dtype:
            return kept[2]
    mixes = choice.rows or (choice,)
    prompts = [_steps(record, mix, compiling, row if choice.rows else None) for row, mix in enumerate(mixes)]
    link: Whole | Rows | None = None
    if any(prompts):
        op: Any = site(module, *rest, **named)
        plain = Base(op, lambda x: op.forward(base, x), dtype, record.kept)
        link = Rows(plain, prompts, record) if choice.rows else Whole(plain, prompts[0])
    if keep:
        record.kept["link"] = lasting, dtype, link
    return link


def _steps(record: Record, choice: Any, compiling: bool, row: int | None) -> list[tuple[Slot, float | Dial | Tensor]]:
    """The active adapters of a layer in activation order with their strengths. `row`: the prompt, where each has its mix.

    In eager code an adapter at strength 0 is left out, so that it costs nothing and changes nothing, and one that changes from step to step is a
    dial. In compiled code strengths are gathered from a table in the graph, so that changing one does not compile anew.
    """
    found = [
        (row, name, record.slots[name])
        for row, name in enumerate(choice.order)
        if name in record.slots and name not in record.fused
    ]
    if compiling:
        return [
            (slot, choice.table[row].index_select(0, record.column).to(slot.weight.device)[0]) for row, _, slot in found
        ]
    levels = [(name, slot, choice.levels[name][record.index]) for _, name, slot in found]
    return [
        (slot, s if isinstance(s, float) else Dial(record.mix, row, name, record.index, s))
        for name, slot, s in levels
        if s != 0
    ]


def effective(
    module: nn.Module, steps: Sequence[tuple[Slot, float]], dtype: torch.dtype, weights: Weights
) -> tuple[Tensor, Tensor | None]:
    """The weight (in the layer's own order) and bias that a layer with `weights` has with these adapters in them, computed in `dtype`.

    There is a bias where an adapter adds one, also if the layer has no place for it.
    """
    site = site_of(base_class(module))
    assert site is not None
    op: Any = site(module)
    whole, bias = Whole(Base(op, None, dtype, {}, op.canonical(weights[0])), steps), weights[1]
    with at_rest(*(slot for slot, _ in steps)):
        W, shift = op.stored(whole.weight()), whole.shift(dtype, bias)
    if shift is None or bias is None:
        return W, bias if shift is None else shift
    return W, bias.to(shift) + shift.reshape(bias.shape)
