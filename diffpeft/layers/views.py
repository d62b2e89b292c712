"""What PEFT's layers are asked for, of modules that carry something: views of their record, and actions that the floor above does.

A name that the module has itself, as an attribute, a parameter or a module inside, stays the module's.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, MethodType
from typing import ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

from diffpeft.errors import AdapterStateError, UnknownNameError
from diffpeft.layers.carried import ADAPTERS, COPIES, RECORD, Copy, Record, bare, effective, escaped, op_of
from diffpeft.layers.mixes import ChoiceLike, SingleLike
from diffpeft.layers.parameters import ParameterFactors
from diffpeft.layers.slot import Slot, at_rest
from diffpeft.layers.tokens import Tokens
from diffpeft.methods.base import Geometry
from diffpeft.methods.linalg import wide_dtype

_TABLES = ("_parameters", "_buffers", "_modules")


class Actions(Protocol):
    """What is done to one module by itself."""

    def set_adapter(self, module: nn.Module, names: Sequence[str], inference_mode: bool) -> None:
        """These adapters of the component are active on the module, and trained there."""

    def enable(self, module: nn.Module, enabled: bool) -> None:
        """Those that are active act, or none does."""

    def set_strength(self, module: nn.Module, name: str, strength: float) -> None:
        """An adapter acts this strongly whenever it is active."""

    def scale(self, module: nn.Module, by: float) -> None:
        """The active adapters act so many times as strongly."""

    def train(self, module: nn.Module, names: Sequence[str], flag: bool) -> None:
        """Whether adapters are trained."""

    def merge(self, module: nn.Module, names: Sequence[str] | None) -> None:
        """Active adapters go into the weight."""

    def unmerge(self, module: nn.Module) -> None:
        """They come out again."""

    def delete(self, module: nn.Module, name: str) -> None:
        """An adapter goes."""


class Above:
    """Who acts: the floor above says so when it is imported."""

    actions: ClassVar[Actions]


class ReadAttribute:
    """An attribute that is read of a module that carries something, or with `bound` a method of it. It yields to what the module has itself."""

    def __init__(self, read: Callable[..., object], bound: bool = False):
        self.read, self.bound, self.__doc__ = read, bound, read.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> object:
        if module is None:
            return self
        held = module.__dict__
        for table in _TABLES:
            if self.name in held[table]:
                return held[table][self.name]
        if RECORD not in held:  # another thread has just taken the last adapter off
            raise AttributeError(f"{type(module).__name__!r} object has no attribute {self.name!r}")
        return MethodType(self.read, module) if self.bound else self.read(module)


action = functools.partial(ReadAttribute, bound=True)


class _ByName(dict[str, Tensor]):
    """Tensors by adapters' names, which are attributes too."""

    def __getattr__(self, name: str) -> Tensor:
        if name not in self:
            raise AttributeError(name)
        return self[name]


@dataclass(frozen=True)
class TokenRows:
    """Rows of a table that adapters train, by their names."""

    trainable_tokens_delta: Mapping[str, Tensor]
    token_indices: Mapping[str, list[int]]
    active_adapters: list[str]
    trainable_tokens_original: Mapping[str, Tensor]  # these rows as they are without adapters

    @property
    def active_adapter(self) -> list[str]:
        """The adapters that are active."""
        return self.active_adapters


class Views:
    """The attributes and methods of PEFT's layers, and of its modules that are trained whole."""

    _diffpeft: Record

    @ReadAttribute
    def adapter_layer_names(self) -> tuple[str, ...]:
        """The modules inside that hold adapters by their names."""
        modules = cast(nn.Module, self)._modules
        return tuple(name for name in (ADAPTERS, COPIES) if name in modules)

    @ReadAttribute
    def other_param_names(self) -> tuple[str, ...]:
        """Further tables of adapters: none."""
        return ()

    @ReadAttribute
    def active_adapters(self) -> list[str]:
        """The adapters that are active here, in order, whether they are enabled or not: on a layer all, else those that have copies or rows."""
        return _active(self._diffpeft)

    @ReadAttribute
    def active_adapter(self) -> list[str]:
        """The same."""
        return _active(self._diffpeft)

    @ReadAttribute
    def disable_adapters(self) -> bool:
        """Whether no adapter acts here because they are switched off."""
        return not _single(self._diffpeft).enabled

    @ReadAttribute
    def merged_adapters(self) -> list[str]:
        """The adapters that are in the weights, in order."""
        return [name for name in self._diffpeft.mix.fused if name in self._diffpeft.fused]

    @ReadAttribute
    def merged(self) -> bool:
        """Whether adapters are in the weights."""
        return bool(self._diffpeft.fused)

    @ReadAttribute
    def r(self) -> Mapping[str, int]:
        """{adapter: rank}."""
        return MappingProxyType({name: _rank(held) for name, held in _held(self._diffpeft).items()})

    @ReadAttribute
    def scaling(self) -> Mapping[str, float]:
        """{adapter: alpha / r times how strong it is when it is active}. To change it: `set_scale`."""
        record = self._diffpeft
        return MappingProxyType({name: held.scale * _strength(record, name) for name, held in _held(record).items()})

    @ReadAttribute
    def lora_alpha(self) -> Mapping[str, float]:
        """{adapter: the alpha by which alpha / r is its scale}."""
        return MappingProxyType({name: held.scale * _rank(held) for name, held in _held(self._diffpeft).items()})

    @ReadAttribute
    def in_features(self) -> int:
        """The features, channels or tokens that the layer takes."""
        return _geometry(cast(nn.Module, self)).in_

    @ReadAttribute
    def out_features(self) -> int:
        """The features or channels that it gives."""
        return _geometry(cast(nn.Module, self)).out

    @ReadAttribute
    def base_layer(self) -> nn.Module:
        """The layer as it is without adapters: the same parameters in a module that carries nothing. What is around the layer and asks is told of none."""
        if _is_asked_from_around():
            raise AttributeError("base_layer")
        _held(self._diffpeft)
        return bare(cast(nn.Module, self))

    @ReadAttribute
    def original_module(self) -> nn.Module:
        """The module that copies stand for, or whose rows are trained."""
        if not _rows(self._diffpeft):
            _copies(self._diffpeft)
        return bare(cast(nn.Module, self))

    @ReadAttribute
    def token_adapter(self) -> TokenRows:
        """The rows of the module that adapters train."""
        rows = _rows(self._diffpeft)
        if not rows:
            raise AttributeError(f"of module {self._diffpeft.where!r} no rows are trained")
        return TokenRows(
            _ByName({name: patch.delta for name, patch in rows.items()}),
            {name: patch.rows.tolist() for name, patch in rows.items()},
            [name for name in _single(self._diffpeft).active if name in rows],
            {name: _base_rows(cast(nn.Module, self), patch) for name, patch in rows.items()},
        )

    @ReadAttribute
    def modules_to_save(self) -> nn.ModuleDict:
        """The copies of the module, by adapters' names."""
        copies = nn.ModuleDict()
        copies._modules.update({name: held.module for name, held in _copies(self._diffpeft).items()})
        return copies

    @action
    def get_base_layer(self) -> nn.Module:
        """The layer as it is without adapters."""
        return bare(cast(nn.Module, self))

    @action
    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter alone changes in the layer's weight, at the strength that it has: W' - W, as the weight lies, in the adapter's dtype.

        Raises UnknownNameError.
        """
        return _delta(cast(nn.Module, self), self._diffpeft, adapter)

    @action
    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones of this layer, in this order, and those that are trained here (unless `inference_mode`)."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        Above.actions.set_adapter(cast(nn.Module, self), names, inference_mode)

    @action
    def enable_adapters(self, enabled: bool) -> None:
        """Switch this layer's adapters off, or on again. What is off is not trained."""
        Above.actions.enable(cast(nn.Module, self), enabled)

    @action
    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Whether adapters are trained on this layer, active or not."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        Above.actions.train(cast(nn.Module, self), names, requires_grad)

    @action
    def set_scale(self, adapter: str, scale: float) -> None:
        """Let an adapter act at `scale` times alpha / r on this layer. One that is not here is passed over."""
        if adapter in self._diffpeft.names:
            Above.actions.set_strength(cast(nn.Module, self), adapter, scale)

    @action
    def scale_layer(self, scale: float) -> None:
        """Let the active adapters of this layer act `scale` times as strongly."""
        if scale != 1:
            Above.actions.scale(cast(nn.Module, self), scale)

    @action
    def unscale_layer(self, scale: float | None = None) -> None:
        """Take that back; without a number let them act at alpha / r."""
        if scale is not None:
            return Above.actions.scale(cast(nn.Module, self), 1 / scale)
        for name in [name for name in _single(self._diffpeft).active if name in self._diffpeft.names]:
            Above.actions.set_strength(cast(nn.Module, self), name, 1.0)

    @action
    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Put adapters (by default all that are active here) into this layer's weight. What would not be finite is refused, with or without `safe_merge`."""
        Above.actions.merge(cast(nn.Module, self), adapter_names)

    @action
    def unmerge(self) -> None:
        """Take the adapters out of this layer's weight again, to the last bit."""
        Above.actions.unmerge(cast(nn.Module, self))

    @action
    def delete_adapter(self, adapter_name: str, new_active_adapters: Sequence[str] | None = None) -> None:
        """Remove an adapter from this layer. If no other was active here, the first that is left becomes so."""
        Above.actions.delete(cast(nn.Module, self), adapter_name)

    @action
    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """{key in a file: key here} of an adapter's copy of the module, or its rows of it."""
        held = self._diffpeft.beside(adapter_name, hidden=False)
        return {key: f"{COPIES}.{escaped(adapter_name)}.{key}" for module in held for key in module.state_dict()}


READ_ONLY = frozenset(name for name, view in vars(Views).items() if isinstance(view, ReadAttribute))


def refuse_written(module: nn.Module, name: str) -> None:
    """Raise AdapterStateError for a view that somebody wants to be something else."""
    if (
        name in READ_ONLY
        and RECORD in module.__dict__
        and module.__dict__[RECORD].slots
        and name not in module.__dict__
    ):
        raise AdapterStateError(
            f"{name} of an adapted layer can only be read",
            where=module.__dict__[RECORD].where,
            remedy="Use set_scale, set_adapter or enable_adapters.",
        )


def _is_asked_from_around() -> bool:
    """Whether a layer of peft's own that was put around this one goes inwards, where it is to find this one."""
    return str(sys._getframe(3).f_globals.get("__name__")).startswith("peft.")


def _single(record: Record) -> SingleLike:
    """What is set on one layer."""
    choice: ChoiceLike = record.mix.standing()
    return choice.single(record.index)


def _strength(record: Record, name: str) -> float:
    """How strong an adapter is on a layer when it is active; in the present step where that changes."""
    strength = _single(record).strengths.get(name, 1.0)
    return strength if isinstance(strength, float) else record.mix.current().strengths[name][record.index]


def _held(record: Record) -> dict[str, Slot | ParameterFactors]:
    """What adapters have on a layer that has a rank and a scale. Raises AttributeError for a module that only is trained whole, or rows of it."""
    factors = {name: patch for name, patch in record.patches.items() if isinstance(patch, ParameterFactors)}
    if not (record.slots or factors):
        raise AttributeError(f"module {record.where!r} has no adapter on its weight")
    return {**record.slots, **factors}


def _geometry(module: nn.Module) -> Geometry:
    """The sizes of a layer with adapters on it. Raises AttributeError for other modules."""
    if not module.__dict__[RECORD].slots:
        raise AttributeError(f"module {module.__dict__[RECORD].where!r} has no adapter on its weight")
    return op_of(module).geometry


def _active(record: Record) -> list[str]:
    """The adapters that are active on a module: on a layer all, as in PEFT, else those that have copies of it, or rows."""
    active = _single(record).active
    everywhere = record.slots or any(isinstance(patch, ParameterFactors) for patch in record.patches.values())
    return [name for name in active if everywhere or name in record.names]


def _base_rows(module: nn.Module, patch: Tokens) -> Tensor:
    """The rows of a table that a patch is for, without adapters."""
    record: Record = module.__dict__[RECORD]
    W = record.base["weight"] if record.base else cast(Tensor, module._parameters["weight"]).detach()
    return W[patch.rows.to(W.device)]


def _rows(record: Record) -> dict[str, Tokens]:
    """The rows of a module that adapters train."""
    return {name: patch for name, patch in record.patches.items() if isinstance(patch, Tokens)}


def _copies(record: Record) -> Mapping[str, Copy]:
    """The copies of a module. Raises AttributeError where there are none."""
    if not record.copies:
        raise AttributeError(f"module {record.where!r} has no copies")
    return record.copies


def _rank(held: Slot | ParameterFactors) -> int:
    return held.rank if isinstance(held, Slot) else len(held.lora_A.weight) // held.stack.experts


def _delta(module: nn.Module, record: Record, name: str) -> Tensor:
    """W' - W of one adapter on one module, of the last parameter if there are several."""
    if name not in _held(record):
        raise UnknownNameError.of("adapter", name, _held(record), where=record.where)
    held, s = _held(record)[name], _strength(record, name)
    if isinstance(held, ParameterFactors):
        parameter = held.stack.name
        W = record.base[parameter] if record.base else cast(Tensor, module._parameters[parameter]).detach()
        return (held.changed(parameter, torch.zeros_like(W, dtype=wide_dtype(W.dtype)), s)).to(held.lora_A.weight.dtype)
    op = op_of(module)
    W = op.stored(op.weight()) if record.base is None else record.base["weight"]
    dtype = wide_dtype(W.dtype)
    # what adds the same to every weight is told from zero, to the last bit
    W = torch.zeros_like(W, dtype=dtype) if all(part.additive for part in held.parts) else W.detach().to(dtype)
    with at_rest(held):
        changed = effective(module, [(held, s)], dtype, {"weight": W.to(held.weight.device)})["weight"]
    return (changed - W.to(changed.device)).to(held.weight.dtype)
