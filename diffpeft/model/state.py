"""An adapted model read back: the tensors of one adapter, as parameters to train or as a Bundle to write."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from diffpeft import io
from diffpeft.bundle import Bundle, Entry, canonical
from diffpeft.errors import UnknownNameError
from diffpeft.layers.adapted import record_of
from diffpeft.layers.slot import Slot
from diffpeft.model.attach import mixes_of
from diffpeft.model.target import adapted_layers, components


def slots_of(target: Any, name: str) -> dict[str, Slot]:
    """{canonical layer: slot} of one adapter, over all components."""
    return {
        canonical(component, layer): record.slots[name]
        for component, model in components(target).items()
        for layer, module in adapted_layers(model).items()
        if (record := record_of(module)) and name in record.slots
    }


def parameters_of(target: Any, name: str) -> list[nn.Parameter]:
    """The trainable parameters of one adapter."""
    return [p for slot in slots_of(target, name).values() for p in slot.parameters() if p.requires_grad]


def _present(slot: Slot) -> dict[str, Tensor]:
    """The slot's tensors by role; those that an offloading hook keeps elsewhere are fetched."""
    if not hasattr(slot, "_hf_hook"):
        return {role: p.detach() for role, p in slot.tensors.items()}
    from accelerate.utils import align_module_device

    with align_module_device(slot, "cpu"):
        return {role: p.detach().clone() for role, p in slot.tensors.items()}


def bundle_of(target: Any, name: str, family: str) -> Bundle:
    """The adapter as a Bundle: its tensors in their own dtype, and all that its file held beside them."""
    adapters = [mix.adapters[name] for mix in mixes_of(components(target)).values() if name in mix.adapters]
    if not adapters:
        raise UnknownNameError.of(
            "adapter", name, {n for mix in mixes_of(components(target)).values() for n in mix.adapters}
        )
    entries = [
        Entry(slot.method, layer, {role: io.handle(t) for role, t in _present(slot).items()}, slot.alpha)
        for layer, slot in slots_of(target, name).items()
    ]
    bundle = Bundle("memory", family, entries, source=name)
    for adapter in adapters:
        bundle.entries += adapter.absent
        bundle.carried |= adapter.carried
        bundle.metadata |= adapter.metadata
    return bundle
