"""merge_for_good: adapters into the weights, and no adapter any more.

Unlike `fuse` there is no way back, so nothing is kept: each layer ends as what it was before its first adapter, with other numbers. A quantised weight
has too few levels to take an adapter in; its layer is replaced by a plain one where the caller says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from diffpeft.bundle import dotted
from diffpeft.errors import AdapterStateError, UnknownNameError, shown
from diffpeft.layers.backends import Backend, backend_of
from diffpeft.layers.carried import Copy, Parameters, Record, Step, bare, effective, op_of
from diffpeft.layers.patches import Patch
from diffpeft.layers.sites import parameter_names, site_of
from diffpeft.layers.slot import Slot
from diffpeft.methods.linalg import is_finite
from diffpeft.model.attach import Walk, mixes_of, plan_unlisted, refuse_foreign
from diffpeft.model.fuse import check_order, is_tied, owners_of, refuse_changing, refuse_hooked, refuse_unfit
from diffpeft.model.mix import Choice, Mix, check_idle, choose
from diffpeft.model.plan import Plan, Put, planned
from diffpeft.model.target import adapted, components
from diffpeft.model.tied import count_twins_once, spread
from diffpeft.model.weights import based, computed_in, no_bias, not_finite, refuse_changed, unfit, unfused


def merge_for_good(
    model: nn.Module, names: str | Sequence[str] | None = None, *, dequantize: bool = False, safe: bool = False
) -> dict[str, float]:
    """Put adapters into the weights at their present strengths, in activation order, and take every adapter off, merged or not.

    Args:
        model: a module, or a pipeline.
        names: which, all active ones by default. One that is not active is merged at strength 1, after those that are.
        dequantize: replace quantised layers that an adapter goes into by plain linear ones with the dequantised weight. They get the dtype that most of
            the model's other parameters have, as activations do; where there are none, the dtype the layer computes in.
        safe: PEFT's word for refusing values that are not finite, which happens always.

    Parameters stay the same objects, except those of quantised layers, whose layers are replaced in every module that holds them.
    Adapters that are fused already are counted once: the merge starts from the base that `fuse` kept, or where it kept none from what is there.

    Returns {layer: relative error}: the Frobenius norm of (weight as stored - exact merge), divided by that of the exact merge, which is
    computed in fp32 from the weight that the merge starts from. Raises UnknownNameError, AdapterStateError or NonFiniteError, in which case nothing
    has changed.
    """
    parts = components(model)
    with planned(parts) as plan:
        return plan_merged(plan, parts, names, dequantize=dequantize)


def plan_merged(
    plan: Plan,
    parts: Mapping[str, nn.Module],
    names: str | Sequence[str] | None = None,
    *,
    dequantize: bool = False,
    untie: bool = False,
) -> dict[str, float]:
    """Plan `merge_for_good` of these components. `untie`: layers that share their weight get one of their own. -> the relative error of each layer."""
    walks = {component: adapted(part) for component, part in parts.items()}
    mixes = mixes_of(parts, walks)
    known = {n for mix in mixes.values() for n in mix.adapters}
    wanted = None if names is None else [names] if isinstance(names, str) else list(names)
    for name in wanted or ():
        if name not in known:
            raise UnknownNameError.of("adapter", name, known)
    errors: dict[str, float] = {}
    for component, mix in mixes.items():
        merger = _merger(parts[component], plan.view(mix), wanted, dequantize, untie)
        count_twins_once(walks[component], merger.owners)
        of_layers = merger.plan_all(plan, [carried for carried in walks[component] if carried[2].mix is mix])
        errors |= {dotted(component, layer): error for layer, error in of_layers.items()}
        plan.set(mix, adapters={}, choice=Choice(), fused={})
        plan_unlisted(plan, parts[component], mix.adapters, False)
        plan.root(parts[component], mix)
    return errors


@dataclass
class _Merger:
    """One component: what goes into its weights, in which order, and what has to be known for that."""

    model: nn.Module
    choice: Choice  # with the chosen adapters alone
    dequantize: bool
    untie: bool
    owners: dict[int, int]
    shared: dict[int, torch.Tensor]  # the new numbers of weights, by the parameter's id: layers may share one
    dtype: torch.dtype | None  # of plain layers in place of quantised ones
    puts: list[Put] = field(default_factory=list)  # of what may be shared, and be parted

    def plan_all(self, plan: Plan, walk: Walk) -> dict[str, float]:
        """Plan to make modules plain. -> the relative error of each layer."""
        errors: dict[str, float] = {}
        for only_slots in (False, True):  # what may be parted from others first: then layers' weights are their own
            for layer, module, record in walk:
                if only_slots == bool(record.copies or record.patches):
                    continue
                error = self.plan(plan, layer, module, record)
                if error is not None:
                    errors[layer] = error
            spread(plan, self.puts, self.owners)
            self.puts.clear()
        return errors

    def plan(self, plan: Plan, layer: str, module: nn.Module, record: Record) -> float | None:
        """Plan to make a module plain. The relative error of a layer's weight, or None if no slot goes into it."""
        refuse_foreign(layer, module)
        inside = [n for n in self.choice.order if n in record.names]
        steps = record.steps(self.choice)
        if steps and isinstance(steps[0][0], Copy):
            return self._taken(plan, layer, module, steps)
        if not (record.slots.keys() | record.patches.keys()) & {*inside}:
            plan.carry(module, None, unfused(layer, module, record)[1] if record.fused else None)
            return None
        return self._merge(plan, layer, module, record, inside)

    def _merge(self, plan: Plan, layer: str, module: nn.Module, record: Record, inside: Sequence[str]) -> float | None:
        """Plan to put slots and patches of the adapters `inside` into a module's parameters. -> as `plan`."""
        base, steps = self._start(layer, module, record, inside)
        slots, backend = record.slots.keys() & {*inside}, backend_of(module)
        if slots and backend is not None:
            if not self.dequantize:
                raise AdapterStateError(
                    f"layer {shown(layer)} cannot be merged: its weight is quantised, and rounding it again would lose more than the adapter adds",
                    remedy="Pass dequantize=True to get a plain layer, or leave the adapter unmerged; it acts all the same.",
                )
            return self._replace(plan, layer, module, backend, steps)
        error = self._direct(plan, layer, module, record, base, steps)
        return error if slots else None

    def _direct(
        self, plan: Plan, layer: str, module: nn.Module, record: Record, base: Parameters, steps: Sequence[Step]
    ) -> float | None:
        """Plan to give a module the numbers that its adapters make of `base`. -> the relative error of its weight."""
        refuse_unfit(layer, module, record, self.owners, self.untie)
        like = {name: module._parameters[name].data for name in base}  # type: ignore[union-attr]
        weights, error = _merged(layer, module, base, like, steps)
        if record.patches or is_tied(module, record, self.owners):
            plan.carry(module, None)
            self.puts += [(module._parameters, name, t) for name, t in weights.items()]
        else:
            name = parameter_names(module)[0]
            weights[name] = self.shared.setdefault(id(module._parameters[name]), weights[name])
            plan.carry(module, None, weights)
        return error

    def _taken(self, plan: Plan, layer: str, module: nn.Module, steps: Sequence[Step]) -> float | None:
        """Plan to give a module the numbers of its acting copy, with what acts after that in them."""
        copy: Any = steps[0][0]
        plan.carry(module, None)
        self.puts += [
            (table, name, theirs[name].data)
            for inner, other in zip(bare(module).modules(), copy.module.modules(), strict=True)
            for table, theirs in ((inner._parameters, other._parameters), (inner._buffers, other._buffers))
            for name, tensor in table.items()
            if tensor is not None
        ]
        if len(steps) == 1:
            return None
        names = dict.fromkeys(
            n for held, _ in steps[1:] for n in (held.names if isinstance(held, Patch) else parameter_names(module))
        )
        base = {n: p.data for n in names if (p := copy.module._parameters.get(n)) is not None}
        weights, error = _merged(layer, module, base, base, steps[1:])
        self.puts += [(module._parameters, name, t) for name, t in weights.items()]
        return error

    def _start(
        self, layer: str, module: nn.Module, record: Record, inside: Sequence[str]
    ) -> tuple[Parameters, list[Step]]:
        """The parameters to start from, and what is not in them, with its strengths."""
        if record.patches:  # of which there may be no numbers
            refuse_unfit(layer, module, record, self.owners)
        if not record.fused or record.base is not None:
            if record.fused:
                refuse_changed(layer, module, record)
            return based(module, record), record.steps(self.choice, inside)
        out = sorted(record.fused - {*inside})
        if out:
            raise AdapterStateError(
                f"on layer {shown(layer)} the adapter {shown(out[0])} is in the weight for good (keep_base='none')",
                remedy="Merge it too.",
            )
        check_order(layer, record, [n for n in inside if n in record.fused], self.choice)
        return based(module, record), record.steps(self.choice, [n for n in inside if n not in record.fused])

    def _replace(self, plan: Plan, layer: str, module: Any, backend: Backend, steps: Sequence[Step]) -> float:
        """Plan to put a plain layer in place of a quantised one, wherever the model holds it."""
        if "_hf_hook" in vars(module):
            raise unfit(layer, "its weight is offloaded")
        if self.owners[id(module.weight)] > 1:
            raise unfit(layer, "its weight is tied to another layer's")
        places = [(m._modules, key) for m in self.model.modules() for key, c in m._modules.items() if c is module]
        if not places:
            raise unfit(layer, "it is the whole model, and has to be replaced in the module that holds it")
        with torch.no_grad():
            base = {"weight": op_of(module).weight(), **({} if module.bias is None else {"bias": module.bias.data})}
        plain = backend.plain(module, self.dtype or backend.computes_in(module), base["weight"].device)
        site: Any = site_of(type(plain))
        like = {"weight": site(plain).canonical(plain.weight), **({} if plain.bias is None else {"bias": plain.bias})}
        weights, error = _merged(layer, module, base, like, steps)
        plain.weight = nn.Parameter(site(plain).stored(weights["weight"]).contiguous(), requires_grad=False)
        if "bias" in weights:
            plain.bias = nn.Parameter(weights["bias"], requires_grad=module.bias.requires_grad)
        plan.carry(module, None)
        for table, key in places:
            plan.entry(table, key, plain)
        return error


def _merger(model: nn.Module, mix: Mix, names: Sequence[str] | None, dequantize: bool, untie: bool) -> _Merger:
    check_idle(mix, mix.adapters)
    active = mix.choice.order
    chosen = {*active} if names is None else {*names}
    refuse_changing(mix, chosen)
    strengths: dict[str, Any] = {}
    if not mix.choice.rows:
        strengths = {n: mix.choice.given[n] for n in active if n in chosen}
    strengths |= {n: 1.0 for n in names or () if n in mix.adapters and n not in strengths}
    choice = choose(mix.component, mix.layers, mix.adapters, strengths)
    refuse_hooked(model)
    return _Merger(model, choice, dequantize, untie, owners_of(model), {}, _activations(model))


def _merged(
    layer: str, module: nn.Module, base: Parameters, like: Parameters, steps: Sequence[Step]
) -> tuple[Parameters, float]:
    """Parameters computed from `base` in fp32 or better and rounded once, in the dtype and layout of `like`; and the relative error of the first."""
    with torch.no_grad():
        start = {name: t.to(like[name].device) for name, t in base.items()}
        dtype = computed_in(base)
        exact = effective(module, steps, dtype, start)
        if exact.keys() - like.keys():
            raise no_bias(layer, steps)
        stored = {name: torch.empty_like(t).copy_(exact[name]) for name, t in like.items()}
        for name, t in stored.items():
            if not is_finite(t):
                raise not_finite(layer, module, steps, name, t.dtype)
        name, W = next(iter(exact.items()))
        W = W.to(dtype)
        error = torch.linalg.vector_norm(stored[name].to(W) - W) / torch.linalg.vector_norm(W).clamp_min(1e-30)
    return stored, float(error)


def _activations(model: nn.Module) -> torch.dtype | None:
    """The dtype that most parameters have that are neither an adapter's nor in quantised layers: that of the activations."""
    dtypes: Counter[torch.dtype] = Counter()
    for module in model.modules():
        if not isinstance(module, Slot) and backend_of(module) is None:
            dtypes.update(p.dtype for p in module._parameters.values() if p is not None and p.is_floating_point())
    return dtypes.most_common(1)[0][0] if dtypes else None
