"""fuse and unfuse: adapters into the weights and out again, bit for bit.

A fused weight is always computed from the base as it was, in fp32, and rounded once; the base itself is kept, so nothing ever drifts.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diffpeft.errors import AdapterStateError, ConfigError, NonFiniteError, UnknownNameError, shown
from diffpeft.layers.adapted import Record, Weights, base_class, effective, record_of, state_with, weights_of
from diffpeft.layers.patches import Patches
from diffpeft.layers.site import ConvSite, LinearSite, site_of
from diffpeft.layers.slot import Slot
from diffpeft.layers.whole import Put, copied, copies_of
from diffpeft.methods.lora import Lora
from diffpeft.model.attach import Plan, mixes_of, unfused
from diffpeft.model.lock import exclusive
from diffpeft.model.mix import Choice, Mix
from diffpeft.model.schedule import Schedule
from diffpeft.model.target import adapted_layers, components, modules_of
from diffpeft.model.tied import spread

SOME = 1 << 19  # numbers that are cheap to find memory for


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
    with exclusive(parts):
        mixes = mixes_of(parts)
        chosen = _chosen(names, mixes)
        plan = Plan()
        for component, mix in mixes.items():
            refuse_changing(mix, chosen)
            given = {n: mix.choice.given[n] for n in mix.choice.order if n in chosen and n not in mix.fused}
            if given:
                _plan_component(plan, parts[component], mix, [*mix.fused, *given], keep_base)
                plan.mixes.append((mix, {"fused": {**mix.fused, **given}}))
        if not plan.layers and not plan.wholes:
            warnings.warn(f"nothing to do: {', '.join(sorted(chosen))} fused already", stacklevel=2)
        plan.commit()


def unfuse(target: Any) -> None:
    """Take all fused adapters out of the weights again, to the last bit; they stay active. With nothing fused it does nothing.

    Raises AdapterStateError if the base was not kept.
    """
    parts = components(target)
    with exclusive(parts):
        plan = Plan()
        for component, mix in mixes_of(parts).items():
            plan_unfused(plan, parts[component], mix)
        plan.commit()


def plan_unfused(plan: Plan, model: nn.Module, mix: Mix) -> None:
    """Plan to restore the weights of a component."""
    if not mix.fused:
        return
    for layer, module in adapted_layers(model).items():
        record = record_of(module)
        if record is not None and record.fused:
            plan.layers.append((module, state_with(module, *unfused(layer, module, record))))
    for module, own in _patched(model, mix):
        plan.wholes.append((module, (bare := own.unfused(module))[0]))
        plan.put(bare[1])
    plan.mixes.append((mix, {"fused": {}}))


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
    owners, scratch = owners_of(model), Scratch()
    for layer, module in adapted_layers(model).items():
        record = record_of(module)
        assert record is not None
        own = [n for n in names if n in record.slots]
        if not set(own) - record.fused:
            continue
        check_order(layer, record, own, mix.choice)
        refuse_unfit(layer, module, owners)
        if record.fused and record.base is None:
            raise AdapterStateError(
                f"layer {shown(layer)} was fused with keep_base='none'",
                remedy="Fuse all adapters at once, or keep the base.",
            )
        steps: list[tuple[Slot, float]] = [
            (record.slots[n], s) for n in own if (s := mix.choice.strengths[n][record.index])
        ]
        now = weights_of(module)
        base = record.base or now
        weights = _fused(layer, module, base, steps, scratch)
        kept = (_on_cpu(base[0]), _on_cpu(base[1])) if keep_base == "cpu" else None
        plan.layers.append((module, state_with(module, replace(record, fused=frozenset(own), base=kept), weights)))
    fused: list[tuple[nn.Module, Patches]] = []
    puts: list[Put] = []
    for module, patches in _patched(model, mix):
        own = [n for n in names if n in patches.modules]
        if set(own) - patches.fused:
            now_fused, new = patches.with_fused(module, own, keep_base == "cpu")
            fused.append((module, now_fused))
            puts += new
    parted = spread(plan, puts, owners)
    plan.wholes += [(module, patches.apart(module, parted)) for module, patches in fused]


def _patched(model: nn.Module, mix: Mix) -> list[tuple[nn.Module, Patches]]:
    """The modules whose parameters adapters change."""
    found = ((module, copies_of(module)) for module, _ in modules_of(model, copied).values())
    return [(module, own) for module, own in found if isinstance(own, Patches) and own.mix is mix]


def _on_cpu(t: Any) -> Any:
    return None if t is None else t.to("cpu")


def _fused(layer: str, module: Any, base: Weights, steps: Sequence[tuple[Slot, float]], scratch: Scratch) -> Weights:
    """Weights computed from `base` in fp32 or better and rounded once, in the present dtype."""
    weight, bias = weights_of(module)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad():
        own = base[0].to(weight.device), None if base[1] is None else base[1].to(weight.device)
        rows = _by_rows(module, steps, dtype, own[0], scratch)
        W, b = effective(module, steps, dtype, own) if rows is None else (rows, own[1])
    if b is not None and bias is None:
        raise unfit(layer, "an adapter adds a bias and the layer has none")
    out = (
        W.to(weight.dtype).contiguous(memory_format=torch.preserve_format),
        None if b is None or bias is None else b.to(bias),
    )
    if not all(t is None or bool(torch.stack(t.aminmax()).isfinite().all()) for t in out):  # NaN is either's
        raise NonFiniteError(
            f"layer {shown(layer)} would get weights that are not finite",
            remedy="An adapter is broken, or too strong for the dtype.",
        )
    return (out[0].clone() if out[0].data_ptr() == base[0].data_ptr() else out[0]), out[1]


class Scratch:
    """Memory for a block of rows, twice, used for all layers: new memory costs more than the arithmetic."""

    def __init__(self) -> None:
        self.held = torch.empty(0)

    def pair(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[2, rows, columns], with anything in it."""
        n = 2 * rows * columns
        if self.held.numel() < n or (self.held.dtype, self.held.device) != (dtype, device):
            self.held = torch.empty(n, dtype=dtype, device=device)
        return self.held[:n].view(2, rows, columns)


def _by_rows(
    module: Any, steps: Sequence[tuple[Slot, float]], dtype: torch.dtype, weight: Tensor, scratch: Scratch
) -> Tensor | None:
    """The weight of a large layer with plain LoRAs in it, some rows at a time. None for other layers."""
    plain = all(
        slot.parts and slot.parts[0].method is Lora and {*slot.tensors} == {"lora_A", "lora_B"} for slot, _ in steps
    )
    if weight.numel() < SOME or not plain or site_of(base_class(module)) not in (LinearSite, ConvSite):
        return None
    factors = [slot(_factors, dtype, s) for slot, s in steps]
    A, B = torch.cat([A for A, _ in factors]), torch.cat([B for _, B in factors], 1)
    out, some = torch.empty_like(weight), max(1, SOME * len(weight) // weight.numel())
    now, then = scratch.pair(some, weight[0].numel(), dtype, weight.device)
    for a in range(0, len(weight), some):
        rows = weight[a : a + some].flatten(1)
        W = torch.addmm(now[: len(rows)].copy_(rows), B[a : a + some], A, out=then[: len(rows)])
        out[a : a + some] = W.reshape(out[a : a + some].shape)
    return out


def _factors(slot: Slot, dtype: torch.dtype, strength: float) -> tuple[Tensor, Tensor]:
    """A [r, in * k] and B [out, r] of a LoRA, whose product is what it adds at a strength."""
    part = slot.parts[0]
    p, method = slot.prepared(part, dtype), part.method
    A, B = method.factors(p, part.spec)
    return A.flatten(1), B.flatten(1) * (method.scale(p, part.spec) * strength)


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
        found = _HOOKS & {*getattr(vars(module).get("_diffusers_hook"), "hooks", ())}
        if found:
            raise unfit(name, f"diffusers' {sorted(found)[0].replace('_', ' ')} holds its weight")


_HOOKS = frozenset({"group_offloading", "layerwise_casting", "lazy_prefetch_group_offloading"})


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


def unfit(layer: str, why: str) -> AdapterStateError:
    """The error for a layer that cannot be fused."""
    return AdapterStateError(
        f"layer {shown(layer)} cannot be fused: {why}", remedy="Leave the adapter unfused; it acts all the same."
    )
