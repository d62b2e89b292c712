"""`ensure_weight_tying`: what an adapter has on modules that share a weight (the head and the embedding, mostly) is tied as well."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from diffpeft.errors import CheckpointError, ConfigError, ConfigWarning, listed, shown
from diffpeft.methods.peft_config import PeftType
from diffpeft.model.ties import FIELD, tied_to_embedding

_INITS = (True, False, "gaussian")  # those that a tied LoRA may have


def ties_of(model: nn.Module, config: object, names: Iterable[str]) -> dict[str, str]:
    """{module: the one that it is to be tied to} where `ensure_weight_tying` says so, and one of the tied modules is among `names`."""
    if not getattr(config, "ensure_weight_tying", False):
        return {}
    ties = tied_to_embedding(model)
    return ties if {*names} & ({*ties} | {*ties.values()}) else {}


def check_tying(model: nn.Module, config: object, wholes: Iterable[str], layers: Iterable[str]) -> None:
    """Warn, as PEFT does, where `ensure_weight_tying` has nothing to do, or is not set where it might be. `wholes` are trained in copies, `layers` adapted."""
    ties = tied_to_embedding(model)
    tied = {*ties, *ties.values()}
    if not getattr(config, "ensure_weight_tying", False):
        for names, what in ((wholes, "their copies are"), (layers, "what adapts them is")):
            if loose := [name for name in names if name in tied]:
                warnings.warn(
                    f"Model has `{FIELD}=True` and a tied layer is part of the adapter, but {_why_loose(config)}: {listed(loose)} share "
                    f"their weight with another module, {what} trained apart, and merging unties them.",
                    ConfigWarning,
                    stacklevel=5,
                )
    elif not ties:
        rows = ": ensure_weight_tying=True but the model does not have tied weights"
        warnings.warn(
            "You have requested `ensure_weight_tying`, but no tied modules were found in the model"
            + (rows if getattr(config, "trainable_token_indices", None) else ""),
            ConfigWarning,
            stacklevel=5,
        )
    elif tied.isdisjoint({*wholes, *layers}) and not getattr(config, "trainable_token_indices", None):
        warnings.warn(
            "You have requested `ensure_weight_tying`, but no tied modules are added in either `modules_to_save` or `target_modules`",
            ConfigWarning,
            stacklevel=5,
        )


def _why_loose(config: object) -> str:
    """Why what an adapter has on tied modules is not tied, in PEFT's words."""
    if "ensure_weight_tying" in getattr(config, "__dataclass_fields__", ()):
        return "`ensure_weight_tying` is not set to True"
    return "no implementation exists to tie the adapters"


def twinned(
    layers: Mapping[str, nn.Module], model: nn.Module, config: object
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers with those that are tied to one of them, and {layer: the one whose LoRA it gets, turned}. Raises ConfigError where there is no such LoRA."""
    ties = ties_of(model, config, layers)
    if not ties:
        return dict(layers), {}
    source = next(iter(ties.values()))
    plain = {"peft_type": (PeftType.LORA,), "use_dora": (False,), "lora_bias": (False,), "init_lora_weights": _INITS}
    for name, allowed in plain.items():
        if getattr(config, name, allowed[0]) not in allowed:
            raise ConfigError(
                f"{name} is {shown(getattr(config, name))}, and ensure_weight_tying ties the LoRA of {shown(source)} to others",
                remedy=f"It is {' or '.join(map(repr, allowed))} there.",
            )
    tied = {name: model.get_submodule(name) for name in (source, *ties)}
    return {**layers, **tied}, ties


def check_alike(ties: Mapping[str, str], tensors: Mapping[str, Mapping[str, Any]], source: str) -> None:
    """Raise CheckpointError if a file has different weights for modules that it says are tied."""
    for one, other in ties.items():
        a, b = (tensors.get(name, {}).get("weight") for name in (one, other))
        if a is not None and b is not None and not torch.equal(a, b):
            raise CheckpointError(
                f"ensure_weight_tying is set, and the weights of {shown(one)} and {shown(other)} differ",
                where=source,
                remedy="Set it to false to train them apart.",
            )
