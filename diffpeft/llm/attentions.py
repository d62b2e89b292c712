"""LoRAs on PyTorch's attentions as PEFT's files have them: an output projection's acts twice at its config's alpha (converters/formats/attention.py)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

from torch import nn

from diffpeft.converters.formats.attention import TIMES, around
from diffpeft.errors import ConfigError
from diffpeft.layers.slot import Slot
from diffpeft.methods.lora import Lora
from diffpeft.model.target import along

Value = TypeVar("Value")


def refuse_dora(layers: Mapping[str, nn.Module], config: object) -> None:
    """Raise ConfigError for a DoRA on an attention, for which PEFT has no file."""
    if getattr(config, "use_dora", False) and along(layers):
        raise ConfigError(
            "MultiheadAttention does not support DoRA (yet), please set use_dora to False",
            remedy="diffpeft.attach puts a DoRA on it.",
        )


def said(layers: Mapping[str, Value]) -> dict[str, Value]:
    """The layers that a config speaks of."""
    return {layer: value for layer, value in layers.items() if around(layer, layers) is None}


def doubled(slots: Mapping[str, Slot]) -> dict[str, Slot]:
    """Fresh slots that were made by a config, as PEFT lets them act."""
    for slot in _outputs(slots):
        slot.parts = tuple(
            replace(part, alpha=TIMES * part.spec.alpha, spec=replace(part.spec, alpha=TIMES * part.spec.alpha))
            if part.method is Lora and part.spec.alpha is not None
            else part
            for part in slot.parts
        )
    return dict(slots)


def as_in_files(slots: Mapping[str, Slot]) -> dict[str, Slot]:
    """Fresh LoRAs with the numbers that do the same when they act twice."""
    for slot in _outputs(slots):
        if "lora_B" in slot.tensors:
            slot.get_parameter("lora_B").data /= TIMES
    return doubled(slots)


def _outputs(slots: Mapping[str, Slot]) -> Iterable[Slot]:
    return [slot for layer, slot in slots.items() if around(layer, slots) is not None]
