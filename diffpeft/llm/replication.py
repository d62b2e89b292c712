"""`layer_replication`: a stack of layers made deeper by repeating some, with shared weights and an adapter for each.

Repeating spans of layers and training on is depth up-scaling (Kim et al. 2023, SOLAR, arXiv:2312.15166).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from diffpeft.errors import ConfigError, shown
from diffpeft.model.attach import mixes_of

_INNER = ("model", "bert", "transformer")  # from a model with a head to the one below
_STACKS = (("", "layers"), ("encoder", "layer"), ("", "h"))  # (module, its list): Llama, BERT, Falcon and GPT-2


@contextmanager
def replicated(model: nn.Module, config: Any, others: dict[str, Any]) -> Iterator[None]:
    """The model with its layers repeated as a config says; if the block raises, as it was. `others` are the configs of the adapters that are on it.

    Taking adapters off later leaves the stack as it is here. Raises ConfigError where the list of layers is not known, or has too few.
    """
    spans = getattr(config, "layer_replication", None)
    if not spans or any(_same(getattr(other, "layer_replication", None), spans) for other in others.values()):
        yield
        return
    if mixes_of({"": model}):
        raise ConfigError(
            f"layer_replication is {shown(spans)}, and the model has adapters on other layers",
            remedy="Repeat layers with the first adapter; further ones say the same or nothing.",
        )
    undo = _replicate(model, spans)
    try:
        yield
    except BaseException:
        undo()
        raise


def _same(a: Any, b: Any) -> bool:
    return bool(a) and [*map(tuple, a)] == [*map(tuple, b)]


def _replicate(model: Any, spans: Any) -> Any:
    """Put the new stack in place; what undoes that."""
    inner, owner, name = _stack(model)
    layers = list(getattr(owner, name))
    order = _order(spans, len(layers))
    stack = nn.ModuleList(_shared(layers[i], place) for place, i in enumerate(order))
    config: Any = getattr(inner, "config", None)
    fields: dict[str, Any] = {}
    if hasattr(config, "num_hidden_layers"):
        fields["num_hidden_layers"] = config.num_hidden_layers, len(order)
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list) and len(kinds) == len(layers):
        fields["layer_types"] = kinds, [kinds[i] for i in order]
    old = owner._modules[name]
    owner._modules[name] = stack.train(old.training)
    for field, (_, new) in fields.items():
        setattr(config, field, new)

    def undo() -> None:
        owner._modules[name] = old
        for field, (before, _) in fields.items():
            setattr(config, field, before)

    return undo


def _stack(model: Any) -> tuple[Any, Any, str]:
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


def _order(spans: Any, total: int) -> list[int]:
    """The numbers of the layers, in the new order."""
    found: list[int] = []
    for span in spans:
        ok = isinstance(span, (list, tuple)) and len(span) == 2 and all(type(n) is int for n in span)
        if not ok or not 0 <= span[0] < span[1] <= total:
            raise ConfigError(
                f"layer_replication has {shown(span)}",
                remedy=f"It is a list of [start, end) with 0 <= start < end <= {total}.",
            )
        found += range(*span)
    return found


def _shared(layer: nn.Module, place: int) -> nn.Module:
    """A layer like this one with the same parameters, at another place of the stack."""
    clone = copy.deepcopy(layer, {id(p): p for p in layer.parameters()})
    for module in clone.modules():
        if hasattr(module, "layer_idx"):  # where its keys and values are in a cache
            module.layer_idx = place  # type: ignore[assignment]
    return clone
