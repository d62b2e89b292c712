"""attach and detach: adapters on and off many layers, all or nothing, exact inverses."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn as nn

from diffpeft.bundle import dotted
from diffpeft.errors import AdapterStateError, ConfigError, UnknownNameError, listed, shown
from diffpeft.layers.adapted import Record, State, base_class, enter, record_of, state_of, state_with
from diffpeft.layers.site import device_of, site_of
from diffpeft.layers.slot import Slot
from diffpeft.methods import METHODS, Method
from diffpeft.model.mix import Adapter, Choice, Mix, Strength, check_idle, check_name, choose
from diffpeft.model.target import adapted_layers, components, is_preset, select

OVERSIZED = "layers are smaller than the rank"


@dataclass(frozen=True)
class AttachReport:
    """What attach did, or with dry_run=True would do: the adapter's name, the layers (component.name), and the size of its tensors."""

    name: str
    layers: tuple[str, ...]
    parameters: int
    bytes: int


@dataclass
class Plan:
    """Prepared writes. Everything that can fail has happened before `commit`."""

    layers: list[tuple[nn.Module, State]] = field(default_factory=list)
    mixes: list[tuple[Mix, dict[str, Any]]] = field(default_factory=list)

    def commit(self) -> None:
        """Make the writes; if one is interrupted, undo those made."""
        before = [(module, state_of(module)) for module, _ in self.layers]
        attributes = [(mix, {name: getattr(mix, name) for name in new}) for mix, new in self.mixes]
        try:
            for mix, new in self.mixes:
                mix.__dict__.update(new)
            for module, state in self.layers:
                enter(module, state)
        except BaseException:
            for module, state in before:
                enter(module, state)
            for mix, old in attributes:
                mix.__dict__.update(old)
            raise


def mix_of(model: nn.Module) -> Mix | None:
    """The Mix that the layers of a component share, if it has adapters. Raises AdapterStateError if `model` is not what was adapted, but a part or more."""
    mix = None
    for layer, module in adapted_layers(model).items():
        record = record_of(module)
        assert record is not None
        mix = record.mix
        if mix.layers[record.index] != layer:
            raise AdapterStateError(
                f"layer {shown(layer)} was adapted as {shown(mix.layers[record.index])}, as part of another module",
                remedy="Pass the module that was adapted.",
            )
    return mix


def mixes_of(parts: Mapping[str, nn.Module]) -> dict[str, Mix]:
    """{component: Mix} of the components that have adapters."""
    return {component: mix for component, model in parts.items() if (mix := mix_of(model))}


def method_of(config: Any) -> type[Method]:
    """The method that a config object configures."""
    for method in METHODS.values():
        if type(config) is method.config:
            return method
    raise ConfigError(
        f"{type(config).__name__} configures no method",
        remedy=f"Known: {', '.join(m.config.__name__ for m in METHODS.values())}.",
    )


def attach(
    target: Any,
    config: Any,
    name: str = "default",
    targets: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    *,
    dry_run: bool = False,
    generator: torch.Generator | None = None,
) -> AttachReport:
    """Add a fresh, trainable adapter to layers of a module or pipeline and activate it at strength 1, after those already active.

    Args:
        config: a method's config, such as LoraConfig(r=16).
        targets, exclude: which layers; they replace config.target_modules and config.exclude_modules.
        dry_run: report and change nothing.
        generator: source of the initial values; torch's default one if None.

    Tensors are float32 whatever the base's dtype. `requires_grad` of the base is not touched.
    Raises ConfigError, UnknownNameError or AdapterStateError, in which case nothing has changed.
    """
    check_name(name)
    method, parts = method_of(config), components(target)
    config.validate()
    chosen = select(parts, targets or config.target_modules, exclude or config.exclude_modules)
    mixes = mixes_of(parts)
    refuse_duplicate(name, mixes.values())
    slots = {
        component: {layer: _fresh(method, config, layer, module, generator, dry_run) for layer, module in found.items()}
        for component, found in chosen.items()
    }
    large = [layer for component, found in slots.items() for layer in oversized(chosen[component], found)]
    if large and not is_preset(targets or config.target_modules):  # who named the layers should know
        warnings.warn(f"adapter {name!r}: {len(large)} {OVERSIZED}: {listed(large[:5])}", stacklevel=2)
    if not dry_run:
        plan = Plan()
        for component, found in slots.items():
            if found:
                install(
                    plan, component, chosen[component], found, mixes.get(component), Adapter(name, tuple(found)), 1.0
                )
        plan.commit()
    tensors = [p for found in slots.values() for slot in found.values() for p in slot.parameters()]
    names = tuple(dotted(component, layer) for component, found in slots.items() for layer in found)
    return AttachReport(
        name, names, sum(p.numel() for p in tensors), sum(p.numel() * p.element_size() for p in tensors)
    )


def oversized(modules: Mapping[str, nn.Module], slots: Mapping[str, Slot]) -> list[str]:
    """The layers whose weight has fewer rows or columns than their adapter has ranks."""
    shapes = {layer: site.geometry(modules[layer]) for layer in slots if (site := site_of(base_class(modules[layer])))}
    return [layer for layer, slot in slots.items() if slot.rank > min(shapes[layer].out, shapes[layer].columns)]


def refuse_duplicate(name: str, mixes: Iterable[Mix]) -> None:
    """Raise AdapterStateError if a component has an adapter of this name."""
    if any(name in mix.adapters for mix in mixes):
        raise AdapterStateError(
            f"an adapter named {shown(name)} is there already", remedy="Choose another name=, or unload it first."
        )


def _fresh(
    method: type[Method], config: Any, layer: str, module: nn.Module, generator: torch.Generator | None, dry_run: bool
) -> Slot:
    site = site_of(base_class(module))
    assert site is not None
    with torch.device("meta" if dry_run else "cpu"):  # a dry run draws no random numbers
        tensors, alpha = method.init(config, layer, site.geometry(module), None if dry_run else generator)
    slot = Slot(method.name, tensors, alpha, dropout=config.dropout, trainable=True).train(module.training)
    return slot if dry_run else slot.to(device_of(module))


def install(
    plan: Plan,
    component: str,
    modules: Mapping[str, nn.Module],
    slots: Mapping[str, Slot],
    mix: Mix | None,
    adapter: Adapter,
    strength: Strength,
) -> None:
    """Plan to give `modules` these slots as `adapter`, active at `strength` after those already active."""
    mix = mix or Mix(component)
    layers = tuple(dict.fromkeys((*mix.layers, *slots)))
    column = {layer: i for i, layer in enumerate(layers)}
    adapters = {**mix.adapters, adapter.name: adapter}
    plan.mixes.append(
        (
            mix,
            {
                "layers": layers,
                "adapters": adapters,
                "choice": choose(component, layers, adapters, {**mix.choice.given, adapter.name: strength}),
            },
        )
    )
    for layer, slot in slots.items():
        module, index = modules[layer], column[layer]
        old = record_of(module)
        tensor = old.column if old else torch.tensor([index], device="cpu")
        record = Record(mix, tensor, index, {**(old.slots if old else {}), adapter.name: slot})
        plan.layers.append((module, state_with(module, record)))


def detach(target: Any, name: str) -> None:
    """Remove an adapter. With the last one every layer is what it was: class, keys and bytes."""
    parts = components(target)
    known = {n for mix in mixes_of(parts).values() for n in mix.adapters}
    if name not in known:
        raise UnknownNameError.of("adapter", name, known)
    plan = Plan()
    remove(plan, parts, {name})
    plan.commit()


def remove(plan: Plan, parts: Mapping[str, nn.Module], names: set[str]) -> None:
    """Plan to take `names` off every component that has them."""
    for component, mix in mixes_of(parts).items():
        if not names & set(mix.adapters):
            continue
        check_idle(mix, names)
        adapters = {n: a for n, a in mix.adapters.items() if n not in names}
        given = {n: s for n, s in mix.choice.given.items() if n not in names}
        plan.mixes.append(
            (
                mix,
                {
                    "adapters": adapters,
                    "choice": choose(component, mix.layers, adapters, given) if adapters else Choice(),
                },
            )
        )
        for layer, module in adapted_layers(parts[component]).items():
            record = record_of(module)
            assert record is not None
            if names & set(record.slots):
                _refuse_foreign(layer, module)
                left = {n: s for n, s in record.slots.items() if n not in names}
                plan.layers.append((module, state_with(module, replace(record, slots=left))))


def _refuse_foreign(layer: str, module: nn.Module) -> None:
    if "_diffpeft_base" not in type(module).__dict__:
        raise AdapterStateError(
            f"layer {shown(layer)} was given the class {type(module).__name__} by another library after the adapter",
            remedy="Undo that first.",
        )
