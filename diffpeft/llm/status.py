"""How many parameters there are, and what state each adapted layer is in: PEFT's reports."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from diffpeft.errors import ConfigError
from diffpeft.layers.carried import Record
from diffpeft.layers.site import site_of
from diffpeft.model.target import adapted

IRREGULAR = "irregular"


@dataclass
class TunerLayerStatus:
    """One layer, or one module that is trained whole, with adapters. PEFT's fields."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """All layers together; `irregular` where they differ. PEFT's fields."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | str
    active_adapters: list[str] | str
    merged_adapters: list[str] | str
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


class Counted:
    """The reports of a PeftModel."""

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all). Of a 4-bit weight its numbers are counted, not its bytes; of a ZeRO-3 shard the whole."""
        return counts(self)

    def print_trainable_parameters(self) -> None:
        """Print one line with both and their ratio."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The state of each adapted layer."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """The state of all adapted layers together."""
        return get_model_status(self)


def counts(model: Any) -> tuple[int, int]:
    """(trainable, all) parameters of a module."""
    trainable = total = 0
    for p in model.parameters():
        n = p.numel() or getattr(p, "ds_numel", 0)
        if type(p).__name__ == "Params4bit":
            n *= 2 * p.element_size()
        total += n
        trainable += n if p.requires_grad else 0
    return trainable, total


def get_layer_status(model: Any) -> list[TunerLayerStatus]:
    """The state of each adapted layer of a model, wrapped or not. Raises ConfigError if there is none."""
    tuner = getattr(model, "base_model", None) if isinstance(model, Counted) else None
    root: nn.Module = model if tuner is None else tuner
    off = getattr(tuner, "_off", None)
    found = adapted(root)
    if not found:
        raise ConfigError(
            "No adapter layers found in the model", remedy="Use get_peft_model or inject_adapter_in_model."
        )
    return [_status(name, module, record, off) for name, module, record in found]


def _status(name: str, module: Any, record: Record, off: Any) -> TunerLayerStatus:
    held = {n: [p for own in record.modules(n) for p in own.parameters()] for n in record.names}
    mix, site = record.mix, site_of(type(module)) if record.slots else None
    order = off if off is not None else mix.choice.order
    # a module that is trained whole is not merged before the others are for good
    inside = record.fused | record.copies.keys()
    return TunerLayerStatus(
        name=name,
        module_type=type(module).__name__,
        enabled=off is None,
        active_adapters=[n for n in order if n in held],
        merged_adapters=[n for n in mix.fused if n in inside],
        requires_grad={n: _common(p.requires_grad for p in own) for n, own in held.items()},
        available_adapters=sorted(held),
        devices={n: sorted({p.device.type for p in own}) for n, own in held.items()},
        quantization_backend=_backend(module) if site is not None and site.quantised else None,
    )


def _backend(module: Any) -> str:
    return "bnb 4bit" if type(module.weight).__name__ == "Params4bit" else "bnb 8bit"


def _common(values: Iterable[Any]) -> Any:
    """The value that all have, or `irregular`."""
    different = {repr(v): v for v in values}
    return next(iter(different.values())) if len(different) == 1 else IRREGULAR if different else False


def get_model_status(model: Any) -> TunerModelStatus:
    """The state of all adapted layers of a model together. Raises ConfigError if there is none."""
    layers = get_layer_status(model)
    wrapped = isinstance(model, Counted)
    base: Any = model.get_base_model() if wrapped else model
    configs = model.peft_config if wrapped else {}
    trainable, total = counts(model)
    names = sorted({n for status in layers for n in status.available_adapters})
    active = {tuple(n for n in names if n in s.active_adapters) for s in layers if s.available_adapters == names}
    partly = any(({*s.available_adapters} - {*s.merged_adapters}) & _merged(layers) for s in layers)
    return TunerModelStatus(
        base_model_type=type(base).__name__,
        adapter_model_type=_tuner_name(configs),
        peft_types={name: str(getattr(c.peft_type, "value", c.peft_type)) for name, c in configs.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_common(s.enabled for s in layers),
        active_adapters=_common(s.active_adapters for s in layers) if len(active) != 1 else list(active.pop()),
        merged_adapters=IRREGULAR if partly and _merged(layers) else sorted(_merged(layers)),
        requires_grad={n: _common(s.requires_grad[n] for s in layers if n in s.requires_grad) for n in names},
        available_adapters=names,
        devices={n: sorted({d for s in layers for d in s.devices.get(n, ())}) for n in names},
        quantization_backend=_common(s.quantization_backend for s in layers),
    )


def _merged(layers: Iterable[TunerLayerStatus]) -> set[str]:
    return {name for status in layers for name in status.merged_adapters}


def _tuner_name(configs: Any) -> str:
    """PEFT's name for the class of the tuner, for example LoraModel."""
    return next((f"{type(c).__name__.removesuffix('Config')}Model" for c in configs.values()), "None")
