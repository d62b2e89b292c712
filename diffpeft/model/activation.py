"""Which adapters of a model act, are in the weights, and are trained; and which cannot act together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from diffpeft.errors import AdapterStateError, shown
from diffpeft.layers.carried import Record
from diffpeft.model.attach import mixes_of
from diffpeft.model.plan import Plan
from diffpeft.model.target import adapted


def order_of(model: nn.Module, plan: Plan | None = None) -> list[str]:
    """The adapters that are active, or will be, in order."""
    return [name for mix in mixes_of({"": model}).values() for name in (plan.view(mix) if plan else mix).choice.order]


def fused_of(model: nn.Module) -> list[str]:
    """The adapters that are in the weights."""
    return [name for mix in mixes_of({"": model}).values() for name in mix.fused]


def trained_of(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of adapters that get gradients."""
    held = (module for _, _, record in adapted(model) for name in record.names for module in record.modules(name))
    return [*dict.fromkeys(p for module in held for p in module.parameters() if p.requires_grad)]


def plan_trained(plan: Plan, model: nn.Module, flags: Mapping[str, bool]) -> None:
    """Plan whether the tensors of these adapters get gradients, copies of modules among them; what came with a file to stay as it is does not."""
    for _, module, _ in adapted(model):
        record = plan.record_of(module)
        if record is None:
            continue
        for name in record.names:
            if name in flags and not (name in record.copies and record.copies[name].still):
                for held in record.modules(name):
                    plan.require_grad(held.parameters(), flags[name])


def plan_frozen(plan: Plan, model: nn.Module) -> None:
    """Plan what the first adapter does to a model: its own parameters are not trained any more. Further ones leave them as they are."""
    if not mixes_of({"": model}):
        plan.require_grad(model.parameters(), False)


# what adapters cannot share: PEFT's name for a module that has it, and why
_CLASHES = {
    "copies": ("ModulesToSaveWrapper", "each has values of its own there"),
    "rows": (
        "TrainableTokensWrapper",
        "rows that both train are already defined and would result in undefined merging behavior",
    ),
}


def refuse_clashing(model: nn.Module, names: Sequence[str]) -> None:
    """Raise AdapterStateError if two of these adapters train the same module whole, or the same rows of an embedding."""
    for _, _, record in adapted(model):
        refuse_clashing_on(record, names)


def refuse_clashing_on(record: Record, names: Sequence[str]) -> None:
    """The same for one module."""
    for one, other, what in _clashing(record, names):
        kind, why = _CLASHES[what]
        raise AdapterStateError(
            f"Only one adapter can be set at a time for {kind} {shown(record.where)}, got {one} and {other}: {why}",
            remedy="Activate one of them.",
        )


def clashes(model: nn.Module, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(module, what two of the adapters both have for themselves) of those that cannot act together there."""
    for where, _, record in adapted(model):
        yield from ((where, what) for _, _, what in _clashing(record, names))


def _clashing(record: Record, names: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """(one adapter, another, what both have) of those that cannot act together on a module."""
    having = [name for name in dict.fromkeys(names) if name in record.names]
    for one, other in itertools.combinations(having, 2):
        if what := record.clashing(one, other):
            yield one, other, what
