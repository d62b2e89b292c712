"""What PEFT has in `peft.helpers`, for the methods that are here."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Iterator
from types import MethodType

from torch import nn

from diffpeft.errors import ConfigError, shown
from diffpeft.layers.caching import DoraCaching
from diffpeft.layers.kinds import LoraLayer
from diffpeft.llm.config import PeftConfig
from diffpeft.llm.peft_model import PeftModel, users_model
from diffpeft.model.single import rescaled

__all__ = [
    "DoraCaching",
    "check_if_peft_model",
    "disable_input_dtype_casting",
    "rescale_adapter_scale",
    "update_forward_signature",
    "update_generate_signature",
    "update_signature",
]


def check_if_peft_model(model_name_or_path: str | os.PathLike[str]) -> bool:
    """Whether a folder, or a repository on the Hub, holds the config of an adapter."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except Exception:  # whatever the Hub's client raises
        return False
    return True


@contextlib.contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """A block in which all LoRAs of a model, wrapped or not, act `multiplier` times as strongly, merges included.

    Raises TypeError for what is no number, ConfigError (a ValueError) for a model without LoRAs, AdapterStateError for LoRAs that are merged already.
    """
    if not isinstance(multiplier, (float, int)):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    base = users_model(model)
    if not any(isinstance(module, LoraLayer) for module in base.modules()):
        raise ConfigError(
            "scaling is only supported for models with `LoraLayer`s", remedy="Use diffpeft.adapters for other methods."
        )
    with rescaled(base, LoraLayer.names, multiplier):
        yield


@contextlib.contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """A block in which inputs are not cast to the dtype of an adapter. Here they never are: an adapter computes in the dtype of what its layer gets."""
    yield


def update_forward_signature(model: PeftModel) -> None:
    """Give `model.forward` the name, the annotations and the documentation of the user's model's, if it takes `*args, **kwargs` alone."""
    _update(model, "forward")


def update_generate_signature(model: PeftModel) -> None:
    """The same for `model.generate`."""
    _update(model, "generate")


def update_signature(model: PeftModel, method: str = "all") -> None:
    """The same for `forward`, for `generate`, or for both (`all`). Raises ConfigError for another word."""
    methods = ("forward", "generate")
    if method not in (*methods, "all"):
        raise ConfigError(
            f"method {method} is not supported please choose one of ['forward', 'generate', 'all']",
            where=f"method is {shown(method)}",
        )
    for name in methods if method == "all" else (method,):
        _update(model, name)


_OPEN = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _update(model: PeftModel, name: str) -> None:
    """Let one of a PeftModel's methods look like that of the user's model."""
    present, shown_as = getattr(model, name, None), getattr(type(model.get_base_model()), name, None)
    if present is None or shown_as is None:
        return
    if any(parameter.kind not in _OPEN for parameter in inspect.signature(present).parameters.values()):
        return

    @functools.wraps(shown_as, assigned=("__doc__", "__name__", "__annotations__"))
    def method(self: PeftModel, *args: object, **kwargs: object) -> object:
        return getattr(type(self), name)(self, *args, **kwargs)

    setattr(model, name, MethodType(method, model))
