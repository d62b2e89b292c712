"""attach and detach: adapters on and off many layers, all or nothing, exact inverses."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn as nn

from diffpeft.bundle import dotted
from diffpeft.errors import AdapterStateError, ConfigError, ConfigWarning, UnknownNameError, listed, shown
from diffpeft.layers.carried import ADAPTERS, COPIES, Copy, Record, bare_copy, base_class, is_adapted, op_of
from diffpeft.layers.hooks import device_of, present, refusal
from diffpeft.layers.patches import Patch
from diffpeft.layers.sites import LayerSite, site_of
from diffpeft.layers.slot import BIAS, Piece, Slot
from diffpeft.methods import METHODS, Additive, Dora, Method, Site, Spec
from diffpeft.methods.config import check_choice
from diffpeft.methods.dora import INNER
from diffpeft.methods.linalg import wide_dtype
from diffpeft.methods.lora import is_across
from diffpeft.model.banks import share
from diffpeft.model.journal import ABSENT
from diffpeft.model.mix import Adapter, Choice, Given, Mix, Strength, check_idle, check_name
from diffpeft.model.plan import Plan, planned
from diffpeft.model.target import adapted, along, components, is_preset, layers_of, select, within_pefts
from diffpeft.model.weights import unfused
from diffpeft.readable import Readable

log = logging.getLogger(__name__)

OVERSIZED = "layers are smaller than the rank"


@dataclass(frozen=True, repr=False)
class AttachReport(Readable):
    """What attach did, or with dry_run=True would do: the adapter's name, the layers (component.name), and the size of its tensors."""

    name: str
    layers: tuple[str, ...]
    parameters: int
    bytes: int


Walk = Sequence[tuple[str, nn.Module, Record]]  # as `target.adapted` gives it


def mix_of(model: nn.Module, walk: Walk | None = None) -> Mix | None:
    """The Mix that the layers of a component share, if it has adapters. Raises AdapterStateError if `model` is not what was adapted, but a part or more.

    `walk` is what carries something in it, where the caller has looked already.
    """
    mix: Mix | None = None
    for name, _, record in adapted(model) if walk is None else walk:
        if record.mix is not mix:
            if record.mix.apart:
                continue
            mix = record.mix
        if mix.layers[record.index] != name:
            raise AdapterStateError(
                f"layer {shown(name)} was adapted as {shown(record.where)}, as part of another module",
                remedy="Pass the module that was adapted.",
            )
    return mix


def mixes_of(parts: Mapping[str, nn.Module], walks: Mapping[str, Walk] | None = None) -> dict[str, Mix]:
    """{component: Mix} of the components that have adapters; `walks` as in `mix_of`."""
    mixes = {component: mix_of(model, (walks or {}).get(component)) for component, model in parts.items()}
    return {component: mix for component, mix in mixes.items() if mix}


def method_of(config: object, options: Mapping[str, object]) -> type[Method]:
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
    target: object,
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
    keywords = {"side": side, "dora": dora, "constraint": constraint, "rescale": rescale, "tucker": tucker}
    options = {key: value for key, value in keywords.items() if value is not None}
    method = method_of(config, options)
    config.validate()
    _refuse_facade(config)
    quiet = is_preset(targets or config.target_modules)  # who named the layers should know of small ones
    addition = Addition(name, config, method, options, generator, quiet=quiet)
    with planned(parts) as plan:
        chosen = select(parts, targets or config.target_modules, exclude or config.exclude_modules)
        report = dry_run_of(parts, chosen, addition) if dry_run else plan_attached(plan, parts, chosen, addition)
    log.info("%s %r", "would attach" if dry_run else "attached", report)
    return report


_FACADE = (
    "layers_to_transform",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "ensure_weight_tying",
)
Slots = dict[str, dict[str, Slot]]  # {component: {layer: slot}}


def _refuse_facade(config: object) -> None:
    """Raise ConfigError for fields that only PEFT's facade has a use for."""
    for name in _FACADE:
        if getattr(config, name, None):
            raise ConfigError(
                f"attach has no use for {name}", remedy="It is for get_peft_model and inject_adapter_in_model."
            )


@dataclass(frozen=True)
class Addition:
    """An adapter that is to be made afresh.

    Args:
        strength: None leaves it inactive.
        quiet: say nothing of layers that are smaller than the rank.
        trainable: whether its tensors get gradients.
        wholes: {name: module} of those trained in copies, all of one component; `ties` as in `copy_wholes`.
        patches: {name: (module, patch)} of modules whose parameters it changes, all of one component.
        finish: gets a component's layers and their fresh slots, and gives the slots to take.
        metadata: what a file of the adapter is to hold.
        as_in_peft: whether tensors are PEFT's where it has other ones than everybody: a branch beside a convolution with groups.
    """

    name: str
    config: Any
    method: type[Method]
    options: Mapping[str, Any] = field(default_factory=dict)
    generator: torch.Generator | None = None
    strength: float | None = 1.0
    quiet: bool = False
    trainable: bool = True
    wholes: Mapping[str, nn.Module] = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)
    patches: Mapping[str, tuple[nn.Module, Patch]] = field(default_factory=dict)
    finish: Callable[[Mapping[str, nn.Module], dict[str, Slot]], dict[str, Slot]] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    as_in_peft: bool = False

    @property
    def biases(self) -> str:
        """Which biases are trained: "none", "all", or those of the layers."""
        return getattr(self.config, "bias", "none")


def plan_attached(
    plan: Plan, parts: Mapping[str, nn.Module], chosen: Mapping[str, Mapping[str, nn.Module]], new: Addition
) -> AttachReport:
    """Plan `attach` for layers that have been chosen, {component: {name: layer}}."""
    mixes = mixes_of(parts)
    layers, slots = _fresh_slots(parts, mixes, chosen, new, dry_run=False)
    for component, of_component in slots.items():
        if not of_component and not new.wholes and not new.patches:
            continue
        modules = (*new.wholes, *new.patches)
        adapter = Adapter(new.name, tuple(of_component), dict(new.metadata), modules=modules)
        mix = install(plan, component, layers[component], of_component, mixes.get(component), adapter, new.strength)
        copies = copy_wholes(plan, mix, new.name, new.wholes, ties=new.ties)
        put_patches(plan, mix, new.name, new.patches)
        for module in (*of_component.values(), *copies.values(), *(patch for _, patch in new.patches.values())):
            module.requires_grad_(new.trainable)
        plan.root(parts[component], mix)
    return _report(new, slots)


def dry_run_of(
    parts: Mapping[str, nn.Module], chosen: Mapping[str, Mapping[str, nn.Module]], new: Addition
) -> AttachReport:
    """What `plan_attached` would report."""
    return _report(new, _fresh_slots(parts, mixes_of(parts), chosen, new, dry_run=True)[1])


def _fresh_slots(
    parts: Mapping[str, nn.Module],
    mixes: Mapping[str, Mix],
    chosen: Mapping[str, Mapping[str, nn.Module]],
    new: Addition,
    dry_run: bool,
) -> tuple[dict[str, dict[str, nn.Module]], Slots]:
    """The chosen layers, and those whose bias alone is trained; and a fresh slot for each. In a dry run on the meta device."""
    refuse_duplicate(new.name, mixes.values())
    layers = {component: dict(of_component) for component, of_component in chosen.items()}
    slots = {component: _fresh_on(of_component, new, dry_run) for component, of_component in layers.items()}
    if new.biases == "all":
        _add_biases(parts, new, layers, slots, dry_run)
    if new.finish is not None:
        slots = {component: new.finish(layers[component], of_component) for component, of_component in slots.items()}
    for of_component in slots.values():
        share(of_component)
    _warn_adjusted(new.name, slots)
    branches = [dotted(c, layer) for c, of in slots.items() for layer, slot in of.items() if is_across(slot.tensors)]
    if branches:
        warnings.warn(
            f"LoRA adapter added to ConvNd layer with groups > 1. Merging is not supported. {listed(branches, 5)}",
            ConfigWarning,
            stacklevel=5,
        )
    large = [] if new.quiet else [layer for of_component in slots.values() for layer in oversized(of_component)]
    if large:
        warnings.warn(
            f"adapter {new.name!r}: {len(large)} {OVERSIZED}: {listed(large, 5)}", ConfigWarning, stacklevel=4
        )
    return layers, slots


def _add_biases(
    parts: Mapping[str, nn.Module],
    new: Addition,
    layers: Mapping[str, dict[str, nn.Module]],
    slots: Slots,
    dry_run: bool,
) -> None:
    """Put the other layers that have a bias into `layers`, with a slot for it, where the adapter is on a component."""
    for component, model in parts.items():
        if layers[component] or new.patches:
            others = {name: m for name, m in _biased(model).items() if name not in layers[component]}
            layers[component].update(others)
            slots[component].update({name: _bias_alone(m, dry_run) for name, m in others.items()})


def _report(new: Addition, slots: Slots) -> AttachReport:
    tensors = [p for of_component in slots.values() for slot in of_component.values() for p in slot.parameters()]
    tensors += dict.fromkeys(p for _, patch in new.patches.values() for p in patch.parameters())
    names = tuple(dotted(component, layer) for component, of_component in slots.items() for layer in of_component)
    total = sum(p.numel() for p in tensors)
    return AttachReport(new.name, names, total, sum(p.numel() * p.element_size() for p in tensors))


def copy_wholes(
    plan: Plan,
    mix: Mix,
    name: str,
    wholes: Mapping[str, nn.Module],
    *,
    still: bool = False,
    ties: Mapping[str, str] | None = None,
) -> dict[str, nn.Module]:
    """Plan to give modules a trainable copy each (`still`: one that never is), for the adapter whose layers are planned already; the copies.

    `ties` {module: another} are those whose copies share a weight. Raises AdapterStateError for a module with layers inside that have adapters.
    """
    made: dict[str, nn.Module] = {}
    for where, module in wholes.items():
        ours = _within(module)
        if any(plan.record_of(m) for m in module.modules() if m is not module and m not in ours):
            raise AdapterStateError(
                f"module {shown(where)} holds layers with adapters, and cannot be trained whole beside them",
                remedy="Leave it out of modules_to_save, or unload the other adapters.",
            )
        made[where] = bare_copy(module).requires_grad_(not still)
        record = _record(plan, mix, where, module)
        plan.carry(module, record.changed(copies={**record.copies, name: Copy(made[where], still)}))
    for where, other in (ties or {}).items():
        made[where]._parameters["weight"] = made[other]._parameters["weight"]
    return made


def _within(module: nn.Module) -> set[nn.Module]:
    """What lies in the slots, copies and patches of a module."""
    held = (module._modules.get(name) for name in (ADAPTERS, COPIES)) if is_adapted(module) else ()
    return {inner for container in held if container is not None for inner in container.modules()}


def _record(plan: Plan, mix: Mix, where: str, module: nn.Module) -> Record:
    """What a module will carry, of `mix`; an empty record if nothing yet."""
    record = plan.record_of(module)
    if record is not None:
        return record
    index = plan.view(mix).layers.index(where)
    return Record(mix, torch.tensor([index], device="cpu"), index)


def put_patches(plan: Plan, mix: Mix, name: str, patches: Mapping[str, tuple[nn.Module, Patch]]) -> None:
    """Plan to give modules a patch each, for the adapter that is installed already. Two that hold one parameter may have the same patch (tied weights).

    Raises AdapterStateError for a module that has something else of an adapter, and is no layer.
    """
    seen: set[int] = set()
    for where, (module, patch) in patches.items():
        record = _record(plan, mix, where, module)
        beside = {type(held) for held in (*record.slots.values(), *record.patches.values())} - {type(patch)}
        inside = [r for m in module.modules() if m is not module and (r := plan.record_of(m))]
        if (beside and site_of(base_class(module)) is None) or any(r.copies or r.patches for r in inside):
            raise AdapterStateError(
                f"module {shown(where)} has adapters, and its parameters cannot be changed beside them",
                remedy="Leave it out of target_modules and modules_to_save, or unload the other adapters.",
            )
        hidden = record.hidden | ({name} if id(patch) in seen else frozenset())
        plan.carry(module, record.changed(patches={**record.patches, name: patch}, hidden=hidden))
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


def _fresh_on(layers: Mapping[str, nn.Module], new: Addition, dry_run: bool) -> dict[str, Slot]:
    """A fresh adapter for each layer, under the name by which a config speaks of it."""
    spoken = along(layers)
    return {layer: _fresh(new, spoken.get(layer, layer), module, dry_run) for layer, module in layers.items()}


def _fresh(new: Addition, layer: str, module: nn.Module, dry_run: bool) -> Slot:
    """A fresh adapter for one layer."""
    op, device = op_of(module), device_of(module)
    outline = dry_run or device.type == "meta"  # no random numbers are drawn
    site = Site(layer, op.geometry, lambda: _weight(op, outline), None if outline else new.generator)
    with torch.device("meta" if outline else "cpu"):
        fresh = new.method.init(new.config, site, **new.options, **_across(new, op))
        shift = {BIAS: torch.zeros(op.geometry.out)} if new.biases != "none" and op.bias is not None else {}
    spec = Spec(op.geometry, fresh.alpha, fresh.options)
    piece = Piece(new.method.name, fresh.tensors, fresh.alpha, spec, fresh.frozen)
    slot = Slot([piece], shift, trainable=True).train(module.training)
    return slot if dry_run else slot.to(device)


def _across(new: Addition, op: LayerSite) -> dict[str, bool]:
    """The keyword of methods that have PEFT's form of a convolution with groups, where that is wanted."""
    wanted = new.as_in_peft and "across" in new.method.options and op.takes_branches
    return {"across": True} if wanted else {}


def _biased(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that have a bias which can be changed."""
    return {
        name: module
        for name, (module, parent) in layers_of(model).items()
        if op_of(module).bias is not None and not refusal(module, parent, name)
    }


def _bias_alone(module: Any, dry_run: bool) -> Slot:
    """An adapter that only changes the layer's bias."""
    shift = torch.zeros(op_of(module).geometry.out, device="meta" if dry_run else device_of(module))
    return Slot([], {BIAS: shift}, trainable=True).train(module.training)


def _weight(op: Any, dry_run: bool) -> torch.Tensor:
    """The canonical weight on the CPU, in fp32 or better."""
    if dry_run:
        return torch.empty(op.geometry.shape)
    W = present(op.module, lambda: op.weight().detach())
    return cast(torch.Tensor, W.to("cpu", wide_dtype(W.dtype)))


def _warn_adjusted(name: str, slots: Mapping[str, Mapping[str, Slot]]) -> None:
    """One warning for all layers whose blocks had to be of another size than the config says."""
    adjusted = {
        dotted(component, layer): part.spec.options["adjusted"]
        for component, of_component in slots.items()
        for layer, slot in of_component.items()
        for part in slot.parts
        if "adjusted" in part.spec.options
    }
    if adjusted:
        asked, used = next(iter(adjusted.values()))
        warnings.warn(
            f"adapter {name!r}: {asked} does not divide {len(adjusted)} layers, so the nearest number that does was taken "
            f"({used} for the first): {listed(adjusted, 5)}",
            ConfigWarning,
            stacklevel=5,
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
    choice = before.changed(layers, adapters, lambda strengths: {**strengths, **added})
    plan.set(mix, layers=layers, adapters=adapters, choice=choice)
    columns = torch.arange(len(layers), device="cpu").split(1)
    for layer, slot in slots.items():
        module, index = modules[layer], column[layer]
        old = plan.record_of(module)
        held = {**(old.slots if old else {}), adapter.name: slot}
        plan.carry(module, old.changed(slots=held) if old else Record(mix, columns[index].clone(), index, held))
    return mix


def detach(target: object, name: str) -> None:
    """Remove an adapter. With the last one every layer is what it was: class, keys and bytes."""
    parts = components(target)
    with planned(parts) as plan:
        plan_removed(plan, parts, {name})


def plan_removed(plan: Plan, parts: Mapping[str, nn.Module], names: set[str] | None) -> set[str]:
    """Plan to take adapters, or all of them, off every component that has them; their names. Raises UnknownNameError for a name that no component has."""
    walks = {component: adapted(model) for component, model in parts.items()}
    mixes = mixes_of(parts, walks)
    known = {name for mix in mixes.values() for name in mix.adapters}
    for name in sorted((names or set()) - known):
        raise UnknownNameError.of("adapter", name, known)
    going = known if names is None else names
    for component, mix in mixes.items():
        if going & {*mix.adapters}:
            _remove(plan, parts[component], mix, walks[component], going)
    return going


def _remove(plan: Plan, model: nn.Module, mix: Mix, walk: Walk, names: set[str]) -> None:
    """Plan to take adapters off a component. If one of them is in the weights, the weights become what they were."""
    check_idle(mix, names)
    before = plan.view(mix)
    out = bool(names & {*before.fused})
    adapters = {name: adapter for name, adapter in before.adapters.items() if name not in names}
    choice = before.changed(
        before.layers, adapters, lambda strengths: {n: s for n, s in strengths.items() if n not in names}
    )
    plan.set(mix, adapters=adapters, choice=choice if adapters else Choice(), fused={} if out else before.fused)
    plan_unlisted(plan, model, names, bool(adapters))
    plan.root(model, mix)
    within = within_pefts(model) if out else ()
    for layer, module, _ in walk:
        record = plan.record_of(module)
        if record is None or record.mix is not mix:
            continue
        weights = None
        if out and record.fused:
            record, weights = unfused(layer, module, record, within)
        remaining = record.without(names)
        if weights is not None or remaining is not record:
            refuse_foreign(layer, module)
            plan.carry(module, remaining, weights)


class Listed(dict[str, object]):
    """`peft_config` of a bare model: {adapter: its config}, which goes with the last adapter."""


def plan_listed(plan: Plan, model: nn.Module, name: str, config: object) -> None:
    """Plan an entry in `model.peft_config`, where transformers and diffusers look for a bare model's adapters."""
    configs = model.__dict__.get("peft_config")
    if not isinstance(configs, Listed):
        configs = Listed(configs or {})
        plan.set(model, peft_config=configs)
    plan.entry(configs, name, config)


def plan_unlisted(plan: Plan, model: nn.Module, names: Iterable[str], remain: bool) -> None:
    """Plan that adapters are no longer in `model.peft_config`; without any that `remain` it goes."""
    configs = model.__dict__.get("peft_config")
    if isinstance(configs, Listed):
        for name in names:
            plan.entry(configs, name)
        if not remain:
            plan.set(model, peft_config=ABSENT)


def refuse_foreign(layer: str, module: nn.Module) -> None:
    if "_diffpeft_base" not in type(module).__dict__:
        raise AdapterStateError(
            f"layer {shown(layer)} was given the class {type(module).__name__} by another library after the adapter",
            remedy="Undo that first.",
        )
