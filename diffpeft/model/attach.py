"""attach and detach: adapters on and off many layers, all or nothing, exact inverses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
import torch.nn as nn

from diffpeft.bundle import dotted
from diffpeft.errors import AdapterStateError, ConfigError, UnknownNameError, listed, shown
from diffpeft.layers.adapted import (
    Record,
    is_adapted,
    op_of,
    record_of,
    state_with,
)
from diffpeft.layers.patches import Patch, Patches
from diffpeft.layers.site import COPIES, device_of, present, refusal
from diffpeft.layers.slot import BIAS, Piece, Slot
from diffpeft.layers.whole import Copies, bare_copy, copied, copies_of
from diffpeft.methods import METHODS, Additive, Dora, Method, Site, Spec
from diffpeft.methods.config import check_choice
from diffpeft.methods.dora import INNER
from diffpeft.methods.linalg import wide_dtype
from diffpeft.model.lock import exclusive
from diffpeft.model.mix import Adapter, Choice, Given, Mix, Strength, check_idle, check_name
from diffpeft.model.plan import Plan
from diffpeft.model.target import adapted_layers, components, is_preset, layers_of, modules_of, select
from diffpeft.model.weights import unfused

OVERSIZED = "layers are smaller than the rank"


@dataclass(frozen=True)
class AttachReport:
    """What attach did, or with dry_run=True would do: the adapter's name, the layers (component.name), and the size of its tensors."""

    name: str
    layers: tuple[str, ...]
    parameters: int
    bytes: int


def mix_of(model: nn.Module, adapted: Mapping[str, nn.Module] | None = None) -> Mix | None:
    """The Mix that the layers of a component share, if it has adapters. Raises AdapterStateError if `model` is not what was adapted, but a part or more.

    `adapted` are its adapted layers, where the caller has looked already.
    """
    mix = None
    for layer, module in (adapted_layers(model) if adapted is None else adapted).items():
        record = record_of(module)
        assert record is not None
        mix = record.mix
        if mix.layers[record.index] != layer:
            raise AdapterStateError(
                f"layer {shown(layer)} was adapted as {shown(mix.layers[record.index])}, as part of another module",
                remedy="Pass the module that was adapted.",
            )
    if mix is not None:
        return mix
    found = [own for module, _ in modules_of(model, copied).values() if isinstance(own := copies_of(module), Patches)]
    return found[0].mix if found else None


def mixes_of(
    parts: Mapping[str, nn.Module], adapted: Mapping[str, Mapping[str, nn.Module]] | None = None
) -> dict[str, Mix]:
    """{component: Mix} of the components that have adapters; `adapted` as in `mix_of`."""
    found = {component: mix_of(model, (adapted or {}).get(component)) for component, model in parts.items()}
    return {component: mix for component, mix in found.items() if mix}


def method_of(config: Any, options: Mapping[str, Any]) -> type[Method]:
    """The method that a config object and keywords of `attach` configure."""
    method = next((m for m in METHODS.values() if type(config) is m.config), None)
    if method is None:
        raise ConfigError(
            f"{type(config).__name__} configures no method",
            remedy=f"Known: {', '.join(dict.fromkeys(m.config.__name__ for m in METHODS.values() if m.config))}.",
        )
    if getattr(config, "use_dora", False) or ("dora" in options and method in INNER):
        method = Dora
        check_choice("dora", options.get("dora", "out"), ("out", "in"))
    for key in options:
        if key not in method.options:
            takes = f"It takes {', '.join(sorted(method.options))}." if method.options else "It takes no keywords."
            raise ConfigError(f"{key}= is nothing that {method.name} has", remedy=takes)
    return method


def attach(
    target: Any,
    config: Any,
    name: str = "default",
    targets: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    *,
    dry_run: bool = False,
    generator: torch.Generator | None = None,
    side: str | None = None,
    dora: str | None = None,
    constraint: float | None = None,
    rescale: bool | None = None,
    tucker: bool | None = None,
) -> AttachReport:
    """Add a fresh, trainable adapter to layers of a module or pipeline and activate it at strength 1, after those already active.

    Args:
        config: a method's config, such as LoraConfig(r=16).
        targets, exclude: which layers; they replace config.target_modules and config.exclude_modules.
        dry_run: report and change nothing.
        generator: source of the initial values; torch's default one if None.
        side: of OFT and BOFT: "input" (PEFT) or "output" (LyCORIS, Kohya).
        dora: weight decomposition over LoRA, LoHa or LoKr, with a magnitude for each "out" or "in" feature.
        constraint: of output-side OFT and BOFT: the bound on the rotation, as LyCORIS defines it.
        rescale: of output-side OFT and BOFT: a trained factor for each output.
        tucker: of LoRA, LoHa and LoKr on convolutions: a core tensor between the factors.

    Tensors are float32 whatever the base's dtype. `requires_grad` of the base is not touched.
    Raises ConfigError, UnknownNameError or AdapterStateError, in which case nothing has changed.
    """
    parts = components(target)
    check_name(name)
    given = {"side": side, "dora": dora, "constraint": constraint, "rescale": rescale, "tucker": tucker}
    options = {key: value for key, value in given.items() if value is not None}
    method = method_of(config, options)
    config.validate()
    for field_ in _FACADE:
        if getattr(config, field_, None):
            raise ConfigError(
                f"attach has no use for {field_}", remedy="It is for get_peft_model and inject_adapter_in_model."
            )
    quiet = is_preset(targets or config.target_modules)  # who named the layers should know of small ones
    with exclusive(parts):
        chosen = select(parts, targets or config.target_modules, exclude or config.exclude_modules)
        return attach_to(
            parts,
            chosen,
            config,
            name,
            method=method,
            options=options,
            generator=generator,
            dry_run=dry_run,
            quiet=quiet,
        )


_FACADE = (
    "layers_to_transform",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "ensure_weight_tying",
)


def attach_to(
    parts: Mapping[str, nn.Module],
    chosen: Mapping[str, Mapping[str, nn.Module]],
    config: Any,
    name: str,
    *,
    method: type[Method],
    options: Mapping[str, Any] = MappingProxyType({}),
    generator: torch.Generator | None = None,
    dry_run: bool = False,
    quiet: bool = False,
    strength: float | None = 1.0,
    wholes: Mapping[str, nn.Module] = MappingProxyType({}),
    ties: Mapping[str, str] = MappingProxyType({}),
    finish: Callable[[Mapping[str, nn.Module], dict[str, Slot]], dict[str, Slot]] | None = None,
    patches: Mapping[str, tuple[nn.Module, Patch]] = MappingProxyType({}),
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> AttachReport:
    """`attach` for layers that have been chosen, {component: {name: layer}}. A strength of None leaves the adapter inactive.

    `wholes` {name: module} are trained in copies (`ties` as in `copy_wholes`), `patches` {name: (module, patch)} change parameters, both of one component.
    `finish` gets the layers of a component and their fresh slots, and gives the slots to take. `metadata` are what a file of the adapter is to hold.
    """
    mixes = mixes_of(parts)
    refuse_duplicate(name, mixes.values())
    chosen = {component: dict(found) for component, found in chosen.items()}
    slots = {
        component: {
            layer: _fresh(method, config, layer, module, options, generator, dry_run) for layer, module in found.items()
        }
        for component, found in chosen.items()
    }
    if getattr(config, "bias", "none") == "all":
        for component, model in parts.items():
            some = chosen[component] or patches
            other = {n: m for n, m in _biased(model).items() if n not in chosen[component]} if some else {}
            chosen[component] = {**chosen[component], **other}
            slots[component] |= {n: _bias_alone(m, dry_run) for n, m in other.items()}
    if finish is not None:
        slots = {component: finish(chosen[component], found) for component, found in slots.items()}
    _warn_adjusted(name, slots)
    large = [] if quiet else [layer for component, found in slots.items() for layer in oversized(found)]
    if large:
        warnings.warn(f"adapter {name!r}: {len(large)} {OVERSIZED}: {listed(large[:5])}", stacklevel=3)
    if not dry_run:
        plan = Plan()
        for component, found in slots.items():
            if found or patches:
                own = Adapter(name, tuple(found), dict(metadata), modules=(*wholes, *patches))
                mix = install(plan, component, chosen[component], found, mixes.get(component), own, strength)
                copy_wholes(plan, mix, name, wholes, ties=ties)
                put_patches(plan, mix, name, patches)
                plan.root(parts[component], mix)
        plan.commit()
    tensors = [p for found in slots.values() for slot in found.values() for p in slot.parameters()]
    tensors += dict.fromkeys(p for _, patch in patches.values() for p in patch.parameters())
    names = tuple(dotted(component, layer) for component, found in slots.items() for layer in found)
    return AttachReport(
        name, names, sum(p.numel() for p in tensors), sum(p.numel() * p.element_size() for p in tensors)
    )


def copy_wholes(
    plan: Plan,
    mix: Mix,
    name: str,
    wholes: Mapping[str, nn.Module],
    *,
    still: bool = False,
    ties: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, nn.Module]:
    """Plan to give modules a trainable copy each (`still`: one that never is), for the adapter whose layers are planned already; the copies.

    `ties` {module: another} are those whose copies share a weight. Raises AdapterStateError for a module that has adapters.
    """
    made: dict[str, nn.Module] = {}
    for where, module in wholes.items():
        if any(is_adapted(m) or isinstance(copies_of(m), Patches) for m in module.modules()):
            raise AdapterStateError(
                f"module {shown(where)} has adapters, and cannot be trained whole beside them",
                remedy="Leave it out of modules_to_save, or unload the other adapters.",
            )
        old = copies_of(module)
        made[where] = bare_copy(module).requires_grad_(not still)
        own = old or Copies(mix, {})
        frozen = own.still | ({name} if still else frozenset())
        plan.carry(module, replace(own, modules={**own.modules, name: made[where]}, still=frozen))
    for where, other in ties.items():
        made[where]._parameters["weight"] = made[other]._parameters["weight"]
    return made


def put_patches(plan: Plan, mix: Mix, name: str, patches: Mapping[str, tuple[nn.Module, Patch]]) -> None:
    """Plan to give modules a patch each, for the adapter that is installed already. Two that hold one parameter may have the same patch (tied weights).

    Raises AdapterStateError for a module that something else of ours is on.
    """
    taken, layers = plan.changed, plan.view(mix).layers
    seen: set[int] = set()
    for where, (module, patch) in patches.items():
        old = copies_of(module)
        other = old is not None and {*map(type, old.modules.values())} != {type(patch)}
        inside = [m for m in module.modules() if m is not module]
        if other or is_adapted(module) or any(map(copied, inside)) or any(m is module for m in taken):
            raise AdapterStateError(
                f"module {shown(where)} has adapters, and its parameters cannot be changed beside them",
                remedy="Leave it out of target_modules and modules_to_save, or unload the other adapters.",
            )
        own = old or Patches(mix, {}, index=layers.index(where))
        hidden = own.hidden | ({name} if id(patch) in seen else frozenset())
        plan.carry(module, replace(own, modules={**own.modules, name: patch}, hidden=hidden))
        seen.add(id(patch))


def oversized(slots: Mapping[str, Slot]) -> list[str]:
    """The layers whose weight has fewer rows or columns than their adapter has ranks."""
    return [
        layer
        for layer, slot in slots.items()
        for part in slot.parts
        if issubclass(part.method, (Additive, Dora))
        and slot.rank > min(part.spec.geometry.out, part.spec.geometry.columns)
    ]


def refuse_duplicate(name: str, mixes: Iterable[Mix]) -> None:
    """Raise AdapterStateError if a component has an adapter of this name."""
    if any(name in mix.adapters for mix in mixes):
        raise AdapterStateError(
            f"an adapter named {shown(name)} is there already", remedy="Choose another name=, or unload it first."
        )


def _fresh(
    method: type[Method],
    config: Any,
    layer: str,
    module: nn.Module,
    options: Mapping[str, Any],
    generator: torch.Generator | None,
    dry_run: bool,
) -> Slot:
    op = op_of(module)
    site = Site(layer, op.geometry, lambda: _weight(op, dry_run), None if dry_run else generator)
    with torch.device("meta" if dry_run else "cpu"):  # a dry run draws no random numbers
        fresh = method.init(config, site, **options)
    tensors = dict(fresh.tensors)
    if getattr(config, "bias", "none") != "none" and op.bias is not None:
        tensors[BIAS] = torch.zeros(op.geometry.out, device="meta" if dry_run else "cpu")
    piece = Piece(method.name, fresh.tensors, fresh.alpha, Spec(op.geometry, fresh.alpha, fresh.options), fresh.frozen)
    slot = Slot([piece], {k: t for k, t in tensors.items() if k == BIAS}, trainable=True).train(module.training)
    return slot if dry_run else slot.to(device_of(module))


def _biased(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that have a bias which can be changed."""
    return {
        name: module
        for name, (module, parent) in layers_of(model).items()
        if getattr(module, "bias", None) is not None and not refusal(module, parent, name)
    }


def _bias_alone(module: Any, dry_run: bool) -> Slot:
    """An adapter that only changes the layer's bias."""
    shift = torch.zeros(module.bias.numel(), device="meta" if dry_run else device_of(module))
    return Slot([], {BIAS: shift}, trainable=True).train(module.training)


def _weight(op: Any, dry_run: bool) -> torch.Tensor:
    """The canonical weight on the CPU, in fp32 or better."""
    if dry_run:
        return torch.empty(op.geometry.shape)
    W = present(op.module, lambda: op.weight().detach())
    return W.to("cpu", wide_dtype(W.dtype))


def _warn_adjusted(name: str, slots: Mapping[str, Mapping[str, Slot]]) -> None:
    """One warning for all layers whose blocks had to be of another size than the config says."""
    adjusted = {
        dotted(component, layer): part.spec.options["adjusted"]
        for component, found in slots.items()
        for layer, slot in found.items()
        for part in slot.parts
        if "adjusted" in part.spec.options
    }
    if adjusted:
        asked, used = next(iter(adjusted.values()))
        warnings.warn(
            f"adapter {name!r}: {asked} does not divide {len(adjusted)} layers, so the nearest number that does was taken "
            f"({used} for the first): {listed(list(adjusted)[:5])}",
            stacklevel=3,
        )


def install(
    plan: Plan,
    component: str,
    modules: Mapping[str, nn.Module],
    slots: Mapping[str, Slot],
    mix: Mix | None,
    adapter: Adapter,
    strength: Strength | None,
) -> Mix:
    """Plan to give `modules` these slots as `adapter`, active at `strength` after those already active, or inactive if it is None; the component's mix."""
    mix = mix or Mix(component)
    before = plan.view(mix)
    layers = tuple(dict.fromkeys((*before.layers, *slots, *adapter.modules)))
    column = {layer: i for i, layer in enumerate(layers)}
    adapters = {**before.adapters, adapter.name: adapter}
    added: Given = {} if strength is None else {adapter.name: strength}
    choice = before.changed(layers, adapters, lambda given: {**given, **added})
    plan.set(mix, layers=layers, adapters=adapters, choice=choice)
    columns = torch.arange(len(layers), device="cpu").split(1)
    for layer, slot in slots.items():
        module, index = modules[layer], column[layer]
        if COPIES in module.__dict__:
            raise AdapterStateError(
                f"layer {shown(layer)}: an adapter changes its parameters, or trains it whole",
                remedy="Leave it out, or unload that adapter.",
            )
        old = record_of(module)
        slots_ = {**(old.slots if old else {}), adapter.name: slot}
        record = replace(old, slots=slots_) if old else Record(mix, columns[index].clone(), index, slots_)
        plan.layer(module, state_with(module, record))
    return mix


def detach(target: Any, name: str) -> None:
    """Remove an adapter. With the last one every layer is what it was: class, keys and bytes."""
    take_off(components(target), {name})


def take_off(parts: Mapping[str, nn.Module], names: set[str] | None) -> None:
    """Remove adapters, or all of them. Raises UnknownNameError for a name that no component has."""
    with exclusive(parts):
        adapted = {component: adapted_layers(model) for component, model in parts.items()}
        mixes = mixes_of(parts, adapted)
        known = {n for mix in mixes.values() for n in mix.adapters}
        for name in sorted((names or set()) - known):
            raise UnknownNameError.of("adapter", name, known)
        plan = Plan()
        remove(plan, parts, mixes, adapted, known if names is None else names)
        plan.commit()


def remove(
    plan: Plan,
    parts: Mapping[str, nn.Module],
    mixes: Mapping[str, Mix],
    adapted: Mapping[str, Mapping[str, nn.Module]],
    names: set[str],
) -> None:
    """Plan to take `names` off every component that has them."""
    for component, mix in mixes.items():
        if not names & set(mix.adapters):
            continue
        check_idle(mix, names)
        adapters = {n: a for n, a in mix.adapters.items() if n not in names}
        choice = mix.changed(mix.layers, adapters, lambda given: {n: s for n, s in given.items() if n not in names})
        choice = choice if adapters else Choice()
        out = bool(names & set(mix.fused))
        plan.set(mix, adapters=adapters, choice=choice, fused={} if out else mix.fused)
        plan.root(parts[component], mix)
        for layer, module in adapted[component].items():
            record = record_of(module)
            assert record is not None
            weights = None
            if out and record.fused:
                record, weights = unfused(layer, module, record)
            if weights is not None or names & set(record.slots):
                refuse_foreign(layer, module)
                left = {n: s for n, s in record.slots.items() if n not in names}
                plan.layer(module, state_with(module, replace(record, slots=left), weights))
        for module, _ in modules_of(parts[component], copied).values():
            copies = copies_of(module)
            if copies is None or copies.mix is not mix:
                continue
            if out and copies.fused and isinstance(copies, Patches):
                copies, puts = copies.unfused(module)
                plan.put(puts)
                plan.carry(module, copies)
            if names & set(copies.modules):
                plan.carry(module, copies.without(names))


def refuse_foreign(layer: str, module: nn.Module) -> None:
    if "_diffpeft_base" not in type(module).__dict__:
        raise AdapterStateError(
            f"layer {shown(layer)} was given the class {type(module).__name__} by another library after the adapter",
            remedy="Undo that first.",
        )
