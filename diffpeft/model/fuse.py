"""fuse and unfuse: adapters into the weights and out again, bit for bit.

A fused weight is always computed from the base as it was, in fp32, and rounded once; the base itself is kept, so nothing ever drifts.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffpeft.errors import AdapterStateError, AdapterStateWarning, ConfigError, UnknownNameError, shown
from diffpeft.layers.backends import backend_of
from diffpeft.layers.carried import Parameters, Record, Step
from diffpeft.layers.hooks import STORING_HOOKS, diffusers_hooks
from diffpeft.layers.patches import Patch, parametrised
from diffpeft.layers.sites import parameter_names
from diffpeft.layers.streaming import STREAMED
from diffpeft.model.arena import Arena
from diffpeft.model.attach import mixes_of
from diffpeft.model.mix import Choice, Mix
from diffpeft.model.plan import Plan, Put, planned
from diffpeft.model.schedule import Schedule
from diffpeft.model.target import adapted, components, within_pefts
from diffpeft.model.tied import count_twins_once, spread
from diffpeft.model.weights import (
    Rewritten,
    Scratch,
    based,
    bounded_sum,
    fused_weights,
    refuse_changed,
    sampled,
    touched,
    unfit,
    unfused,
)

log = logging.getLogger(__name__)


def fuse(target: object, names: str | Sequence[str] | None = None, keep_base: str = "cpu") -> None:
    """Put active adapters into the weights at their present strengths, so that they cost nothing any more.

    Args:
        names: which, all active ones by default. They must come first in the activation order, or commute with what they are put before.
        keep_base: "cpu": the weights that are replaced are kept in main memory (their size again; on a CPU nothing is copied) for `unfuse`.
            "none": they are not, and the adapters stay in for good: large layers are written where they lie, without new memory.

    Other active adapters keep acting on top. The memory of fused weights is kept from `unfuse` to the next `fuse`; it goes with the last adapter.
    Raises UnknownNameError, AdapterStateError (an order that does not commute; quantised, offloaded or
    tied weights) or NonFiniteError, in which case nothing has changed.
    """
    if keep_base not in ("cpu", "none"):
        raise ConfigError(f"keep_base is {shown(keep_base)}", remedy="It is 'cpu' or 'none'.")
    parts = components(target)
    with planned(parts) as plan:
        plan_fused(plan, parts, names, keep_base)
    log.info("fused %s", "all that are active" if names is None else names)


def plan_fused(
    plan: Plan,
    parts: Mapping[str, nn.Module],
    names: str | Sequence[str] | None = None,
    keep_base: str = "cpu",
    *,
    untie: bool = False,
) -> None:
    """Plan what `fuse` does; with `untie` layers that share their weight with another get one of their own while they are fused. Raises what `fuse` raises."""
    mixes = mixes_of(parts)
    before = {component: plan.view(mix) for component, mix in mixes.items()}
    chosen = _chosen(names, before)
    idle = True
    for component, mix in mixes.items():
        now = before[component]
        refuse_changing(now, chosen)
        fresh = {n: now.choice.given[n] for n in now.choice.order if n in chosen and n not in now.fused}
        if fresh:
            _plan_component(plan, parts[component], mix, [*now.fused, *fresh], keep_base, untie)
            plan.set(mix, fused={**now.fused, **fresh})
            idle = False
    if idle:
        warnings.warn(f"nothing to do: {', '.join(sorted(chosen))} fused already", AdapterStateWarning, stacklevel=3)


def plan_layer_fused(plan: Plan, model: nn.Module, mix: Mix, module: nn.Module, names: Sequence[str]) -> None:
    """Plan to put active adapters into the weight of one layer of a component. Raises what `fuse` raises."""
    now, record = plan.view(mix), plan.record_of(module)
    assert record is not None
    refuse_changing(now, set(names))
    refuse_hooked(module)
    fuser = _Fuser(plan, mix, now.choice, True, owners_of(model), set(), Arena(mix.arena), untie=True)
    job = fuser.job(record.where, module, [*(name for name in now.fused if name in record.fused), *names])
    if job is not None:
        fuser.plan_job(job)
    fuser.plan_patched()
    plan.set(mix, fused={**now.fused, **{name: now.choice.given[name] for name in names}}, arena=fuser.arena)


def unfuse(target: object) -> None:
    """Take all fused adapters out of the weights again, to the last bit; they stay active. With nothing fused it does nothing.

    Raises AdapterStateError if the base was not kept.
    """
    parts = components(target)
    with planned(parts) as plan:
        plan_unfused(plan, parts)
    log.info("unfused all")


def plan_unfused(plan: Plan, parts: Mapping[str, nn.Module]) -> None:
    """Plan to restore the weights of these components."""
    for component, mix in mixes_of(parts).items():
        if not plan.view(mix).fused:
            continue
        within = within_pefts(parts[component])
        for layer, module, _ in adapted(parts[component]):
            record = plan.record_of(module)
            if record is not None and record.mix is mix and record.fused:
                plan.carry(module, *unfused(layer, module, record, within))
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


def _plan_component(plan: Plan, model: nn.Module, mix: Mix, names: Sequence[str], keep_base: str, untie: bool) -> None:
    """Plan the weights of one component with exactly `names` in them."""
    refuse_hooked(model)
    owners, walk = owners_of(model), adapted(model)
    count_twins_once(walk, owners)
    alone = _alone(model) if keep_base == "none" else set()
    fuser = _Fuser(plan, mix, plan.view(mix).choice, keep_base == "cpu", owners, alone, Arena(mix.arena), untie)
    for layer, module, _ in walk:
        job = fuser.job(layer, module, names)
        if job is not None:
            fuser.plan_job(job)
    fuser.plan_patched()
    plan.set(mix, arena=fuser.arena if fuser.keep else None)


@dataclass(frozen=True)
class _Job:
    """A layer that is to have adapters in it, and what it was before anything was fused."""

    layer: str
    module: nn.Module
    record: Record
    inside: list[str]
    base: Parameters


@dataclass
class _Fuser:
    """One component: what is planned for its layers."""

    plan: Plan
    mix: Mix
    choice: Choice
    keep: bool  # whether the base is kept
    owners: dict[int, int]
    alone: set[int]  # the ids of parameters that may be written where they lie
    arena: Arena  # where weights lie whose base is kept
    untie: bool  # whether a layer that shares its weight gets one of its own
    scratch: Scratch = field(default_factory=Scratch)
    shared: dict[int, Tensor] = field(default_factory=dict)  # new weights by the parameter's id
    patched: list[tuple[nn.Module, Record]] = field(default_factory=list)
    puts: list[Put] = field(default_factory=list)

    def job(self, layer: str, module: nn.Module, names: Sequence[str]) -> _Job | None:
        """What is to be done for a layer, None if nothing. Raises AdapterStateError if that cannot be."""
        record = self.plan.record_of(module)
        assert record is not None
        inside = [n for n in names if n in record.slots or n in record.patches]
        if record.mix is not self.mix or not set(inside) - record.fused:
            return None
        check_order(layer, record, inside, self.choice)
        refuse_unfit(layer, module, record, self.owners, self.untie)
        _refuse_baseless(layer, record)
        refuse_changed(layer, module, record)
        return _Job(layer, module, record, inside, based(module, record))

    def plan_job(self, job: _Job) -> None:
        """Plan a layer's parameters. Raises NonFiniteError."""
        steps = job.record.steps(self.choice, job.inside)
        if self.rewritten(job, steps):
            return
        empty = functools.partial(self.arena.like, job.layer) if self.keep else torch.empty_like
        weights = fused_weights(job.layer, job.module, job.base, steps, self.scratch, empty=empty)
        kept_base = {name: t.to("cpu") for name, t in job.base.items()} if self.keep else None
        fused = job.record.changed(fused=frozenset(job.inside), base=kept_base, sample=sampled(weights))
        if job.record.patches or is_tied(job.module, job.record, self.owners):
            self.patched.append((job.module, fused))
            self.puts += [(job.module._parameters, name, t) for name, t in weights.items()]
        else:
            name = parameter_names(job.module)[0]
            weights[name] = self.shared.setdefault(id(job.module._parameters[name]), weights[name])
            self.plan.carry(job.module, fused, weights)

    def rewritten(self, job: _Job, steps: Sequence[Step]) -> bool:
        """Plan to write a layer's weight where it lies, if its base goes; False, and nothing is planned, where that might fail or reach others."""
        weight = job.module._parameters.get(parameter_names(job.module)[0])
        if self.keep or job.record.fused or job.record.patches or weight is None or id(weight) not in self.alone:
            return False
        total = bounded_sum(job.module, job.base, steps)
        if total is None:
            return False
        fused = job.record.changed(fused=frozenset(job.inside))
        self.plan.rewrite(job.module, fused, Rewritten(weight.detach(), total, self.scratch))
        return True

    def plan_patched(self) -> None:
        """Plan the layers that patches change, and tied ones: what they shared with layers that nothing changes is parted from those."""
        parted = spread(self.plan, self.puts, self.owners)
        for module, fused in self.patched:
            table = module._parameters
            new = {name: parted[id(table), name] for name in table if (id(table), name) in parted}
            self.plan.carry(module, fused.changed(parted={**new, **fused.parted}))


def _alone(model: nn.Module) -> set[int]:
    """The ids of parameters that one module holds and whose memory is no other tensor's of the model, and no other process's."""
    tensors = [t for m in model.modules() for held in (m._parameters, m._buffers) for t in held.values()]
    plain = [t for t in tensors if t is not None and type(t.data) is Tensor and t.layout is torch.strided]
    storages = [t.untyped_storage().data_ptr() for t in plain]
    times = Counter(storages)
    return {
        id(t)
        for t, storage in zip(plain, storages, strict=True)
        if times[storage] == 1 and not t.is_inference() and not (t.device.type == "cpu" and t.is_shared())
    }


def _refuse_baseless(layer: str, record: Record) -> None:
    """Raise AdapterStateError for a module whose parameters have something in them, and that does not know what they were."""
    if record.fused and record.base is None:
        raise AdapterStateError(
            f"layer {shown(layer)} was fused with keep_base='none'",
            remedy="Fuse all adapters at once, or keep the base.",
        )


def check_order(layer: str, record: Record, fused: Sequence[str], choice: Choice) -> None:
    """Raise AdapterStateError unless fusing `fused` gives what the order of `choice` says."""
    order = [n for n in choice.order if n in record.names]
    if order[: len(fused)] == list(fused) and not any(n in record.copies for n in fused):
        return
    last = max((order.index(n) for n in fused if n in order), default=-1)
    movable = list(dict.fromkeys((*order[: last + 1], *fused)))
    stuck = [n for n in movable if n in record.copies or not all(map(_commutes, record.modules(n)))]
    if stuck:
        raise AdapterStateError(
            f"on layer {shown(layer)} the adapters {', '.join(order)} act in this order, and {shown(stuck[0])} does not commute",
            remedy="Fuse them from the first on, or all of them.",
        )


def _commutes(module: Any) -> bool:
    """Whether a slot or a patch does the same before and after others of its kind."""
    return module.commutes if isinstance(module, Patch) else all(part.additive for part in module.parts)


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


def is_tied(module: nn.Module, record: Record, owners: Mapping[int, int]) -> bool:
    """Whether a layer shares a parameter that adapters change with another. `owners` as `owners_of` gives them."""
    return any(owners.get(id(module._parameters.get(name)), 0) > 1 for name in touched(module, record))


def refuse_unfit(layer: str, module: nn.Module, record: Record, owners: Mapping[int, int], untie: bool = False) -> None:
    """Raise AdapterStateError for a module whose parameters cannot take anything in. `owners` as `owners_of` gives them.

    What only slots change has to be its layer's alone, unless it may be untied; patches untie it.
    """
    if backend_of(module) is not None:
        raise unfit(layer, "its weight is quantised, and rounding it again would lose more than the adapter adds")
    for name in touched(module, record):
        parameter = module._parameters.get(name)
        if name in parametrised(module):
            raise unfit(layer, f"its {name} is parametrised, and what that gives has no numbers of its own")
        if hasattr(module, "_hf_hook") or STREAMED in vars(module) or (parameter is not None and parameter.is_meta):
            raise unfit(layer, f"its {name} is offloaded")
        if owners.get(id(parameter), 0) > 1 and not record.patches and not untie:
            raise unfit(layer, f"its {name} is tied to another layer's")
        if not isinstance(parameter, nn.Parameter) or type(parameter.data) is not Tensor:
            raise unfit(layer, f"its {name} is sharded or of a kind that is not known here")
