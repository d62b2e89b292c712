"""Adapters into others: any method as a LoRA, and several adapters as one.

Both work on effective deltas: what an adapter adds to the layer's own weight at strength 1, whatever its method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from diffpeft.bundle import dotted
from diffpeft.errors import AdapterStateError, ConfigError, UnknownNameError, shown
from diffpeft.layers.carried import base_class, op_of, record_of, weights_of
from diffpeft.layers.chain import Base, Whole, factors_of
from diffpeft.layers.hooks import device_of, present
from diffpeft.layers.sites import site_of
from diffpeft.layers.slot import BIAS, Piece, Slot, at_rest
from diffpeft.methods import Lora, Spec
from diffpeft.methods.config import check_choice, check_rank, is_fp32
from diffpeft.methods.linalg import wide_dtype
from diffpeft.methods.lowrank import Pair, full_rank, shortened
from diffpeft.methods.merging import HOW, merged
from diffpeft.model.attach import install, mixes_of, refuse_duplicate
from diffpeft.model.mix import Adapter, Mix, check_idle, check_name
from diffpeft.model.plan import Plan, planned
from diffpeft.model.room import plan_slots
from diffpeft.model.target import adapted, adapted_layers, components
from diffpeft.readable import Residuals


@dataclass(frozen=True)
class Update:
    """What one adapter does to one layer: its delta [out, columns], the factors if it has exact ones, its rank, and the change of the bias."""

    delta: Tensor
    factors: Pair | None
    rank: int
    shift: Tensor | None


def to_lora(
    target: object, adapter: str, *, name: str | None = None, rank: int | None = None, energy: float | None = None
) -> Residuals:
    """Turn an adapter of any method into a LoRA. -> {layer: Frobenius norm of what is lost / of the delta}.

    Args:
        name: of the LoRA, which is added inactive; without it the adapter itself becomes one, and stays as active as it was.
        rank: the most ranks that a layer gets: where an exact form has more, the largest singular values are kept.
        energy: instead of rank: the share, in (0, 1], of each delta's squared norm that is kept.

    Without rank and energy the form is exact: LoHa as its Khatri-Rao product of rank r^2, LoKr and Tucker by their factors, others at full rank.
    A method that depends on the weight before it (DoRA, OFT, BOFT) is taken as it acts on the layer's own weight. What changes a norm, or nothing
    but a bias, stays that.
    Raises UnknownNameError, AdapterStateError or ConfigError, in which case nothing has changed.
    """
    if rank is not None:
        check_rank("rank", rank)
    if energy is not None and (rank is not None or not isinstance(energy, (int, float)) or not 0 < energy <= 1):
        raise ConfigError(f"energy is {energy!r}", remedy="It is a share above 0 and at most 1, given instead of rank.")
    parts = components(target)
    with planned(parts) as plan:
        return _plan_lora(plan, parts, adapter, name, rank, energy)


def _plan_lora(
    plan: Plan,
    parts: Mapping[str, nn.Module],
    adapter: str,
    name: str | None,
    rank: int | None,
    energy: float | None,
) -> Residuals:
    mixes = mixes_of(parts)
    _known([adapter], mixes)
    if name is not None:
        _check_new(name, mixes)
    residuals = Residuals()
    for component, mix in mixes.items():
        if adapter not in mix.adapters:
            continue
        slots = {}
        for layer, module, old in _slots(parts[component], adapter):
            update = update_of(module, old)
            factors = update.factors if update.factors is not None else full_rank(update.delta)
            if len(factors[0]) and (rank is not None or energy is not None):
                factors = shortened(factors, rank, energy)
            residuals[dotted(component, layer)] = _residual(update.delta, factors)
            slots[layer] = _lora(module, factors, update.shift, old.weight.requires_grad)
        if name is None:
            _plan_replaced(plan, parts[component], mix, adapter, slots)
        else:
            _plan_added(plan, parts[component], component, mix, name, slots)
    return residuals


def combine(
    target: object,
    weights: Mapping[str, float],
    *,
    name: str,
    how: str = "cat",
    rank: int | None = None,
    density: float = 0.5,
    majority_sign: str = "total",
) -> Residuals:
    """Merge adapters of any methods into a new LoRA, which is added inactive. -> {layer: norm of what is lost / of the sum}.

    Args:
        weights: {adapter: weight}; a weight may be negative.
        how: "cat": factors side by side, exact. "linear": the sum at its full rank, exact. "svd": the sum cut to `rank`. "ties", "dare",
            "dare_ties", "magnitude": entries of each delta left out (and signs elected) before the sum is cut to `rank`.
        rank: default for those that cut: the largest rank among the adapters on a layer.
        density: the share of entries that "ties", "dare", "dare_ties" and "magnitude" keep.
        majority_sign: how TIES elects a sign: by the "total" of the values or the "frequency" of the signs.

    Raises UnknownNameError, AdapterStateError or ConfigError, in which case nothing has changed.
    """
    check_choice("how", how, ("cat", *HOW))
    check_choice("majority_sign", majority_sign, ("total", "frequency"))
    if rank is not None:
        check_rank("rank", rank)
    if not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise ConfigError(f"density is {density!r}", remedy="It is a share above 0 and at most 1.")
    parts = components(target)
    with planned(parts) as plan:
        slots, residuals = combined(
            parts, weights, name, lambda updates: _combined(how, updates, rank, density, majority_sign)
        )
        for component, mix in mixes_of(parts).items():
            if slots[component]:
                _plan_added(plan, parts[component], component, mix, name, slots[component])
    return residuals


Updates = list[tuple[float, Update]]  # of one layer, with their weights


def exact_sum(updates: Updates) -> tuple[Pair, Tensor]:
    """The factors of a sum, side by side."""
    return _combined("cat", updates, None, 1, "total")


def combined(
    parts: Mapping[str, nn.Module],
    weights: Mapping[str, float],
    name: str,
    put_together: Callable[[Updates], tuple[Pair, Tensor]],
) -> tuple[dict[str, dict[str, Slot]], Residuals]:
    """Frozen slots of a new LoRA, by component and layer, that is made of others, and {layer: norm of what is lost / of the sum}.

    Raises UnknownNameError, AdapterStateError or ConfigError.
    """
    for adapter, weight in weights.items():
        if not is_fp32(weight):
            raise ConfigError(
                f"the weight of {shown(adapter)} is {shown(weight)}", remedy="A weight is a finite number."
            )
    if not weights:
        raise ConfigError("weights is empty", remedy="Give {adapter: weight}.")
    mixes = mixes_of(parts)
    _known(weights, mixes)
    _check_new(name, mixes)
    slots: dict[str, dict[str, Slot]] = {component: {} for component in mixes}
    residuals = Residuals()
    for component in mixes:
        for layer, (module, updates) in _updates(parts[component], weights).items():
            factors, total = put_together(updates)
            shifts = [w * u.shift for w, u in updates if u.shift is not None]
            shift = sum(shifts[1:], shifts[0]) if shifts else None
            residuals[dotted(component, layer)] = _residual(total, factors)
            slots[component][layer] = _lora(module, factors, shift, False)
    return slots, residuals


def _updates(model: nn.Module, weights: Mapping[str, float]) -> dict[str, tuple[nn.Module, Updates]]:
    """{layer: (its module, what adapters do to it, with their weights)}."""
    by_layer: dict[str, tuple[nn.Module, Updates]] = {}
    for adapter, weight in weights.items():
        for layer, module, slot in _slots(model, adapter):
            by_layer.setdefault(layer, (module, []))[1].append((weight, update_of(module, slot)))
    return by_layer


def _combined(how: str, updates: Updates, rank: int | None, density: float, majority_sign: str) -> tuple[Pair, Tensor]:
    """The factors for one layer, and the sum that they stand for."""
    weights, deltas = [w for w, _ in updates], [u.delta for _, u in updates]
    if how == "cat":
        total = merged("linear", deltas, weights, 1, majority_sign)
        pairs = [(w, u.factors or full_rank(u.delta)) for w, u in updates]
        factors = torch.cat([A for _, (A, _) in pairs]), torch.cat([w * B for w, (_, B) in pairs], 1)
        cut = factors if len(factors[0]) <= min(total.shape) else full_rank(total)
        return (cut if rank is None else shortened(cut, rank, None)), total
    total = merged(how, deltas, weights, density, majority_sign)
    if how == "linear" and rank is None:
        return full_rank(total), total
    return shortened(full_rank(total), rank or max(u.rank for _, u in updates), None), total


def _known(names: Iterable[str], mixes: Mapping[str, Mix]) -> None:
    known = {n for mix in mixes.values() for n in mix.adapters}
    for name in names:
        if name not in known:
            raise UnknownNameError.of("adapter", name, known)


def _check_new(name: str, mixes: Mapping[str, Mix]) -> None:
    check_name(name)
    refuse_duplicate(name, mixes.values())


def _slots(model: nn.Module, name: str) -> Iterable[tuple[str, nn.Module, Slot]]:
    """(layer, module, slot) of one adapter of a component."""
    return [(layer, module, record.slots[name]) for layer, module, record in adapted(model) if name in record.slots]


@torch.no_grad()
def update_of(module: nn.Module, slot: Slot) -> Update:
    """What an adapter does to a layer's own weight, in fp32 or better."""
    op, record = op_of(module), record_of(module)
    assert record is not None
    dtype = torch.float32
    for t in slot.parameters():
        dtype = torch.promote_types(dtype, wide_dtype(t.dtype))

    def read() -> Update:
        factors = _nothing(slot, op, dtype) if not slot.parts else factors_of(slot, dtype)
        if record.fused and record.base is None and not all(part.additive for part in slot.parts):
            raise AdapterStateError(
                "what the adapter does depends on the layer's own weight, which was fused with keep_base='none'",
                where=dotted(record.mix.component, record.mix.layers[record.index]),
                remedy="Load the model again to get its own weights.",
            )
        base = record.base if record.base is not None else weights_of(module)
        W = (op.weight() if op.backend else op.canonical(base[op.weight_name])).to(slot.weight.device, dtype)
        bias = base[op.bias_name].to(W) if op.bias_name in base else None
        whole = Whole(Base(op, None, dtype, {}, W), [(slot, 1.0)])
        delta = (whole.weight() - W).flatten(1) if factors is None else factors[1] @ factors[0]
        return Update(delta, factors, slot.rank, whole.shift(dtype, bias))

    with at_rest(slot):
        return present(module, lambda: cast(Update, slot(lambda _: read())))


def _nothing(slot: Slot, op: Any, dtype: torch.dtype) -> Pair:
    """Pair of rank 0, of a slot that changes nothing but the bias."""
    nothing = slot.weight.new_zeros(0, dtype=dtype)
    return nothing.view(0, op.geometry.columns), nothing.view(op.geometry.out, 0)


def _residual(delta: Tensor, factors: Pair) -> float:
    """|delta - B A| / |delta|, Frobenius; 0 for no delta."""
    norm = torch.linalg.norm(delta.double())
    return (
        float(torch.linalg.norm(delta.double() - factors[1].double() @ factors[0].double()) / norm) if norm > 0 else 0.0
    )


def _lora(module: nn.Module, factors: Pair, shift: Tensor | None, trainable: bool) -> Slot:
    """A LoRA of these factors, at scale 1; on a norm what they come to, and for no factors only the bias."""
    kind = site_of(base_class(module))
    assert kind is not None
    A, B = (t.detach().clone() for t in factors)
    spec = Spec(kind.geometry_of(module), float(len(A)))
    piece = Piece("lora", Lora.adopt({"lora_A": A, "lora_B": B}, spec), spec.alpha, spec)
    if not kind.targets:
        piece = Piece("norm", {"w_norm": (B @ A).flatten()}, None, replace(spec, alpha=None))
    beside = {} if shift is None else {BIAS: shift.detach().clone()}
    slot = Slot([piece] if len(A) else [], beside, trainable=trainable)
    return slot.to(device_of(module)).train(module.training)


def _plan_replaced(plan: Plan, model: nn.Module, mix: Mix, name: str, slots: Mapping[str, Slot]) -> None:
    """Plan to give an adapter other slots."""
    check_idle(mix, [name])
    if name in mix.fused:
        raise AdapterStateError(
            f"adapter {shown(name)} is fused", remedy="Call unfuse first, or give the LoRA a name=."
        )
    plan_slots(plan, model, name, slots)
    plan.root(model, mix)


def _plan_added(plan: Plan, model: nn.Module, component: str, mix: Mix, name: str, slots: Mapping[str, Slot]) -> None:
    """Plan a new adapter that is not active."""
    install(plan, component, adapted_layers(model), slots, mix, Adapter(name, tuple(slots)), None)
    plan.root(model, mix)
