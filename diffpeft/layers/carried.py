"""What a module carries for adapters: one record, and one swap of its class for a subclass that lets it act.

An adapter has on a module: a slot (a method on a layer's weight), a copy (the module trained whole: PEFT's `modules_to_save`), or a patch (other numbers
for a parameter: patches.py); each adapter its own, and several at once. They act in activation order: a copy takes the place of all that was before.

Parameters keep their names, `isinstance` keeps working, and swapping the class back leaves no trace. Why a class and not an instance `forward`, a
wrapper or a parametrisation: docs/decisions/001-in-place-means-a-class-swap.md.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from diffpeft.layers.chain import Base, Whole
from diffpeft.layers.hooks import held_forwards
from diffpeft.layers.mixes import ActiveLike
from diffpeft.layers.patches import Patch
from diffpeft.layers.sites import LayerSite, parameter_names, site_of
from diffpeft.layers.slot import Slot, at_rest, stamp_of
from diffpeft.layers.swap import Class

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
    parted: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # parameters that were shared with a module that adapters do not change, until they were fused
    kept: dict[object, Any] = field(
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
            slots={name: slot for name, slot in self.slots.items() if name not in names},
            copies={name: held for name, held in self.copies.items() if name not in names},
            patches={name: patch for name, patch in self.patches.items() if name not in names},
            hidden=self.hidden - names,
        )

    def steps(self, choice: ActiveLike, names: Sequence[str] | None = None) -> list[Step]:
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

    def acting(self, moment: ActiveLike) -> list[Step]:
        """`steps` of what is not in the parameters already."""
        return self.steps(moment, [name for name in moment.order if name not in self.fused])

    def clashing(self, one: str, other: str) -> str:
        """What two adapters that cannot act together both have for themselves: "copies" of the module, or the same "rows" of it; empty if they can."""
        a, b = self.copies.get(one), self.copies.get(other)
        if a is not None and b is not None and not a.same(b):
            return "copies"
        p, q = self.patches.get(one), self.patches.get(other)
        return "rows" if p is not None and q is not None and type(p) is type(q) and p.overlaps(q) else ""


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
    parameters = module._parameters
    return {name: p.data for name in parameter_names(module) if (p := parameters.get(name)) is not None}


def enter(module: Any, state: State) -> None:
    """Put a module into `state`. Plain assignments: given a prepared state it cannot fail."""
    old, new = record_of(module), state.record
    if old is not None and old is not new:
        _forget(old, new)
    if new is not None:
        module.__dict__[RECORD] = new  # first: whoever undoes this sees that it was begun
    put_class(module, state.cls)
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


def put_class(module: nn.Module, cls: Class) -> None:
    """Give a module another class, and its forward to those who keep it. Done again it changes nothing."""
    held = held_forwards(module)
    object.__setattr__(module, "__class__", cls)
    for place, key in held:
        place[key] = cls.forward.__get__(module)


def _forget(old: Record, new: Record | None) -> None:
    """Let go of what was worked out: it refers to the layer, which would keep adapters alive until a garbage collection."""
    if new is not None and new.fused == old.fused and FUSED in old.kept:
        new.kept[FUSED] = old.kept[FUSED]
    old.kept.clear()


FUSED = "fused"  # where a record keeps how to tell the weights that fusing has put there


def stamps_of(module: nn.Module) -> dict[str, tuple[object, ...]] | None:
    """What stays while a module has the same parameters with the same numbers in them; None where torch does not count changes."""
    try:
        return {name: (id(p), stamp_of(p)) for name, p in module._parameters.items() if p is not None}
    except RuntimeError:  # tensors made in inference mode
        return None


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class a module has without adapters."""
    return getattr(type(module), "_diffpeft_base", type(module))


def layer_site(base: Class) -> type[LayerSite]:
    """The kind of layer that a class is, which carries slots."""
    site = site_of(base)
    assert site is not None
    return site


def op_of(module: nn.Module) -> LayerSite:
    """What a layer, adapted or not, lends a method (methods.Operation), with its own weight."""
    return layer_site(base_class(module))(module)


def bare(module: nn.Module) -> nn.Module:
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
    return copy.deepcopy(bare(module))


# The weights with adapters in them


def effective(module: nn.Module, steps: Sequence[Step], dtype: torch.dtype, weights: Parameters) -> Parameters:
    """Parameters (in the module's own order) with these slots and patches in them in order, computed in `dtype` from `weights`.

    There is a bias where an adapter adds one, also if the layer has no place for it.
    """
    with at_rest(*(thing for thing, _ in steps if isinstance(thing, Slot))):
        return with_acting(module, steps, dtype, weights)


def with_acting(module: nn.Module, steps: Sequence[Step], dtype: torch.dtype, weights: Parameters) -> Parameters:
    """`effective`, but for adapters that are trained as they are in training."""
    out = dict(weights)
    for are_patches, group in itertools.groupby(cast(Any, steps), key=lambda step: isinstance(step[0], Patch)):
        if not are_patches:
            out |= _with_slots(module, list(group), dtype, out)
            continue
        for patch, s in group:
            out |= {name: patch.changed(name, out[name].to(dtype), s) for name in patch.names}
    return out


def _with_slots(
    module: nn.Module, steps: Sequence[tuple[Slot, float]], dtype: torch.dtype, weights: Parameters
) -> Parameters:
    op = layer_site(base_class(module))(module)
    bias = weights.get(op.bias_name)
    whole = Whole(Base(op, None, dtype, {}, op.canonical(weights[op.weight_name])), steps)
    W, shift = op.stored(whole.weight()), whole.shift(dtype, bias)
    if shift is None:
        return {op.weight_name: W}
    b = shift if bias is None else bias.to(shift) + shift.reshape(bias.shape)
    return {op.weight_name: W, op.bias_name: b}
