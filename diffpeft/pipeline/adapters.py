"""The adapters of a pipeline (or any module): which there are, how strong they are, and off again."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import torch
from torch import nn

from diffpeft.errors import AdapterStateError, joined, shown
from diffpeft.model.attach import mixes_of, plan_removed
from diffpeft.model.fuse import check_order
from diffpeft.model.lock import exclusive
from diffpeft.model.mix import Choice, Mix, Strength, check_rows, claim
from diffpeft.model.plan import Plan, planned
from diffpeft.model.root import rooted
from diffpeft.model.schedule import Clock
from diffpeft.model.state import slots_of
from diffpeft.model.target import adapted, components
from diffpeft.readable import Readable

log = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class AdapterStatus(Readable):
    """One adapter: its methods and ranks, the strength that was set, whether it is active, where it sits, and how many numbers it has.

    Where a list of mixes was set, `strength` is a tuple of one a prompt, 0.0 where a mix does not name the adapter.
    """

    methods: frozenset[str]
    ranks: tuple[int, ...]
    strength: Strength | tuple[Strength, ...]
    active: bool
    fused: bool
    components: frozenset[str]
    parameters: int


Mixes = Mapping[str, Strength] | Sequence[Mapping[str, Strength]]
# what type checkers take a variable for that holds a mix of numbers, dicts and schedules, or a list of such
Variable = TypeVar(
    "Variable",
    dict[str, object],
    dict[str, dict[str, object]],
    list[object],
    list[dict[str, object]],
    list[dict[str, dict[str, object]]],
)


@overload
def set_adapters(target: object, mix: Mixes, images_per_prompt: int = 1) -> None: ...
@overload
def set_adapters(target: object, mix: Variable, images_per_prompt: int = 1) -> None: ...
def set_adapters(target: object, mix: object, images_per_prompt: int = 1) -> None:
    """Make the adapters named in `mix` active, in this order and at these strengths; all others become inactive.

    A strength is a number, or numbers by component or block: {"unet": 0.8, "unet.up_blocks.*": 0.2}. A pattern matches a leading run of whole
    segments of a layer's dotted name; the one with most literal segments wins, then the longer, then the later; a layer that none names has 1.
    In place of a number there may be a `diffpeft.schedule`, which changes it from step to step of the pipeline given as `target`.

    A list of mixes is one a prompt: row i of a batch has mix (i // images_per_prompt) % len(mix); guidance repeats the batch; a text encoder has
    one row a prompt. Raises UnknownNameError or ConfigError, in which case nothing has changed.
    """
    parts = components(target)
    with planned(parts) as plan:
        plan_mix(plan, target, parts, mix, images_per_prompt)
    log.debug("set %r", mix)


def plan_mix(
    plan: Plan, target: object, parts: Mapping[str, nn.Module], strengths: object, images_per_prompt: int = 1
) -> None:
    """Plan what `set_adapters` does. Raises what it raises."""
    mixes = mixes_of(parts)
    before = {component: plan.view(mix) for component, mix in mixes.items()}
    choices = _choices(target, parts, before, strengths, images_per_prompt, plan)
    for component, mix in mixes.items():
        plan.set(mix, choice=choices[mix.key])
        plan.root(parts[component], mix)


@overload
def adapters(target: object, mix: Mixes, images_per_prompt: int = 1) -> AbstractContextManager[None]: ...
@overload
def adapters(target: object, mix: Variable, images_per_prompt: int = 1) -> AbstractContextManager[None]: ...
@contextlib.contextmanager
def adapters(target: object, mix: object, images_per_prompt: int = 1) -> Iterator[None]:
    """`set_adapters` for this thread, or asyncio task, and this block only. Blocks nest; the inner one replaces the whole mix.

    A task hands the mix on with its context: `await asyncio.to_thread(pipe, ...)` inside the block draws with it, a thread started otherwise does
    not. Of blocks that end in another order than they were entered each ends by itself, and the last that is open holds.

    Raises what `set_adapters` raises, and AdapterStateError where gradient checkpointing would run layers again outside the block.
    """
    parts = components(target)
    with exclusive(parts):
        mixes = mixes_of(parts)
        choices = _choices(target, parts, mixes, mix, images_per_prompt, Plan())
        _check_checkpointing(target)
        block = claim(choices)
    with rooted(parts, mixes, block):
        yield


def _choices(
    target: object, parts: Mapping[str, nn.Module], mixes: Mapping[str, Mix], strengths: Any, images: int, plan: Plan
) -> dict[str, Choice]:
    """{mix key: choice}, all checked against what is there and planned."""
    check_rows(strengths, images, mixes.values(), parts)
    clock = Clock(None if isinstance(target, nn.Module) else target)
    choices = {mix.key: mix.chosen(strengths, clock, images) for mix in mixes.values()}
    _check_fused(parts, mixes, choices, plan)
    return choices


def _check_checkpointing(target: object) -> None:
    if not torch.is_grad_enabled():
        return
    for component, model in components(target).items():
        if any(getattr(m, "gradient_checkpointing", False) and m.training for m in model.modules()):
            raise AdapterStateError(
                f"gradient checkpointing is on in {component or 'the model'}: backward would run its layers again outside the block",
                remedy="Use set_adapters, or torch.no_grad().",
            )


def _check_fused(
    parts: Mapping[str, nn.Module], mixes: Mapping[str, Mix], choices: Mapping[str, Choice], plan: Plan
) -> None:
    """Raise AdapterStateError if a choice would change what is in the weights."""
    for component, mix in mixes.items():
        if not mix.fused:
            continue
        rows = choices[mix.key].rows or (choices[mix.key],)
        for name in mix.fused:
            if any(row.levels.get(name) != mix.choice.levels[name] for row in rows):
                raise AdapterStateError(
                    f"adapter {shown(name)} is fused into {component or 'the model'} at another strength",
                    remedy="Call unfuse first; fused strengths must stay as they are.",
                )
        for layer, module, _ in adapted(parts[component]):
            record = plan.record_of(module)
            if record is not None and record.fused:
                for row in rows:
                    check_order(layer, record, [n for n in mix.fused if n in record.fused], row)


def get_adapters(target: object) -> dict[str, AdapterStatus]:
    """{name: status} of every adapter, in the order in which they came."""
    parts = components(target)
    with exclusive(parts):
        mixes = mixes_of(parts)
        names = dict.fromkeys(name for mix in mixes.values() for name in mix.adapters)
        return {name: _status(target, name, mixes) for name in names}


def _status(target: object, name: str, mixes: Mapping[str, Any]) -> AdapterStatus:
    slots = slots_of(target, name).values()
    having = {component: mix for component, mix in mixes.items() if name in mix.adapters}
    strengths = [mix.choice.given[name] for mix in having.values() if name in mix.choice.given]
    return AdapterStatus(
        methods=frozenset(method for slot in slots for method in slot.methods),
        ranks=tuple(sorted({slot.rank for slot in slots if slot.parts})),
        strength=copy.copy(strengths[0]) if strengths else 0.0,
        active=bool(strengths),
        fused=any(name in mix.fused for mix in having.values()),
        components=frozenset(having),
        parameters=sum(p.numel() for slot in slots for p in slot.parameters()),
    )


def unload(target: object, names: str | Sequence[str] | None = None) -> None:
    """Remove adapters, all of them by default. The last one out leaves no trace: classes, keys and bytes are what they were.

    Raises UnknownNameError for a name that is not there, AdapterStateError for one that a running `adapters(...)` block uses.
    """
    parts = components(target)
    with planned(parts) as plan:
        gone = plan_removed(plan, parts, None if names is None else {names} if isinstance(names, str) else set(names))
    log.info("unloaded %s", joined(sorted(gone)) or "nothing")
