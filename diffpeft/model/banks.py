"""The tensors that all layers of an adapter share: one module a component, which its slots refer to."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from diffpeft.layers.slot import Bank, Slot


def share(slots: Mapping[str, Slot], tensors: Mapping[str, Tensor] | None = None) -> None:
    """Give the slots of one adapter on one component the tensors that they share: these, or new ones. Does nothing for methods that share none.

    The bank is held by the first of the layers, so that it is once in the component, and leaves with the adapter.
    """
    parts = [(slot, part) for slot in slots.values() for part in slot.parts if part.method.shared]
    if not parts:
        return
    method = parts[0][1].method
    layers = [(slot.tensors_of(part), part.spec) for slot, part in parts]
    bank, device = Bank(tensors or method.bank(layers)), parts[0][0].weight.device
    bank = (
        bank if device.type == "meta" else bank.to(device)
    )  # slots that wait for their numbers do not need it elsewhere
    for n, (slot, _) in enumerate(parts):
        slot.__dict__.update(bank=bank, hosts=n == 0)


def shared_by(slots: Mapping[str, Slot]) -> dict[str, Tensor]:
    """What slots of one adapter on one component share, by role."""
    bank = next((slot.bank for slot in slots.values() if slot.bank is not None), None)
    return {} if bank is None else {role: t.detach() for role, t in bank.tensors.items()}
