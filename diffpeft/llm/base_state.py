"""The state dict of the user's model under the adapters, by the keys that it has without them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from diffpeft.errors import AdapterStateError, MissingKeysError, UnknownKeysError, listed, near
from diffpeft.llm.peft_model import users_model
from diffpeft.model.activation import fused_of
from diffpeft.model.state import base_tensors
from diffpeft.model.target import COMPILED


class BaseKeys(NamedTuple):
    """The keys of a base model that were not given, and those that it has not."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """{key: tensor} of the user's model without its adapters, the tensors themselves; with merged adapters the weights that they are in."""
    return base_tensors(_base(model))


def set_base_model_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> BaseKeys:
    """Put tensors into the user's model under its adapters. -> missing_keys, unexpected_keys.

    Raises MissingKeysError or UnknownKeysError (RuntimeErrors) where `strict`, AdapterStateError while adapters are merged; the model has not changed then.
    """
    base = _base(model)
    if fused := fused_of(base):
        raise AdapterStateError(f"adapters {listed(fused)} are merged", remedy="Call unmerge_adapter first.")
    known = get_base_model_state_dict(model)
    missing = [key for key in known if key not in state_dict]
    unexpected = [key for key in state_dict if key not in known]
    if strict and unexpected:
        raise UnexpectedBaseKeysError(
            f"Unexpected key(s) in state_dict: {listed(unexpected)}", remedy=near(unexpected[0], known)
        )
    if strict and missing:
        raise MissingBaseKeysError(
            f"Missing key(s) in state_dict: {listed(missing)}", remedy="Give all, or strict=False."
        )
    base.load_state_dict({key: tensor for key, tensor in state_dict.items() if key in known}, strict=False)
    return BaseKeys(missing, unexpected)


class MissingBaseKeysError(MissingKeysError, RuntimeError):
    """What torch raises for keys that are missing."""


class UnexpectedBaseKeysError(UnknownKeysError, RuntimeError):
    """What torch raises for keys that no tensor has."""


def _base(model: nn.Module) -> nn.Module:
    """The user's model in a PeftModel, or with adapters on it."""
    return users_model(getattr(model, COMPILED, model))
