"""Numbers for parameters that several modules may hold (a head and its embedding).

They are written once where all get the same; else each gets a parameter of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from diffpeft.layers.whole import Put
from diffpeft.model.attach import Plan


def spread(plan: Plan, puts: Sequence[Put], owners: dict[int, int]) -> dict[tuple[int, str], Any]:
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
    parted: dict[tuple[int, str], Any] = {}
    for key, holders in shared.items():
        groups = _alike(holders)
        others = owners.get(key, len(holders)) > len(holders)  # somebody keeps the numbers
        if not others:
            table, name, new = groups.pop(0)[0]
            plan.tensors.append((table[name], new))
        for group in groups:
            own = _own(group[0])
            plan.held += [(table, name, own) for table, name, _ in group]
            parted |= {(id(table), name): table[name] for table, name, _ in group}
            owners[key] = owners.get(key, 0) - len(group)
    return parted


def _own(put: Put) -> Any:
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
