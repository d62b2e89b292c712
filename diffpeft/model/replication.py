"""`layer_replication`: a stack of layers made deeper by repeating some, with shared weights and an adapter for each.

Repeating spans of layers and training on is depth up-scaling (Kim et al. 2023, SOLAR, arXiv:2312.15166).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from diffpeft.errors import ConfigError, shown
from diffpeft.model.attach import mixes_of
from diffpeft.model.plan import Plan

_INNER = ("model", "bert", "transformer")  # from a model with a head to the one below
_STACKS = (("", "layers"), ("encoder", "layer"), ("", "h"))  # (module, its list): Llama, BERT, Falcon and GPT-2


def plan_replicated(plan: Plan, model: nn.Module, spans: Sequence[Sequence[int]]) -> None:
    """Plan to repeat the layers of a model by spans [start, end). Taking adapters off later leaves the stack so.

    Raises ConfigError where the model has adapters, or its list of layers is not known or has too few.
    """
    if mixes_of({"": model}):
        raise ConfigError(
            f"layer_replication is {shown(spans)}, and the model has adapters on other layers",
            remedy="Repeat layers with the first adapter; further ones say the same or nothing.",
        )
    inner, owner, name = _stack(model)
    before = owner._modules[name]
    layers = list(before)
    order = _order(spans, len(layers))
    stack = nn.ModuleList(_shared(layers[i], place) for place, i in enumerate(order))
    plan.entry(owner._modules, name, stack.train(before.training))
    config: Any = getattr(inner, "config", None)
    if hasattr(config, "num_hidden_layers"):
        plan.set(config, num_hidden_layers=len(order))
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list) and len(kinds) == len(layers):
        plan.set(config, layer_types=[kinds[i] for i in order])


def same_spans(one: Sequence[Sequence[int]] | None, other: Sequence[Sequence[int]]) -> bool:
    """Whether two configs repeat the same layers."""
    return bool(one) and [*map(tuple, one or ())] == [*map(tuple, other)]


def _stack(model: nn.Module) -> tuple[object, Any, str]:
    """The innermost model, the module that has the list of layers, and what the list is called there."""
    inner = model
    while (
        below := next((m for name in _INNER if isinstance(m := getattr(inner, name, None), nn.Module)), None)
    ) is not None:
        inner = below
    for where, name in _STACKS:
        owner = getattr(inner, where, None) if where else inner
        if isinstance(getattr(owner, name, None), nn.ModuleList):
            return inner, owner, name
    raise ConfigError(
        "layer_replication: could not locate the layers attribute in the model",
        where=type(model).__name__,
        remedy="Models like Llama, BERT, Falcon and GPT-2 have a known list of layers.",
    )


def _order(spans: Sequence[Sequence[int]], total: int) -> list[int]:
    """The numbers of the layers, in the new order."""
    order: list[int] = []
    for span in spans:
        ok = isinstance(span, (list, tuple)) and len(span) == 2 and all(type(n) is int for n in span)
        if not ok or not 0 <= span[0] < span[1] <= total:
            raise ConfigError(
                f"layer_replication has {shown(span)}",
                remedy=f"It is a list of [start, end) with 0 <= start < end <= {total}.",
            )
        order += range(*span)
    return order


def _shared(layer: nn.Module, place: int) -> nn.Module:
    """A layer like this one with the same parameters, at another place of the stack."""
    clone = copy.deepcopy(layer, {id(p): p for p in layer.parameters()})
    for module in clone.modules():
        if hasattr(module, "layer_idx"):  # where its keys and values are in a cache
            module.layer_idx = place  # type: ignore[assignment]
    return clone
