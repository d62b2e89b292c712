"""PEFT's classes of layers, for `isinstance`: what a module carries decides, for it keeps a class of its own."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from diffpeft.layers.carried import ADAPTERS, Record, record_of
from diffpeft.layers.parameters import ParameterFactors
from diffpeft.layers.tokens import Tokens
from diffpeft.methods.layout import LAYOUTS, TUNED


class _Carrying(type):
    """A class whose instances are the modules that carry what it names."""

    def __instancecheck__(cls, instance: object) -> bool:
        record = record_of(instance) if isinstance(instance, nn.Module) else None
        return record is not None and cls.carried_by(instance, record)  # type: ignore[attr-defined]


class BaseTunerLayer(metaclass=_Carrying):
    """A layer, or a module whose parameters or rows are adapted, with adapters on it."""

    methods: ClassVar[frozenset[str]] = frozenset()  # of a layer's adapters; of none: any
    adapter_layer_names: ClassVar[tuple[str, ...]] = (ADAPTERS,)  # what its adapters lie under
    other_param_names: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def names(cls, record: Record) -> set[str]:
        """The adapters by which a module with this record is one of these."""
        held = {name: set(slot.methods) for name, slot in record.slots.items()}
        for name, patch in record.patches.items():
            if isinstance(patch, ParameterFactors):
                held[name] = {"lora"}
            elif isinstance(patch, Tokens) and name not in record.hidden:
                held.setdefault(name, {"rows"})
        return {name for name, methods in held.items() if not cls.methods or methods & cls.methods}

    @classmethod
    def carried_by(cls, module: nn.Module, record: Record) -> bool:
        """Whether a module with this record is one of these."""
        return bool(cls.names(record))


class LoraLayer(BaseTunerLayer):
    """A layer with a LoRA, a DoRA or an AdaLoRA."""

    methods = frozenset({"lora", "dora", "adalora"})


class _LoraOn(LoraLayer):
    """A layer of some classes with a LoRA."""

    classes: ClassVar[tuple[type[nn.Module], ...]]

    @classmethod
    def carried_by(cls, module: nn.Module, record: Record) -> bool:
        return isinstance(module, cls.classes) and super().carried_by(module, record)


class LoraLinear(_LoraOn):
    """A linear layer with a LoRA."""

    classes = (nn.Linear,)


class LoraEmbedding(_LoraOn):
    """An embedding with a LoRA."""

    classes = (nn.Embedding,)


class LoraConv2d(_LoraOn):
    """A convolution of two dimensions with a LoRA."""

    classes = (nn.Conv2d,)


class LoraConv3d(_LoraOn):
    """A convolution of three dimensions with a LoRA."""

    classes = (nn.Conv3d,)


class ParamWrapper(LoraLayer):
    """A module with a LoRA on parameters themselves."""

    @classmethod
    def carried_by(cls, module: nn.Module, record: Record) -> bool:
        return any(isinstance(patch, ParameterFactors) for patch in record.patches.values())


class AdaLoraLayer(LoraLayer):
    """A layer with an AdaLoRA."""

    methods = frozenset({"adalora"})


def _kind(stem: str, method: str) -> type[BaseTunerLayer]:
    """PEFT's class of a layer with adapters of a method."""
    members = {"methods": frozenset({method}), "__doc__": f"A layer with a {stem}.", "__module__": __name__}
    return type(f"{stem}Layer", (BaseTunerLayer,), members)


_WRITTEN = {"Lora": LoraLayer, "AdaLora": AdaLoraLayer}  # those that other classes are made of
_KINDS = (
    _WRITTEN.get(row.stem) or _kind(row.stem, method)
    for method, row in LAYOUTS.items()
    if row.stem in TUNED and not row.over
)
NAMES = {kind.__name__: kind for kind in _KINDS}


def __getattr__(name: str) -> type[BaseTunerLayer]:
    if name in NAMES:
        return NAMES[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class AuxiliaryTrainingWrapper(metaclass=_Carrying):
    """A module that is trained beside layers: whole, or rows of it."""

    @classmethod
    def carried_by(cls, module: nn.Module, record: Record) -> bool:
        """Whether a module with this record is one of these."""
        return isinstance(module, (ModulesToSaveWrapper, TrainableTokensWrapper))


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """A module that is trained whole, in a copy for each adapter."""

    @classmethod
    def carried_by(cls, module: nn.Module, record: Record) -> bool:
        """Whether a module with this record is one of these."""
        return bool(record.copies)


class TrainableTokensWrapper(AuxiliaryTrainingWrapper):
    """A table or a head of which rows are trained."""

    @classmethod
    def carried_by(cls, module: nn.Module, record: Record) -> bool:
        """Whether a module with this record is one of these."""
        return any(isinstance(patch, Tokens) for patch in record.patches.values())
