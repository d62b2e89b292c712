"""Slots as units of FSDP 1, which puts each unit into a module of its own: layers then call their slots where these have been put."""

from __future__ import annotations

from torch import nn

from diffpeft.layers.carried import ADAPTERS, RECORD, escaped, record_of
from diffpeft.layers.slot import Slot


def follow_units(model: nn.Module) -> None:
    """Let the layers of a model call their slots where FSDP 1 puts them, each from its first forward on."""
    for layer in list(model.modules()):
        if ADAPTERS in layer._modules and record_of(layer) is not None:
            _follow(layer)


def _follow(layer: nn.Module) -> None:
    """Let a layer call its slots where FSDP 1 has put them, from its first forward on."""
    slots = [child for child in layer.get_submodule(ADAPTERS).children() if isinstance(child, Slot)]
    marks = [slot.register_forward_pre_hook(_gathered) for slot in slots]

    def look(module: nn.Module, inputs: object) -> None:
        hook.remove()
        record, units = module.__dict__[RECORD], module.get_submodule(ADAPTERS)._modules
        slots = {name: units[escaped(name)] for name in record.slots}
        if all(slots[name] is slot for name, slot in record.slots.items()):
            for mark in marks:
                mark.remove()
        else:
            record.kept.clear()
            module.__dict__[RECORD] = record.changed(slots=slots)

    hook = layer.register_forward_pre_hook(look)


def _gathered(slot: nn.Module, inputs: object) -> None:
    """A hook that does nothing, but says that the slot's tensors are there only while it is called (`Slot.bare`)."""
