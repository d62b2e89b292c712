"""How many parameters there are, and what state each adapted layer is in: PEFT's reports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from diffpeft.errors import ConfigError
from diffpeft.layers.backends import backend_of, numbers
from diffpeft.layers.carried import Record
from diffpeft.methods.peft_config import PeftConfig
from diffpeft.model.target import adapted

Value = TypeVar("Value")
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


class Counted(nn.Module):
    """The reports of a PeftModel."""

    @property
    def peft_config(self) -> Mapping[str, PeftConfig]:
        """{adapter: its config}."""
        raise NotImplementedError

    def get_base_model(self) -> nn.Module:
        """The user's model."""
        raise NotImplementedError

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


def counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters of a module."""
    trainable = total = 0
    for p in model.parameters():
        n = numbers(p) or getattr(p, "ds_numel", 0)
        total += n
        trainable += n if p.requires_grad else 0
    return trainable, total


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The state of each adapted layer of a model, wrapped or not. Raises ConfigError if there is none."""
    tuner = getattr(model, "base_model", None) if isinstance(model, Counted) else None
    carrying = adapted(model if tuner is None else tuner)
    if not carrying:
        raise ConfigError(
            "No adapter layers found in the model", remedy="Use get_peft_model or inject_adapter_in_model."
        )
    off = getattr(tuner, "_off", None)
    return [_status(name, module, record, off) for name, module, record in carrying]


def _status(name: str, module: nn.Module, record: Record, off: Iterable[str] | None) -> TunerLayerStatus:
    """The state of one module. `off`: the adapters that were active before all were switched off."""
    parameters = {n: [p for m in record.modules(n) for p in m.parameters()] for n in record.names}
    mix, backend = record.mix, backend_of(module) if record.slots else None
    # a module that is trained whole is not merged before the others are for good
    merged = record.fused | record.copies.keys()
    return TunerLayerStatus(
        name=name,
        module_type=type(module).__name__,
        enabled=off is None,
        active_adapters=[n for n in (mix.choice.order if off is None else off) if n in parameters],
        merged_adapters=[n for n in mix.fused if n in merged],
        requires_grad={n: _common(p.requires_grad for p in of_adapter) for n, of_adapter in parameters.items()},
        available_adapters=sorted(parameters),
        devices={n: _devices(of_adapter) for n, of_adapter in parameters.items()},
        quantization_backend=None if backend is None else backend.name,
    )


def _devices(parameters: Iterable[nn.Parameter]) -> list[str]:
    """The kinds of devices that parameters are on."""
    return sorted({p.device.type for p in parameters})


def _common(values: Iterable[Value]) -> Any:
    """The value that all have, or `irregular`; False if there is none."""
    different = {repr(v): v for v in values}
    return next(iter(different.values())) if len(different) == 1 else IRREGULAR if different else False


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The state of all adapted layers of a model together. Raises ConfigError if there is none."""
    layers = get_layer_status(model)
    base, configs = (model.get_base_model(), model.peft_config) if isinstance(model, Counted) else (model, {})
    trainable, total = counts(model)
    names = sorted({n for status in layers for n in status.available_adapters})
    return TunerModelStatus(
        base_model_type=type(base).__name__,
        adapter_model_type=_tuner_name(configs),
        peft_types={name: str(getattr(c.peft_type, "value", c.peft_type)) for name, c in configs.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_common(s.enabled for s in layers),
        active_adapters=_active(layers, names),
        merged_adapters=_merged(layers),
        requires_grad={n: _common(s.requires_grad[n] for s in layers if n in s.requires_grad) for n in names},
        available_adapters=names,
        devices={n: sorted({d for s in layers for d in s.devices.get(n, ())}) for n in names},
        quantization_backend=_common(s.quantization_backend for s in layers),
    )


def _active(layers: Iterable[TunerLayerStatus], names: Sequence[str]) -> list[str] | str:
    """The active adapters, as layers that have all `names` agree on them; else what all layers have in common."""
    layers = list(layers)
    active = {tuple(n for n in names if n in s.active_adapters) for s in layers if s.available_adapters == names}
    return list(active.pop()) if len(active) == 1 else _common(s.active_adapters for s in layers)


def _merged(layers: Sequence[TunerLayerStatus]) -> list[str] | str:
    """The adapters that are in the weights: of every layer that has them, or `irregular`."""
    merged = {name for status in layers for name in status.merged_adapters}
    partly = any(({*s.available_adapters} - {*s.merged_adapters}) & merged for s in layers)
    return IRREGULAR if partly else sorted(merged)


def _tuner_name(configs: Mapping[str, object]) -> str:
    """PEFT's name for the class of the tuner, for example LoraModel."""
    return next((f"{type(c).__name__.removesuffix('Config')}Model" for c in configs.values()), "None")
