"""take_over and release: a diffusers pipeline whose own LoRA methods act through diffpeft, and back.

As with layers (docs/decisions/001) the pipeline gets a subclass of its class, and so do its models. In both, ours stands directly before the mixin of
diffusers (or transformers) whose methods it replaces, so that what a pipeline's own class adds to them stays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from diffpeft.errors import AdapterStateError, ConfigError
from diffpeft.layers.swap import subclass
from diffpeft.model.root import TAKEN, class_under, put_class_under
from diffpeft.model.target import within_pefts
from diffpeft.takeover import acts
from diffpeft.takeover.components import DenoiserMethods, EncoderMethods
from diffpeft.takeover.pipelines import PipelineMethods, loading_methods, models_of

Pipeline = TypeVar("Pipeline")


def take_over(pipe: Pipeline) -> Pipeline:
    """Let a pipeline's own LoRA methods, and those of its models, act through diffpeft; the pipeline.

    `load_lora_weights`, `set_adapters`, `fuse_lora`, `unload_lora_weights` and the others keep diffusers' arguments and errors. peft need not be
    installed. A pipeline that is made of its components (`from_pipe`) is to be taken over itself. Adapters that diffpeft has loaded stay as they are.

    Raises ConfigError for what has no LoRA methods, AdapterStateError if peft's adapters are on it; nothing has changed then.

    Example:
        >>> pipe = diffpeft.take_over(StableDiffusionPipeline.from_pretrained("..."))
        >>> pipe.load_lora_weights("style.safetensors", adapter_name="style")
        >>> pipe.set_adapters("style", 0.8)
    """
    _check(pipe)
    take_models(pipe)
    cls: type = type(pipe)
    if not hasattr(cls, TAKEN):
        object.__setattr__(pipe, "__class__", _pipeline_class(cls))
    return pipe


def release(pipe: Pipeline) -> Pipeline:
    """Give a pipeline and its models their own classes back; the pipeline. Nothing of `take_over` stays.

    Adapters that are on it stay on, as after `load_lora`: what was active is so, what is fused is fused, and diffpeft's functions go on with them.
    """
    cls = getattr(type(pipe), TAKEN, None)
    if cls is None:
        return pipe
    for model in models_of(pipe).values():
        plain = getattr(class_under(model), TAKEN, None)
        if plain is not None:
            put_class_under(model, plain)
        model.__dict__.pop(acts.COMPONENT, None)
        model.__dict__.pop(acts.BEFORE, None)
    object.__setattr__(pipe, "__class__", cls)
    return pipe


def take_models(pipe: object) -> None:
    """Give a pipeline's models the classes in which their LoRA methods are ours."""
    for component, model in models_of(pipe).items():
        cls = class_under(model)
        if not hasattr(cls, TAKEN) and _methods_of(cls) is not None:
            model.__dict__[acts.COMPONENT] = component
            put_class_under(model, _model_class(cls))


def _check(pipe: object) -> None:
    from diffusers.loaders.lora_base import LoraBaseMixin

    if not isinstance(pipe, LoraBaseMixin):
        raise ConfigError(
            f"a {type(pipe).__name__} has none of diffusers' LoRA methods", remedy="Use diffpeft.load_lora and its kin."
        )
    foreign = [name for name, model in models_of(pipe).items() if within_pefts(model)]
    if foreign:
        raise AdapterStateError(
            "adapters of peft are on it",
            where=", ".join(foreign),
            remedy="Call its unload_lora_weights first, then take_over, and load them again.",
        )


def _methods_of(cls: type) -> type | None:
    """Our methods over the mixin that a model's class has its own from; None for a class without."""
    return next((ours for mixin, ours in _mixins().items() if issubclass(cls, mixin)), None)


@functools.cache
def _mixins() -> dict[type, type]:
    """{mixin of diffusers or transformers: ours, which stands before it}."""
    from diffusers.loaders.peft import PeftAdapterMixin as OfDenoisers
    from transformers.integrations import PeftAdapterMixin as OfEncoders

    return {
        mixin: type(ours.__name__, (ours, mixin), {})
        for mixin, ours in ((OfDenoisers, DenoiserMethods), (OfEncoders, EncoderMethods))
    }


@functools.cache
def _base_methods() -> type:
    from diffusers.loaders.lora_base import LoraBaseMixin

    return type(PipelineMethods.__name__, (PipelineMethods, LoraBaseMixin), {})


_classes: dict[type, type] = {}


def _model_class(base: type[nn.Module]) -> type[nn.Module]:
    if base not in _classes:
        methods = _methods_of(base)
        assert methods is not None
        _classes[base] = subclass(base, _model_class, TAKEN, beside=(methods,), alike=True)
    return _classes[base]


def _setting(base: type) -> Callable[[object, str, object], None]:
    """`__setattr__` of a pipeline that takes over what is put in as one of its models."""

    assign: Callable[..., None] = base.__setattr__

    def set_(pipe: object, name: str, value: object) -> None:
        assign(pipe, name, value)
        if isinstance(value, nn.Module):
            take_models(pipe)

    return set_


def _pipeline_class(base: type) -> type:
    if base not in _classes:
        make: Callable[..., type] = subclass
        members = {"__setattr__": _setting(base), **loading_methods(base)}
        _classes[base] = make(base, _pipeline_class, TAKEN, beside=(_base_methods(),), alike=True, **members)
    return _classes[base]
