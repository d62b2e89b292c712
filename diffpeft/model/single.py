"""What is done to one module by itself: PEFT's methods of layers (`diffpeft.layers.views`). The others of the component stay as they are."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn

from diffpeft.errors import AdapterStateError, AdapterStateWarning, UnknownNameError, joined, listed, shown
from diffpeft.layers.carried import Record, record_of
from diffpeft.model.activation import refuse_clashing_on
from diffpeft.model.attach import mixes_of, refuse_foreign
from diffpeft.model.fuse import check_order, plan_layer_fused
from diffpeft.model.mix import Adapter, Choice, Level, Mix, Single, check_idle, check_strength, scaled_level
from diffpeft.model.plan import Plan, planned
from diffpeft.model.root import model_of
from diffpeft.model.target import adapted
from diffpeft.model.weights import unfused


def set_adapter(module: nn.Module, names: Sequence[str], inference_mode: bool) -> None:
    """Make these adapters the active ones of a module, and those that are trained on it.

    Raises UnknownNameError, or AdapterStateError for adapters that cannot act together or are in the weight.
    """
    record = _record(module)
    for name in names:
        UnknownNameError.check("adapter", name, record.mix.adapters)
    refuse_clashing_on(record, names)
    with planned(_parts(record.mix)) as plan:
        _plan_single(plan, record, replace(_single(record), active=tuple(names)))
        _plan_trained(plan, record, () if inference_mode else names)


def enable(module: nn.Module, enabled: bool) -> None:
    """Switch a module's adapters off or on; what is off is not trained. Raises AdapterStateError for what is in the weight."""
    record = _record(module)
    with planned(_parts(record.mix)) as plan:
        single = replace(_single(record), enabled=enabled)
        _plan_single(plan, record, single)
        _plan_trained(plan, record, single.active if enabled else ())


def set_strength(module: nn.Module, name: str, strength: float) -> None:
    """Let an adapter act this strongly on a module whenever it is active. Raises ConfigError, or AdapterStateError for what is in the weight."""
    record = _record(module)
    check_strength(name, strength)
    with planned(_parts(record.mix)) as plan:
        single = _single(record)
        _plan_single(plan, record, replace(single, strengths={**single.strengths, name: float(strength)}))


def scale(module: nn.Module, by: float) -> None:
    """Let a module's active adapters act so many times as strongly. Raises ConfigError, or AdapterStateError for what is in the weight."""
    record = _record(module)
    check_strength("active adapters", by)
    with planned(_parts(record.mix)) as plan:
        single = _single(record)
        scaled = {name: scaled_level(single.strengths.get(name, 1.0), by) for name in single.active}
        _plan_single(plan, record, replace(single, strengths={**single.strengths, **scaled}))


@contextlib.contextmanager
def rescaled(model: nn.Module, names: Callable[[Record], Collection[str]], by: float) -> Iterator[None]:
    """A block in which the adapters that `names` chooses on each module act `by` times as strongly, active or not. What it merged stays as it is.

    Raises ConfigError, or AdapterStateError for what is in the weight already.
    """
    check_strength("adapters", by)
    before: dict[nn.Module, dict[str, Level]] = {}

    def strengths(module: nn.Module, record: Record) -> dict[str, Level]:
        present = _single(record).strengths
        before[module] = {name: present.get(name, 1.0) for name in names(record)}
        return {name: scaled_level(level, by) for name, level in before[module].items()}

    _set_strengths(model, strengths)
    try:
        yield
    finally:
        _set_strengths(model, lambda module, record: {} if record.fused else before.get(module, {}))


def _set_strengths(model: nn.Module, strengths: Callable[[nn.Module, Record], Mapping[str, Level]]) -> None:
    """Let adapters act otherwise on each module of a model for which there is something new."""
    with planned({"": model}) as plan:
        for mix in mixes_of({"": model}).values():
            records = [(record, strengths(module, record)) for _, module, record in adapted(model) if record.mix is mix]
            changed = [
                (record, replace(single, strengths={**single.strengths, **new}))
                for record, new in records
                if new
                for single in [_single(record)]
            ]
            _plan_singles(plan, mix, changed)


def plan_each(plan: Plan, model: nn.Module, setting: Callable[[Record, Single], Single]) -> None:
    """Plan another setting of every module of a component, from what it carries and what is set on it.

    What is in the weights stays active at the strength that it has there. Of a list of mixes the first counts.
    """
    for mix in mixes_of({"": model}).values():
        now = plan.view(mix)
        choice = now.choice.rows[0] if now.choice.rows else now.choice
        singles: dict[int, Single] = {}
        for _, module, _ in adapted(model):
            record = plan.record_of(module)
            if record is not None and record.mix is mix:
                single = choice.single(record.index)
                singles[record.index] = _with_fused(setting(record, single), single, now.fused)
        plan.set(mix, choice=choice.with_singles(singles, now.layers, now.adapters))
        plan.root(model, mix)


def _with_fused(wanted: Single, single: Single, fused: Collection[str]) -> Single:
    """A setting in which what is in the weights is as it was."""
    if not fused:
        return wanted
    strengths = {name: single.strengths[name] for name in fused if name in single.strengths}
    active = (*fused, *(name for name in wanted.active if name not in fused))
    return Single(active, {**wanted.strengths, **strengths}, wanted.enabled)


def train(module: nn.Module, names: Sequence[str], flag: bool) -> None:
    """Whether adapters are trained on a module."""
    record = _record(module)
    with planned(_parts(record.mix)) as plan:
        for name in names:
            _plan_gradients(plan, record, name, flag)


def merge(module: nn.Module, names: Sequence[str] | None) -> None:
    """Put active adapters into a layer's weight. Raises AdapterStateError or NonFiniteError."""
    record = _record(module)
    active = _single(record).active
    chosen = [name for name in (active if names is None else names) if name in record.names]
    if inactive := [name for name in chosen if name not in active]:
        raise AdapterStateError(
            f"adapter {shown(inactive[0])} is not active", where=record.where, remedy="Call set_adapter first."
        )
    todo = [name for name in record.mix.choice.order if name in chosen and name not in {*record.fused, *record.copies}]
    parts = _parts(record.mix)
    if not parts:
        raise AdapterStateError(
            "it is not known what model this layer is of",
            where=record.where,
            remedy="Merge the whole model's adapters.",
        )
    with planned(parts) as plan:
        if todo:
            plan_layer_fused(plan, parts[""], record.mix, module, todo)


def unmerge(module: nn.Module) -> None:
    """Take the adapters out of a layer's weight again. Raises AdapterStateError if its base was not kept."""
    record = _record(module)
    if not record.fused:
        warnings.warn("Already unmerged. Nothing to do.", AdapterStateWarning, stacklevel=4)
        return
    parts = _parts(record.mix)
    with planned(parts) as plan:
        plan.carry(module, *unfused(record.where, module, record))
        inside = {name for model in parts.values() for _, m, r in adapted(model) if m is not module for name in r.fused}
        plan.set(record.mix, fused={n: s for n, s in record.mix.fused.items() if n in inside})


def delete(module: nn.Module, name: str) -> None:
    """Remove an adapter from a module; with the last module it is gone. Raises AdapterStateError for one that is in the weight, or in use."""
    record = _record(module)
    mix = record.mix
    if name in record.fused:
        raise AdapterStateError(
            f"Cannot delete adapter(s) {shown(name)} while they are merged",
            where=record.where,
            remedy="Call unmerge first.",
        )
    check_idle(mix, [name])
    refuse_foreign(record.where, module)
    remaining, active = record.without({name}), _single(record).active
    was_active = name in active or (not active and record.index not in mix.choice.singles)  # it may have gone elsewhere
    with planned(_parts(mix)) as plan:
        if remaining is not None and was_active:
            active = tuple(n for n in active if n != name) or tuple(sorted(remaining.names)[:1])
            _plan_single(plan, record, replace(_single(record), active=active))
            _plan_trained(plan, remaining, active)
        if name in record.names:
            _plan_forgotten(plan, mix, record.where, name)
            plan.carry(module, remaining)


def _plan_forgotten(plan: Plan, mix: Mix, where: str, name: str) -> None:
    """Plan that an adapter of a component is no longer on one of its modules."""
    before = plan.view(mix)
    old = before.adapters[name]
    new = replace(
        old,
        layers=tuple(layer for layer in old.layers if layer != where),
        modules=tuple(layer for layer in old.modules if layer != where),
    )
    if new.layers or new.modules:
        return plan.set(mix, adapters={**before.adapters, name: new})
    adapters: dict[str, Adapter] = {n: adapter for n, adapter in before.adapters.items() if n != name}
    choice = before.changed(
        before.layers, adapters, lambda strengths: {n: s for n, s in strengths.items() if n != name}
    )
    plan.set(mix, adapters=adapters, choice=choice if adapters else Choice())
    for model in _parts(mix).values():
        plan.root(model, mix)


def _plan_single(plan: Plan, record: Record, single: Single) -> None:
    """Plan another setting of one module. Raises AdapterStateError where it would change what is in the weight, or rows have a mix each."""
    _plan_singles(plan, record.mix, [(record, single)])


def _plan_singles(plan: Plan, mix: Mix, singles: Sequence[tuple[Record, Single]]) -> None:
    """Plan other settings of modules of one component."""
    if mix.choice.rows:
        raise AdapterStateError(
            "a list of mixes is set, one a prompt",
            where=joined((record.where for record, _ in singles), 1),
            remedy="Call set_adapters with one mix first.",
        )
    choice = mix.choice.with_singles({record.index: single for record, single in singles}, mix.layers, mix.adapters)
    for record, single in singles:
        _refuse_fused(record, single, choice)
    plan.set(mix, choice=choice)


def _refuse_fused(record: Record, single: Single, choice: Choice) -> None:
    """Raise AdapterStateError for a setting that is not what is in a module's weight."""
    if any(single.level(name) != record.mix.choice.levels[name][record.index] for name in record.fused):
        raise AdapterStateError(
            f"adapters {listed(sorted(record.fused))} are merged into this layer",
            where=record.where,
            remedy="Unmerge them first.",
        )
    if record.fused:
        check_order(record.where, record, [name for name in record.mix.fused if name in record.fused], choice)


def _plan_trained(plan: Plan, record: Record, names: Sequence[str]) -> None:
    """Plan that these of a module's adapters are trained there and no others."""
    for name in record.names:
        _plan_gradients(plan, record, name, name in names)


def _plan_gradients(plan: Plan, record: Record, name: str, flag: bool) -> None:
    if not (name in record.copies and record.copies[name].still):
        for held in record.modules(name):
            plan.require_grad(held.parameters(), flag)


def _single(record: Record) -> Single:
    """What is set on a module, whatever a block has put in its place for a while."""
    single: Single = record.mix.choice.single(record.index)
    return single


def _record(module: nn.Module) -> Record:
    record = record_of(module)
    if record is None:
        raise AdapterStateError("the module carries no adapter", remedy="Ask it for its adapters anew.")
    return record


def _parts(mix: Mix) -> dict[str, nn.Module]:
    """The component, if it is known: what an operation locks."""
    model = model_of(mix)
    return {} if model is None else {"": model}
