"""How many parameters there are, and what state each adapted layer is in: PEFT's reports."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from diffpeft.errors import ConfigError, WrongKindError
from diffpeft.layers.backends import backend_of, numbers
from diffpeft.layers.carried import Record
from diffpeft.layers.slot import Slot
from diffpeft.methods.layout import LAYOUTS
from diffpeft.methods.peft_config import PeftConfig
from diffpeft.model.target import adapted, kind_of

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
    """The state of each adapted layer of a model, wrapped or not.

    Raises ConfigError if there is none, WrongKindError for a PeftModel whose adapters are prompts.
    """
    _refuse_prompts(model, "get_layer_status")
    tuner = getattr(model, "base_model", None) if isinstance(model, Counted) else None
    off = getattr(model if tuner is None else tuner, "_off", None)
    carrying = adapted(model if tuner is None else tuner)
    layers = [s for name, module, record in carrying for s in _statuses(name, module, record, off)]
    lent = getattr(model if tuner is None else tuner, "_lent", ())  # only merged, and active for that
    for status in layers:
        status.active_adapters = [name for name in status.active_adapters if name not in lent]
    if not layers:
        raise ConfigError(
            "No adapter layers found in the model", remedy="Use get_peft_model or inject_adapter_in_model."
        )
    return layers


def _refuse_prompts(model: nn.Module, what: str) -> None:
    """Raise WrongKindError for a PeftModel whose adapters are not on layers."""
    if isinstance(model, Counted) and any(c.is_prompt_learning for c in model.peft_config.values()):
        raise WrongKindError(
            f"{what}() got an invalid PeftModel instance; prefix tuning and adaption prompt are not supported",
            remedy="Prompts are on no layer.",
        )


_KINDS = ("Embedding", "Conv1d", "Conv2d", "Conv3d", "MultiheadAttention")  # of layers; all others are Linear in PEFT


def _statuses(name: str, module: nn.Module, record: Record, off: Iterable[str] | None) -> Iterator[TunerLayerStatus]:
    """The states of what a module carries, as PEFT has it: adapters on it or on its parameters, copies, and rows of it. `off` as in `_status`."""
    slots = {n: slot for n, slot in record.slots.items() if slot.parts}
    factors = {n: patch for n, patch in record.patches.items() if not patch.shows}
    rows = {n: patch for n, patch in record.patches.items() if patch.shows}
    copies = {n: held.module for n, held in record.copies.items() if not held.still}
    if slots or factors:
        kind = _kind_of(module, slots) if slots else "lora.ParamWrapper"
        yield _status(name, kind, module, record, {**factors, **slots}, off, everywhere=True)
    if rows:
        yield _status(f"{name}.token_adapter", "TrainableTokensLayer", module, record, rows, off)
    if copies:
        yield _status(name, "ModulesToSaveWrapper", module, record, copies, off)


def _kind_of(module: nn.Module, slots: Mapping[str, Slot]) -> str:
    """PEFT's name for a layer with adapters, by the first of them, for example `lora.Linear`."""
    method = next(method for slot in slots.values() for method in slot.methods)
    names = {c.__name__ for c in kind_of(module).__mro__}
    begins = LAYOUTS[method].status
    return (f"{method}." if begins is None else begins) + next((kind for kind in _KINDS if kind in names), "Linear")


def _status(
    name: str,
    kind: str,
    module: nn.Module,
    record: Record,
    held: Mapping[str, nn.Module],
    off: Iterable[str] | None,
    *,
    everywhere: bool = False,
) -> TunerLayerStatus:
    """The state of what adapters hold on one module.

    Args:
        off: the adapters that were active before all were switched off.
        everywhere: whether adapters count as active that are on other layers alone.
    """
    parameters = {n: list(inner.parameters()) for n, inner in held.items()}
    mix, backend = record.mix, backend_of(module) if everywhere else None
    active = mix.choice.single(record.index).active if off is None else off
    # a module that is trained whole is not merged before the others are for good
    merged = record.fused | record.copies.keys()
    return TunerLayerStatus(
        name=name,
        module_type=kind,
        enabled=off is None and mix.standing().single(record.index).enabled,
        active_adapters=[n for n in active if everywhere or n in parameters],
        merged_adapters=[n for n in mix.fused if n in merged and n in parameters],
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
    """The state of all adapted layers of a model together. Raises what `get_layer_status` raises."""
    _refuse_prompts(model, "get_model_status")
    layers = get_layer_status(model)
    base, configs = (model.get_base_model(), model.peft_config) if isinstance(model, Counted) else (model, {})
    trainable, total = counts(model)
    names = sorted({n for status in layers for n in status.available_adapters})
    return TunerModelStatus(
        base_model_type=_name_of(model, base),
        adapter_model_type=_tuner_name(configs),
        peft_types={name: str(getattr(c.peft_type, "value", c.peft_type)) for name, c in configs.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_common(s.enabled for s in layers),
        active_adapters=_active(layers),
        merged_adapters=_merged(layers),
        requires_grad={n: _common(s.requires_grad[n] for s in layers if n in s.requires_grad) for n in names},
        available_adapters=names,
        devices={n: sorted({d for s in layers for d in s.devices.get(n, ())}) for n in names},
        quantization_backend=_common(s.quantization_backend for s in layers),
    )


def _active(layers: Sequence[TunerLayerStatus]) -> list[str] | str:
    """The active adapters, of which a copy, or rows, has those that it is of; or `irregular`."""
    active = max((s.active_adapters for s in layers), key=len)
    alike = all(s.active_adapters in (active, [n for n in active if n in s.available_adapters]) for s in layers)
    return active if alike else IRREGULAR


def _merged(layers: Sequence[TunerLayerStatus]) -> list[str] | str:
    """The adapters that are in the weights: of every layer that has them, or `irregular`."""
    merged = {name for status in layers for name in status.merged_adapters}
    partly = any(({*s.available_adapters} - {*s.merged_adapters}) & merged for s in layers)
    return IRREGULAR if partly else sorted(merged)


def _name_of(model: nn.Module, base: nn.Module) -> str:
    """The class of the user's model; `other` for one that is neither wrapped nor of transformers, as in PEFT."""
    known = isinstance(model, Counted) or any(c.__name__ == "PreTrainedModel" for c in type(base).__mro__)
    return type(base).__name__ if known else "other"


def _tuner_name(configs: Mapping[str, object]) -> str:
    """PEFT's name for the class of the tuner, for example LoraModel."""
    return next((f"{type(c).__name__.removesuffix('Config')}Model" for c in configs.values()), "None")
