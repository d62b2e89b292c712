"""The LoRA methods of a pipeline, in place of those of `diffusers.loaders.lora_base.LoraBaseMixin` of the same names.

What a pipeline's own mixin adds to these (defaults, Flux's norms) stays diffusers': it calls them by `super()`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from diffpeft.errors import (
    ConfigError,
    MissingKeysError,
    ShapeMismatchError,
    UnknownKeysError,
    UnknownNameError,
    listed,
    shown,
)
from diffpeft.model.plan import Plan, planned
from diffpeft.model.target import COMPILED, adapted
from diffpeft.pipeline.hotswap import replace
from diffpeft.pipeline.load import load_lora
from diffpeft.takeover import acts
from diffpeft.takeover.components import ROOM, Weight, fresh_name, strengths_of
from diffpeft.takeover.sources import Source, located

_Loader = Callable[..., None]
# what diffusers may read where diffpeft finds no adapter for the model: layers that it makes wider first, files without a key for it
_FOR_DIFFUSERS = (UnknownKeysError, MissingKeysError, ShapeMismatchError)
_WIDEN = "_maybe_expand_transformer_param_shape_or_error_"


def loadable(pipe: object) -> list[str]:
    """The components that a pipeline's LoRA methods are for, whether it has them or not."""
    return list(getattr(pipe, "_lora_loadable_modules", ()))


def models_of(pipe: object) -> dict[str, nn.Module]:
    """{component: model} of those that the pipeline's LoRA methods are for."""
    modules = {name: getattr(pipe, name, None) for name in loadable(pipe)}
    return {name: getattr(m, COMPILED, m) for name, m in modules.items() if isinstance(m, nn.Module)}


class PipelineMethods:
    """Those of LoraBaseMixin."""

    _lora_loadable_modules: Sequence[str]
    _merged_adapters: set[str]  # what was in the weights when `unload_lora_weights` took adapters off

    def unload_lora_weights(self) -> None:
        """Take all adapters off. Those that are in the weights stay there."""
        fused = self._in_weights()
        with planned(models_of(self)) as plan:
            for model in models_of(self).values():
                acts.plan_unloaded(plan, model)
        self._merged_adapters = self._merged_adapters | fused

    def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
        **kwargs: object,
    ) -> None:
        """Put active adapters, or those that are named, into the weights of components. What would not be finite is refused in any case."""
        models = self._chosen(components)
        with planned(models) as plan:
            for model in models.values():
                acts.plan_fused_on(plan, model, adapter_names, lora_scale)

    def unfuse_lora(self, components: Sequence[str] | None = None, **kwargs: object) -> None:
        """Take the adapters out of the weights of components again, to the last bit; each is as strong as before."""
        models = self._chosen(components)
        with planned(models) as plan:
            for model in models.values():
                acts.plan_unfused_on(plan, model)
        self._merged_adapters = self._merged_adapters & self._in_weights()

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: Weight | list[Weight] | None = None
    ) -> None:
        """Make adapters the active ones, each with a weight, or weights by component and block: in all components at once."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = _weights(self, names, adapter_weights)
        models = models_of(self)
        with planned(models) as plan:
            for component, model in models.items():
                told = [_of_component(weight, component) for weight in weights]
                acts.plan_active(plan, model, names, strengths_of(model, names, told))

    def disable_lora(self) -> None:
        """Let no adapter act until `enable_lora`."""
        self._enable(False)

    def enable_lora(self) -> None:
        """Let active adapters act again."""
        self._enable(True)

    def _enable(self, enabled: bool) -> None:
        with planned(models_of(self)) as plan:
            for model in models_of(self).values():
                acts.plan_enabled(plan, model, enabled)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Take adapters off. Where none is active then, the first that is left becomes so."""
        acts.delete(models_of(self).values(), [adapter_names] if isinstance(adapter_names, str) else adapter_names)

    def get_active_adapters(self) -> list[str]:
        """The active adapters, in order: those of the last component that has adapters, as in diffusers."""
        having = [model for model in models_of(self).values() if acts.adapters_on(model)]
        return acts.active_on(having[-1]) if having else []

    def get_list_adapters(self) -> dict[str, list[str]]:
        """{component: its adapters} of the components that have any."""
        adapters = {component: acts.adapters_on(model) for component, model in models_of(self).items()}
        return {component: names for component, names in adapters.items() if names}

    def set_lora_device(self, adapter_names: Sequence[str], device: torch.device | str | int) -> None:
        """Move adapters' tensors to a device."""
        acts.move(models_of(self).values(), adapter_names, device)

    @property
    def fused_loras(self) -> set[str]:
        """The adapters that are in the weights, those among them that `unload_lora_weights` has left there."""
        return {*self._merged_adapters} | self._in_weights()

    @property
    def num_fused_loras(self) -> int:
        """How many these are."""
        return len(self.fused_loras)

    def _in_weights(self) -> set[str]:
        return {name for model in models_of(self).values() for name in acts.fused_on(model)}

    def _chosen(self, components: Sequence[str] | None) -> dict[str, nn.Module]:
        """The models of components. Raises ConfigError for none, and for what has no LoRA methods."""
        if not components:
            raise ConfigError("`components` cannot be an empty list", remedy="Name components of the pipeline.")
        for name in components:
            if name not in self._lora_loadable_modules:
                raise ConfigError(f"{name} is not found in {self._lora_loadable_modules=}")
        return {name: model for name, model in models_of(self).items() if name in components}


def _known(pipe: object) -> list[str]:
    """The adapters of all components."""
    return [*dict.fromkeys(name for model in models_of(pipe).values() for name in acts.adapters_on(model))]


def _weights(pipe: object, names: Sequence[str], weights: object) -> list[object]:
    """The weight of each adapter. Raises ConfigError or UnknownNameError; warns of components that are not there as diffusers does."""
    if isinstance(weights, Mapping):
        strange = sorted({*weights} - {*loadable(pipe)})
        if strange:
            _log(
                f"The following components in `adapter_weights` are not part of the pipeline: {strange}. "
                f"Available components that are LoRA-compatible: {loadable(pipe)}. So, weights belonging "
                "to the invalid components will be removed and ignored."
            )
        weights = {component: weight for component, weight in weights.items() if component not in strange}
    told = list(copy.deepcopy(weights)) if isinstance(weights, (list, tuple)) else [weights] * len(names)
    if len(told) != len(names):
        raise ConfigError(
            f"Length of adapter names {len(names)} is not equal to the length of the weights {len(told)}",
            remedy="Pass a weight for each.",
        )
    known = _known(pipe)
    if missing := {*names} - {*known}:
        raise UnknownNameError(f"Adapter name(s) {missing} not in the list of present adapters: {{{listed(known)}}}")
    _warn_absent(pipe, names, told)
    return told


def _warn_absent(pipe: object, names: Sequence[str], weights: Sequence[object]) -> None:
    """Warn, as diffusers does, of weights for components in which an adapter has nothing."""
    having = {component: acts.adapters_on(model) for component, model in models_of(pipe).items()}
    for name, weight in zip(names, weights, strict=True):
        for component in weight if isinstance(weight, Mapping) else ():
            if name not in having.get(component, ()):
                parts = [part for part, adapters in having.items() if name in adapters]
                _log(
                    f"Lora weight dict for adapter '{name}' contains {component},"
                    f"but this will be ignored because {name} does not contain weights for {component}."
                    f"Valid parts for {name} are: {parts}."
                )


def _of_component(weight: object, component: str) -> Weight:
    return cast(Weight, weight.get(component) if isinstance(weight, Mapping) else weight)


def _log(message: str) -> None:
    from diffusers.utils import logging

    logging.get_logger("diffusers.loaders.lora_base").warning(message)


def loading_methods(base: type) -> dict[str, object]:
    """`load_lora_weights` through diffpeft for a pipeline's class, and its other loaders without their question for peft."""
    asking = {name for name in dir(base) if name.startswith("load_lora_into_")}
    members: dict[str, object] = {
        name: classmethod(inspect.unwrap(getattr(base, name).__func__))
        for name in asking
        if inspect.ismethod(getattr(base, name))
    }
    if hasattr(base, _WIDEN):
        members[_WIDEN] = classmethod(_widening(getattr(base, _WIDEN).__func__))
    theirs: _Loader = inspect.unwrap(base.load_lora_weights)  # type: ignore[attr-defined]

    def load_lora_weights(
        self: object,
        pretrained_model_name_or_path_or_dict: Source,
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: object,
    ) -> None:
        load(self, pretrained_model_name_or_path_or_dict, adapter_name, hotswap, kwargs, theirs)

    load_lora_weights.__doc__ = (
        "Load an adapter in any format that diffpeft reads, as the only active one. The arguments are diffusers'."
    )
    return {**members, "load_lora_weights": load_lora_weights}


def _widening(widen: Callable[..., bool]) -> Callable[..., bool]:
    """diffusers' function that puts wider layers into a transformer, which refuses layers with adapters on them."""

    def refusing(
        cls: type,
        transformer: nn.Module,
        lora_state_dict: Mapping[str, Tensor] | None = None,
        *args: object,
        **kw: object,
    ) -> bool:
        for name, module, _ in adapted(transformer):
            factor = (lora_state_dict or {}).get(f"{getattr(cls, 'transformer_name', '')}.{name}.lora_A.weight")
            features = getattr(module, "in_features", 0)
            if factor is not None and factor.shape[1] > features:
                raise ShapeMismatchError(
                    f"the layer has {features} features, the adapter {factor.shape[1]}, and other adapters are on it",
                    where=name,
                    remedy="Call unload_lora_weights first.",
                )
        return widen(cls, transformer, lora_state_dict, *args, **kw)

    return refusing


def load(
    pipe: object,
    source: Source,
    name: str | None,
    hotswap: bool,
    options: Mapping[str, object],
    theirs: _Loader,
) -> None:
    """Load an adapter as the only active one of the components that it has something for, or put it in the place of one that is there.

    Args:
        theirs: diffusers' own loader for the pipeline, for what it alone can read.

    Raises CheckpointError and its kin, UnknownNameError, AdapterStateError, or what diffusers raises for files that are not there; nothing has
    changed then.
    """
    known = _known(pipe)
    if hotswap and name not in known:
        raise UnknownNameError(
            f"Trying to hotswap LoRA adapter {shown(name)} but there is no existing adapter by that name",
            remedy="Please choose an existing adapter name or set `hotswap=False` to prevent hotswapping.",
        )
    name = fresh_name(known) if name is None else name
    if any(option.startswith("load_into_") for option in options):  # the same keys, for another component
        theirs(pipe, source, name, hotswap, **options)
        return
    place = located(source, options)
    try:
        if hotswap:
            replace(pipe, name, place)
        else:
            load_lora(pipe, place, name=name, strict=False, max_rank=_room(pipe))
    except _FOR_DIFFUSERS:
        if not _read_by_diffusers(pipe, source, name, hotswap, options, theirs):
            raise
    if not hotswap:
        _activate(pipe, name)


def _activate(pipe: object, name: str) -> None:
    """Make an adapter the only active one of the components that have it."""
    models = [model for model in models_of(pipe).values() if name in acts.adapters_on(model)]
    with planned({str(place): model for place, model in enumerate(models)}) as plan:
        for model in models:
            acts.plan_active(plan, model, [name])
            _plan_no_room(plan, model)


def _plan_no_room(plan: Plan, model: nn.Module) -> None:
    """Plan that the next adapter gets no more room than it needs."""
    if ROOM in model.__dict__:
        plan.set(model, **{ROOM: None})


def _room(pipe: object) -> int | None:
    """The rank up to which adapters are to be swapped, if `enable_lora_hotswap` was told one."""
    told = [getattr(model, ROOM, None) for model in models_of(pipe).values()]
    return max((int(room["target_rank"]) for room in told if room), default=None)


def _read_by_diffusers(
    pipe: object, source: Source, name: str, hotswap: bool, options: Mapping[str, object], theirs: _Loader
) -> bool:
    """Whether diffusers makes something of a file. What fails leaves nothing of the adapter."""
    new = name not in _known(pipe)
    try:
        theirs(pipe, source, name, hotswap, **options)
    except Exception:
        if new:
            acts.delete(models_of(pipe).values(), [name])
        return False
    return True
