"""fuse and unfuse: adapters into the weights and out again, bit for bit.

A fused weight is always computed from the base as it was, in fp32, and rounded once; the base itself is kept, so nothing ever drifts.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from diffpeft.errors import AdapterStateError, ConfigError, UnknownNameError, shown
from diffpeft.layers.adapted import Record, weights_of
from diffpeft.layers.patches import Patches
from diffpeft.layers.site import STORING_HOOKS, diffusers_hooks, site_of
from diffpeft.layers.slot import Slot
from diffpeft.layers.whole import Put, copied, copies_of
from diffpeft.model.attach import mixes_of
from diffpeft.model.mix import Choice, Mix
from diffpeft.model.plan import Plan, planned
from diffpeft.model.schedule import Schedule
from diffpeft.model.target import adapted_layers, components, modules_of
from diffpeft.model.tied import count_twins_once, spread
from diffpeft.model.weights import Scratch, fused_weights, refuse_changed, sampled, unfit, unfused


def fuse(target: Any, names: str | Sequence[str] | None = None, keep_base: str = "cpu") -> None:
    """Put active adapters into the weights at their present strengths, so that they cost nothing any more.

    Args:
        names: which, all active ones by default. They must come first in the activation order, or commute with what they are put before.
        keep_base: "cpu": the weights that are replaced are kept in main memory (their size again; on a CPU nothing is copied) for `unfuse`.
            "none": they are not, and the adapters stay in for good.

    Other active adapters keep acting on top. Raises UnknownNameError, AdapterStateError (an order that does not commute; quantised, offloaded or
    tied weights) or NonFiniteError, in which case nothing has changed.
    """
    if keep_base not in ("cpu", "none"):
        raise ConfigError(f"keep_base is {shown(keep_base)}", remedy="It is 'cpu' or 'none'.")
    parts = components(target)
    with planned(parts) as plan:
        plan_fused(plan, parts, names, keep_base)


def plan_fused(
    plan: Plan, parts: Mapping[str, nn.Module], names: str | Sequence[str] | None = None, keep_base: str = "cpu"
) -> None:
    """Plan what `fuse` does. Raises what it raises."""
    mixes = mixes_of(parts)
    before = {component: plan.view(mix) for component, mix in mixes.items()}
    chosen = _chosen(names, before)
    idle = True
    for component, mix in mixes.items():
        now = before[component]
        refuse_changing(now, chosen)
        given = {n: now.choice.given[n] for n in now.choice.order if n in chosen and n not in now.fused}
        if given:
            _plan_component(plan, parts[component], mix, [*now.fused, *given], keep_base)
            plan.set(mix, fused={**now.fused, **given})
            idle = False
    if idle:
        warnings.warn(f"nothing to do: {', '.join(sorted(chosen))} fused already", stacklevel=3)


def unfuse(target: Any) -> None:
    """Take all fused adapters out of the weights again, to the last bit; they stay active. With nothing fused it does nothing.

    Raises AdapterStateError if the base was not kept.
    """
    parts = components(target)
    with planned(parts) as plan:
        plan_unfused(plan, parts)


def plan_unfused(plan: Plan, parts: Mapping[str, nn.Module]) -> None:
    """Plan to restore the weights of these components."""
    for component, mix in mixes_of(parts).items():
        if not mix.fused:
            continue
        for layer, module in adapted_layers(parts[component]).items():
            record = plan.record_of(module)
            if record is not None and record.fused:
                plan.adapt(module, *unfused(layer, module, record))
        for module, patches in _patched(parts[component], mix):
            bare, puts = patches.unfused(module)
            plan.carry(module, bare)
            plan.put(puts)
        plan.set(mix, fused={})


def _chosen(names: str | Sequence[str] | None, mixes: Mapping[str, Mix]) -> set[str]:
    active = {n for mix in mixes.values() for n in mix.choice.order}
    known = {n for mix in mixes.values() for n in mix.adapters}
    wanted = active if names is None else {names} if isinstance(names, str) else set(names)
    for name in sorted(wanted - known):
        raise UnknownNameError.of("adapter", name, known)
    for name in sorted(wanted - active):
        raise AdapterStateError(f"adapter {shown(name)} is not active", remedy="Activate it with set_adapters first.")
    if not wanted:
        raise AdapterStateError(
            "there is no active adapter to fuse", remedy="Load one, or activate it with set_adapters."
        )
    return wanted


def refuse_changing(mix: Mix, names: set[str]) -> None:
    """Raise AdapterStateError if there is no one strength to fuse at."""
    if mix.choice.rows:
        raise AdapterStateError(
            "a list of mixes is set, one a prompt, and weights are the same for all rows",
            remedy="Call set_adapters with one mix first.",
        )
    for name in mix.choice.order:
        if name in names and any(isinstance(level, Schedule) for level in mix.choice.levels[name]):
            raise AdapterStateError(
                f"the strength of adapter {shown(name)} is a schedule, and weights are the same in all steps",
                remedy="Call set_adapters with a number first.",
            )


def _plan_component(plan: Plan, model: nn.Module, mix: Mix, names: Sequence[str], keep_base: str) -> None:
    """Plan the weights of one component with exactly `names` in them."""
    refuse_hooked(model)
    owners, scratch, adapted = owners_of(model), Scratch(), adapted_layers(model)
    choice = plan.view(mix).choice
    count_twins_once(adapted, owners)
    shared: dict[int, Tensor] = {}
    for layer, module in adapted.items():
        record = plan.record_of(module)
        assert record is not None
        fused = [n for n in names if n in record.slots]
        if not set(fused) - record.fused:
            continue
        check_order(layer, record, fused, choice)
        refuse_unfit(layer, module, owners)
        if record.fused and record.base is None:
            raise AdapterStateError(
                f"layer {shown(layer)} was fused with keep_base='none'",
                remedy="Fuse all adapters at once, or keep the base.",
            )
        steps: list[tuple[Slot, float]] = [
            (record.slots[n], s) for n in fused if (s := choice.strengths[n][record.index])
        ]
        refuse_changed(layer, module, record)
        base = record.base or weights_of(module)
        W, bias = fused_weights(layer, module, base, steps, scratch)
        weights = shared.setdefault(id(module.weight), W), bias
        kept_base = (base[0].to("cpu"), None if base[1] is None else base[1].to("cpu")) if keep_base == "cpu" else None
        plan.adapt(module, replace(record, fused=frozenset(fused), base=kept_base, sample=sampled(weights)), weights)
    _plan_patches(plan, _patched(model, mix), names, choice, keep_base == "cpu", owners)


def _plan_patches(
    plan: Plan,
    patched: Sequence[tuple[nn.Module, Patches]],
    names: Sequence[str],
    choice: Choice,
    keep: bool,
    owners: dict[int, int],
) -> None:
    """Plan the parameters of modules with exactly `names` of their patches in them."""
    changed: list[tuple[nn.Module, Patches]] = []
    puts: list[Put] = []
    for module, patches in patched:
        fused = [n for n in names if n in patches.modules]
        if set(fused) - patches.fused:
            with_them, new = patches.with_fused(module, fused, keep, choice)
            changed.append((module, with_them))
            puts += new
    parted = spread(plan, puts, owners)
    for module, patches in changed:
        plan.carry(module, patches.apart(module, parted))


def _patched(model: nn.Module, mix: Mix) -> list[tuple[nn.Module, Patches]]:
    """The modules whose parameters adapters change."""
    carried = ((module, copies_of(module)) for module, _ in modules_of(model, copied).values())
    return [(module, copies) for module, copies in carried if isinstance(copies, Patches) and copies.mix is mix]


def check_order(layer: str, record: Record, fused: Sequence[str], choice: Choice) -> None:
    """Raise AdapterStateError unless fusing `fused` gives what the order of `choice` says."""
    order = [n for n in choice.order if n in record.slots]
    if order[: len(fused)] == list(fused):
        return
    last = max((order.index(n) for n in fused if n in order), default=-1)
    movable = [n for n in {*order[: last + 1], *fused}]
    stuck = [n for n in movable if not all(part.additive for part in record.slots[n].parts)]
    if stuck:
        raise AdapterStateError(
            f"on layer {shown(layer)} the adapters {', '.join(order)} act in this order, and {shown(stuck[0])} does not commute",
            remedy="Fuse them from the first on, or all of them.",
        )


def owners_of(model: nn.Module) -> dict[int, int]:
    """How many modules hold each parameter, by its id."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                owners[id(p)] = owners.get(id(p), 0) + 1
    return owners


def refuse_hooked(model: nn.Module) -> None:
    """Raise AdapterStateError if diffusers' hooks keep a model's weights elsewhere, or in another dtype, between calls."""
    for name, module in model.named_modules():
        hooks = STORING_HOOKS & {*diffusers_hooks(module)}
        if hooks:
            raise unfit(name, f"diffusers' {min(hooks).replace('_', ' ')} holds its weight")


def refuse_unfit(layer: str, module: Any, owners: Mapping[int, int]) -> None:
    """Raise AdapterStateError for a layer whose weight cannot take anything in. `owners` as `owners_of` gives them."""
    site = site_of(type(module))
    assert site is not None
    why = ""
    if site.quantised:
        why = "its weight is quantised, and rounding it again would lose more than the adapter adds"
    elif hasattr(module, "_hf_hook") or module.weight.is_meta:
        why = "its weight is offloaded"
    elif owners.get(id(module.weight), 0) > 1:
        why = "its weight is tied to another layer's"
    elif not isinstance(module.weight, nn.Parameter) or type(module.weight.data) is not Tensor:
        why = "its weight is sharded or of a kind that is not known here"
    if why:
        raise unfit(layer, why)
