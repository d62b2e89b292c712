"""A model's blocks, which FSDP shards it by, and which are quantised and streamed from the host; and slots as units of FSDP 1.

That puts each unit into a module of its own, where layers then call them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from torch import nn

from diffpeft.errors import UnknownNameError
from diffpeft.layers.carried import ADAPTERS, RECORD, escaped, record_of
from diffpeft.layers.slot import Slot

ASKED = "FSDP_TRANSFORMER_CLS_TO_WRAP"  # names of classes with commas between, as accelerate's launcher hands them on


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


def blocks_of(model: nn.Module) -> Iterator[type[nn.Module]]:
    """The classes of a model's blocks: its `_no_split_modules`, or those named in the environment. Raises UnknownNameError for a name that no module has."""
    known = {type(m).__name__: type(m) for m in model.modules()}
    asked = os.environ.get(ASKED)
    if asked is None:
        names = {name for m in model.modules() for name in getattr(m, "_no_split_modules", None) or ()}
        yield from (
            known[name] for name in sorted(names & known.keys())
        )  # a model may not have all that its family has
        return
    for name in filter(None, asked.split(",")):
        if name not in known:
            raise UnknownNameError.of("class of modules", name, known, where=ASKED)
        yield known[name]


def repeated(model: nn.Module) -> dict[str, nn.Module]:
    """{dotted name: block} of the blocks that a model repeats, in its order; none is in another.

    They are what diffusers says (`_repeated_blocks`), and the entries of lists that have none of these inside and are no layers.
    """
    names = set(getattr(model, "_repeated_blocks", None) or ())
    blocks: dict[str, nn.Module] = {}

    def visit(where: str, module: nn.Module, listed: bool) -> None:
        last = not any(type(m).__name__ in names for m in module.modules())
        if type(module).__name__ in names or (listed and last and any(module.children())):
            blocks[where] = module
            return
        for name, child in module.named_children():
            visit(f"{where}.{name}" if where else name, child, isinstance(module, nn.ModuleList))

    visit("", model, False)
    return blocks
