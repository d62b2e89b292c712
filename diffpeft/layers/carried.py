"""What a module carries for adapters: one record, and one swap of its class for a subclass that lets it act.

An adapter has on a module: a slot (a method on a layer's weight), a copy (the module trained whole: PEFT's `modules_to_save`), or a patch (other numbers
for a parameter: patches.py); each adapter its own, and several at once. They act in activation order: a copy takes the place of all that was before.

Parameters keep their names, `isinstance` keeps working, and swapping the class back leaves no trace. Why a class and not an instance `forward`, a
wrapper or a parametrisation: docs/decisions/001-in-place-means-a-class-swap.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from diffpeft.layers.backends import KNOWN, backend_of_class
from diffpeft.layers.chain import Base, Dial, Whole
from diffpeft.layers.hooks import held_forwards, is_cast
from diffpeft.layers.mixed import Ambiguous, ambiguous, by_rows, different
from diffpeft.layers.patches import Patch, patched
from diffpeft.layers.rows import Rows
from diffpeft.layers.sites import site_of
from diffpeft.layers.slot import Slot, at_rest, blank, stamp_of, with_own_dtype
from diffpeft.layers.swap import sized, subclass
from diffpeft.methods.linalg import traced, wide_dtype

RECORD = "_diffpeft"  # where a module keeps its record
ADAPTERS, COPIES = "adapters", "copies"  # the names under which a module holds its slots, and its copies and patches
SHARED = "%shared"  # behind an adapter's name: the module of the tensors that its layers share
_RESERVED = set(dir(nn.ModuleDict()))

Parameters = dict[str, Tensor]  # numbers of a module's parameters, by name


@dataclass(frozen=True, eq=False)
class Copy:
    """A module trained whole in a copy; `still`: never trained, since it came with the adapter's file."""

    module: nn.Module
    still: bool = False

    def same(self, other: Copy) -> bool:
        """Whether two copies have the same numbers."""
        a, b = self.module.state_dict(), other.module.state_dict()
        return self.still and other.still and all(torch.equal(a[key], b[key]) for key in a)


Thing = Slot | Copy | Patch
Step = tuple[Thing, float]  # what acts, and how strong


@dataclass(frozen=True, eq=False)
class Record:
    """What a module carries, by adapter's name, and where its strengths stand. Replaced as a whole, so that a forward never sees half of a change."""

    mix: Any
    column: Tensor  # [1], of the mix's table: a tensor, so that equal blocks share one compiled graph
    index: int  # the same as a number, for eager code
    slots: Mapping[str, Slot] = field(default_factory=dict)
    copies: Mapping[str, Copy] = field(default_factory=dict)
    patches: Mapping[str, Patch] = field(default_factory=dict)
    hidden: frozenset[str] = frozenset()  # adapters whose patch is another module's too, where it is trained and saved
    fused: frozenset[str] = frozenset()  # adapters that are in the parameters
    base: Parameters | None = None  # what these were before, if that was kept
    sample: Parameters | None = None  # of what fusing has put in their place: some numbers by which it is known again
    parted: Mapping[str, Any] = field(
        default_factory=dict
    )  # parameters that were shared with a module that adapters do not change, until they were fused
    kept: dict[Any, Any] = field(
        default_factory=dict, init=False
    )  # what was worked out: never more than this record and its module say

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": {}}  # a copy has weights of its own

    def changed(self, **values: Any) -> Record:
        """As `dataclasses.replace`, many times faster."""
        record = Record.__new__(Record)
        record.__dict__.update(self.__dict__, kept={}, **values)
        return record

    @property
    def where(self) -> str:
        """The module's name in its component."""
        return str(self.mix.layers[self.index])

    @property
    def names(self) -> list[str]:
        """The adapters that have something here."""
        return list(dict.fromkeys((*self.slots, *self.copies, *self.patches)))

    def modules(self, name: str) -> list[nn.Module]:
        """What an adapter has here, as modules."""
        return [*([self.slots[name]] if name in self.slots else ()), *self.beside(name)]

    def beside(self, name: str, hidden: bool = True) -> list[nn.Module]:
        """An adapter's patch and copy, as modules; without `hidden` no patch that is another module's too."""
        patches = [self.patches[name]] if name in self.patches and (hidden or name not in self.hidden) else []
        return [*patches, *([self.copies[name].module] if name in self.copies else ())]

    def without(self, names: set[str]) -> Record | None:
        """The record without some adapters; None if nothing remains."""
        present = {*self.names}
        if not names & present:
            return self
        if present <= names:
            return None
        return self.changed(
            slots={name: own for name, own in self.slots.items() if name not in names},
            copies={name: own for name, own in self.copies.items() if name not in names},
            patches={name: own for name, own in self.patches.items() if name not in names},
            hidden=self.hidden - names,
        )

    def steps(self, choice: Any, names: Sequence[str] | None = None) -> list[Step]:
        """What acts in order under a choice (of `names` only), strengths as numbers; what is at 0 does not act. A copy begins anew."""
        steps: list[Step] = []
        for name in choice.order if names is None else names:
            s = choice.strengths[name][self.index] if name in choice.strengths else 0
            if not s:
                continue
            if name in self.copies:
                steps = [(self.copies[name], s)]
            steps += [(held[name], s) for held in (self.slots, self.patches) if name in held]
        return steps

    def acting(self, moment: Any) -> list[Step]:
        """`steps` of what is not in the parameters already."""
        return self.steps(moment, [name for name in moment.order if name not in self.fused])

    def clashing(self, one: str, other: str) -> bool:
        """Whether two adapters cannot act together: each has the module, or the same rows of it, for itself."""
        a, b = self.copies.get(one), self.copies.get(other)
        if a is not None and b is not None and not a.same(b):
            return True
        first, second = self.patches.get(one), self.patches.get(other)
        return first is not None and second is not None and type(first) is type(second) and first.overlaps(second)


class State(NamedTuple):
    """All that tells a module that carries something from a plain one. Nothing but the class on a plain one; `weights` are those that change."""

    cls: type[nn.Module]
    record: Record | None = None
    adapters: nn.ModuleDict | None = None
    copies: nn.ModuleDict | None = None
    weights: Parameters | None = None


def escaped(name: str) -> str:
    """An adapter's name as a module name: as it is, except for dots and names that nn.ModuleDict needs itself."""
    return name.replace(".", "%2E") + ("%" if name in _RESERVED else "")


def is_adapted(module: nn.Module) -> bool:
    """Whether a module carries something of an adapter."""
    return RECORD in module.__dict__


def record_of(module: nn.Module) -> Record | None:
    """The record of a module that carries something, None for any other."""
    return module.__dict__.get(RECORD)


def state_of(module: nn.Module, weights: bool = True) -> State:
    """The state a module is in now; without `weights` apart from its numbers."""
    numbers = weights_of(module) if weights else None
    record = record_of(module)
    if record is None:
        return State(type(module), weights=numbers)
    inside: Any = module._modules
    return State(type(module), record, inside.get(ADAPTERS), inside.get(COPIES), numbers)


def weights_of(module: nn.Module) -> Parameters:
    """The numbers of a layer's weight and bias."""
    own = module._parameters
    return {name: p.data for name in ("weight", "bias") if (p := own.get(name)) is not None}


def state_with(module: nn.Module, record: Record | None, weights: Parameters | None = None) -> State:
    """The state in which a module carries `record`, or nothing if it is None or empty, and has these weights, or those it has."""
    base = base_class(module)
    if record is None or not (record.slots or record.copies or record.patches):
        return State(base, weights=weights)
    adapters = _container(record.slots) if record.slots else None
    if not (record.copies or record.patches):
        return State(adapted_class(base), record, adapters, None, weights)
    shown = {name: own for name, own in record.patches.items() if name not in record.hidden}
    copies = _container({**{name: own.module for name, own in record.copies.items()}, **shown})
    return State(carrying_class(base), record, adapters, copies if len(copies) else None, weights)


def _container(held: Mapping[str, nn.Module]) -> nn.ModuleDict:
    container = nn.ModuleDict.__new__(nn.ModuleDict)
    blank(container)
    for name, module in held.items():
        container._modules[escaped(name)] = module
        if isinstance(module, Slot) and module.hosts and module.bank is not None:
            container._modules[f"{escaped(name)}{SHARED}"] = module.bank
    return container


def enter(module: Any, state: State) -> None:
    """Put a module into `state`. Plain assignments: given a prepared state it cannot fail."""
    held = held_forwards(module)
    old, new = record_of(module), state.record
    if old is not None and old is not new:
        _forget(old, new)
    if new is not None:
        module.__dict__[RECORD] = new  # first: whoever undoes this sees that it was begun
    object.__setattr__(module, "__class__", state.cls)
    for name, container in ((ADAPTERS, state.adapters), (COPIES, state.copies)):
        if container is not None:
            module._modules[name] = container
        elif old is not None:
            module._modules.pop(name, None)
    if new is None:
        module.__dict__.pop(RECORD, None)
    for name, numbers in (state.weights or {}).items():
        module._parameters[name].data = numbers
    if state.weights is not None and new is not None and new.fused:
        new.kept[FUSED] = stamps_of(module)
    for place, key in held:
        place[key] = state.cls.forward.__get__(module)


def _forget(old: Record, new: Record | None) -> None:
    """Let go of what was worked out: it refers to the layer, which would keep adapters alive until a garbage collection."""
    if new is not None and new.fused == old.fused and FUSED in old.kept:
        new.kept[FUSED] = old.kept[FUSED]
    old.kept.clear()


FUSED = "fused"  # where a record keeps how to tell the weights that fusing has put there


def stamps_of(module: nn.Module) -> Any:
    """What stays while a module has the same parameters with the same numbers in them; None where torch does not count changes."""
    try:
        return {name: (id(p), stamp_of(p)) for name, p in module._parameters.items() if p is not None}
    except RuntimeError:  # tensors made in inference mode
        return None


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class a module has without adapters."""
    return getattr(type(module), "_diffpeft_base", type(module))


def op_of(module: nn.Module) -> Any:
    """What a layer, adapted or not, lends a method (methods.Op), with its own weight."""
    site = site_of(base_class(module))
    assert site is not None
    return site(module)


def bare(module: Any) -> Any:
    """The same parameters and modules inside, without what the module carries: what writes to its tables writes to the module's."""
    if not is_adapted(module):
        return module
    base = base_class(module)
    plain = base.__new__(base)
    plain.__dict__.update(module.__dict__)
    plain.__dict__.pop(RECORD)
    plain.__dict__["_modules"] = {n: child for n, child in module._modules.items() if n not in (ADAPTERS, COPIES)}
    return plain


def bare_copy(module: nn.Module) -> nn.Module:
    """A module like this one that carries nothing."""
    return cast(nn.Module, copy.deepcopy(bare(module)))


# The classes


_adapted: dict[type, type] = {}
_carrying: dict[type, type] = {}
_TABLES = ("_parameters", "_buffers", "_modules")
# methods of containers, which read `_modules` themselves
_ITEMS = ("__iter__", "__len__", "__getitem__", "__contains__", "keys", "values", "items")
_ABSENT = object()


def adapted_class(base: Any) -> type:
    """The subclass of a layer's class that applies slots."""
    if base not in _adapted:
        site: Any = site_of(base)

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            record = self.__dict__.get(RECORD)
            if record is None:  # another thread has just taken the last adapter off
                return base.forward(self, *args, **kwargs)
            x, rest, named = _taken(args, kwargs)
            dtype = _dtype(self, x, site)
            link = _link(self, record, base, site, rest, named, dtype)
            if link is None:
                return base.forward(self, *args, **kwargs)
            return link(x.to(dtype) if x.dtype != dtype and x.is_floating_point() and site.targets else x)

        _adapted[base] = subclass(base, adapted_class, "_diffpeft_base", forward=forward, **_members(base))
    return _adapted[base]


def carrying_class(base: Any) -> type:
    """The subclass of a module's class that applies slots, copies and patches. Who reads a tensor of the module (`F.linear(x, self.head.weight)`)
    gets that of the acting copy, or table, as in PEFT."""
    if base not in _carrying:

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            record = record_of(self)
            if record is None:
                return base.forward(self, *args, **kwargs)
            moment = record.mix.current()
            if moment.rows:
                return by_rows(self, base, record, _run, moment, args, kwargs)
            return _run(self, base, record.acting(moment), args, kwargs)

        def attribute(self: Any, name: str) -> Any:
            record = record_of(self)
            value = _ABSENT if record is None or name in (ADAPTERS, COPIES) else _read(self, record, name)
            return base.__getattr__(self, name) if value is _ABSENT else value

        items = {name: _of_what_acts(name) for name in _ITEMS if hasattr(base, name)}
        members = {"forward": forward, "__getattr__": attribute, **_members(base), **items}
        _carrying[base] = subclass(base, carrying_class, "_diffpeft_base", **members)
    return _carrying[base]


def _members(base: Any) -> dict[str, Any]:
    """What both have beside a forward."""

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

    members = {"_apply": _apply, "extra_repr": extra_repr, "__setattr__": sized(base)}
    return {**members, KNOWN: backend_of_class(base)}


def _shown(record: Record) -> list[str]:
    """What a printed layer says of each adapter: its strength, `inactive` or `fused`."""
    choice = record.mix.standing()
    strengths = {name: _level(choice, name, record.index) for name in choice.order}
    return [
        f"{name}={'fused at ' if name in record.fused else ''}{strengths.get(name, 'inactive')}"
        for name in record.names
    ]


def _level(choice: Any, name: str, index: int) -> str:
    """An adapter's strength on a layer in words: a number, a schedule, or one a prompt."""
    if choice.rows:
        return " | ".join(_level(row, name, index) if name in row.order else "0" for row in choice.rows)
    level = choice.levels[name][index]
    return f"{level:g}" if isinstance(level, float) else repr(level)


# Slots alone: kept from one call to the next


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
        return cast(torch.dtype, module.weight.dtype)
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
    """The layer with the active slots on it; None if there is none. Kept from one call to the next while the mix is the same."""
    moment = record.mix.current()
    keep = not (rest or named or traced())
    lasting = moment.of  # what stays from step to step
    if keep:
        kept = record.kept.get("link")
        if kept is not None and kept[0] is lasting and kept[1] == dtype:
            return cast("Whole | Rows | None", kept[2])
    compiling = torch.compiler.is_compiling()
    mixes = moment.rows or (moment,)
    prompts = [_dialled(record, mix, compiling, row if moment.rows else None) for row, mix in enumerate(mixes)]
    link: Whole | Rows | None = None
    if any(prompts):
        op: Any = site(module, *rest, **named)
        plain = Base(op, lambda x: op.forward(base, x), dtype, record.kept)
        link = Rows(plain, prompts, record) if moment.rows else Whole(plain, prompts[0])
    if keep:
        record.kept["link"] = lasting, dtype, link
    return link


def _dialled(record: Record, moment: Any, compiling: bool, row: int | None) -> list[tuple[Slot, float | Dial | Tensor]]:
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


def _run(module: nn.Module, base: Any, steps: Sequence[Step], args: Any, kwargs: Any) -> Any:
    """A module's forward (of its class `base`) with what acts."""
    ground = bare(module)
    if steps and isinstance(steps[0][0], Copy):
        ground, steps = steps[0][0].module, steps[1:]
        if not steps:
            return ground(*args, **kwargs)
    if not steps:
        return base.forward(ground, *args, **kwargs)
    kinds = {type(own) for own, _ in steps}
    if len(kinds) == 1 and issubclass(kind := kinds.pop(), Patch):
        return kind.run(ground, base, steps, args, kwargs)
    site: Any = site_of(base)
    x, rest, named = _taken(args, kwargs)
    dtype = _dtype(ground, x, site)
    op = site(ground, *rest, **named)
    link = Whole(Base(op, lambda x: op.forward(base, x), dtype, {}), steps)  # type: ignore[arg-type]
    return link(x.to(dtype) if x.is_floating_point() and site.targets else x)


def _all_that_act(record: Record) -> list[list[Step]]:
    """What acts: once, or each that differs of a batch with a mix for each row."""
    moment = record.mix.current()
    return different([record.acting(row) for row in moment.rows or (moment,)])


def _read(module: nn.Module, record: Record, name: str) -> Any:
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


def _attribute(module: nn.Module, steps: Sequence[Step], name: str) -> Any:
    """A parameter, a buffer or a module inside, as it is with what acts; `_ABSENT` if there is none of that name."""
    ground: Any = steps[0][0].module if steps and isinstance(steps[0][0], Copy) else module
    value = next((table[name] for kind in _TABLES if name in (table := ground.__dict__[kind])), _ABSENT)
    shows = [(own, s) for own, s in steps if isinstance(own, Patch) and own.shows and name in own.names]
    return patched(value, name, shows) if shows and isinstance(value, Tensor) and not value.is_meta else value


def _of_what_acts(name: str) -> Callable[..., Any]:
    """A container's method on what acts: the copy, or the module without its copies."""

    def method(self: Any, *args: Any) -> Any:
        record = record_of(self)
        acting: list[list[Step]] = [] if record is None else _all_that_act(record)
        if len(acting) > 1:
            raise ambiguous(f"the modules of a {base_class(self).__name__}")
        first = acting[0][0][0] if acting and acting[0] else None
        return getattr(first.module if isinstance(first, Copy) else bare(self), name)(*args)

    return method


# The weights with adapters in them


def effective(module: nn.Module, steps: Sequence[Step], dtype: torch.dtype, weights: Parameters) -> Parameters:
    """Parameters (in the module's own order) with these slots and patches in them in order, computed in `dtype` from `weights`.

    There is a bias where an adapter adds one, also if the layer has no place for it.
    """
    out = dict(weights)
    for slots, group in _runs(steps):
        if slots:
            out |= _with_slots(module, group, dtype, out)
            continue
        for patch, s in group:
            out |= {name: patch.changed(name, out[name].to(dtype), s) for name in patch.names}
    return out


def _runs(steps: Sequence[tuple[Any, float]]) -> Iterator[tuple[bool, list[tuple[Any, float]]]]:
    """Slots that follow each other together, and patches."""
    group: list[tuple[Any, float]] = []
    for step in steps:
        if group and isinstance(group[-1][0], Patch) != isinstance(step[0], Patch):
            yield not isinstance(group[-1][0], Patch), group
            group = []
        group.append(step)
    if group:
        yield not isinstance(group[-1][0], Patch), group


def _with_slots(
    module: nn.Module, steps: Sequence[tuple[Slot, float]], dtype: torch.dtype, weights: Parameters
) -> Parameters:
    site: Any = site_of(base_class(module))
    op, bias = site(module), weights.get("bias")
    whole = Whole(Base(op, None, dtype, {}, op.canonical(weights["weight"])), steps)
    with at_rest(*(slot for slot, _ in steps)):
        W, shift = op.stored(whole.weight()), whole.shift(dtype, bias)
    if shift is None:
        return {"weight": W}
    return {"weight": W, "bias": shift if bias is None else bias.to(shift) + shift.reshape(bias.shape)}
