"""Numbers for parameters that several modules may hold (a head and its embedding).

They are written once where all get the same; else each gets a parameter of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from diffpeft.layers.carried import Record
from diffpeft.layers.sites import parameter_names
from diffpeft.layers.slot import Slot
from diffpeft.methods.lora import Lora
from diffpeft.model.plan import Plan, Put


def spread(plan: Plan, puts: Sequence[Put], owners: dict[int, int]) -> dict[tuple[int, str], Tensor]:
    """Plan to give modules' parameters and buffers new numbers, untying only what gets others than the rest.

    Args:
        puts: a later one for the same place replaces an earlier one.
        owners: how many modules hold each parameter, by its id; taken down by those that will have one of their own.

    Returns {(id of the module's table, name): the parameter that was there} of what is untied.
    """
    places = {(id(table), name): (table, name, new) for table, name, new in puts}
    shared: dict[int, list[Put]] = {}
    for table, name, new in places.values():
        shared.setdefault(id(table[name]), []).append((table, name, new))
    parted: dict[tuple[int, str], Tensor] = {}
    for key, holders in shared.items():
        groups = _alike(holders)
        others = owners.get(key, len(holders)) > len(holders)  # somebody keeps the numbers
        if not others:
            table, name, new = groups.pop(0)[0]
            plan.numbers(table[name], new)
        for group in groups:
            parameter = _own(group[0])
            for table, name, _ in group:
                plan.entry(table, name, parameter)
            parted |= {(id(table), name): table[name] for table, name, _ in group}
            owners[key] = owners.get(key, 0) - len(group)
    return parted


def count_twins_once(walk: Iterable[tuple[str, nn.Module, Record]], owners: dict[int, int]) -> None:
    """Let layers that share a weight count as one where all of them have the same adapters, those of an embedding turned: their weights come out equal."""
    sharing: dict[int, list[Record]] = {}
    for _, module, record in walk:
        weight = module._parameters.get(parameter_names(module)[0])
        if record.slots and weight is not None and owners.get(id(weight), 0) > 1:
            sharing.setdefault(id(weight), []).append(record)
    for key, (record, *others) in sharing.items():
        if 1 + len(others) == owners[key] and all(_are_twins(record, other) for other in others):
            owners[key] = 1


def _are_twins(one: Record, other: Record) -> bool:
    if list(one.slots) != list(other.slots):
        return False
    return all(same_product(one.slots[name], other.slots[name]) for name in one.slots)


def same_product(one: Slot, other: Slot) -> bool:
    """Whether two plain LoRAs, one of them perhaps of an embedding, add the same to a weight [rows, features]."""
    a, b = _product(one), _product(other)
    if a is None or b is None or a[2] != b[2]:
        return False
    return all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a[:2], b[:2], strict=True))


def _product(slot: Slot) -> tuple[Tensor, Tensor, float] | None:
    """A plain LoRA as (A, B, scale) of what it adds to a weight [rows, features]."""
    if len(slot.parts) != 1 or slot.parts[0].method is not Lora:
        return None
    p, scale = slot.tensors, slot.scale
    if {*p} == {"lora_A", "lora_B"}:
        return p["lora_A"], p["lora_B"], scale
    return (p["lora_embedding_B"].t(), p["lora_embedding_A"].t(), scale) if "lora_embedding_A" in p else None


def _own(put: Put) -> object:
    table, name, new = put
    old = table[name]
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def _alike(holders: Sequence[Put]) -> list[list[Put]]:
    """The holders of a parameter, those together that get the same numbers."""
    groups: list[list[Put]] = []
    for put in holders:
        group = next((group for group in groups if _same(group[0][2], put[2])), None)
        if group is None:
            groups.append([put])
        else:
            group.append(put)
    return groups


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or ((a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape) and torch.equal(a, b))
