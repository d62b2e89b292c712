"""Weights that modules of a language model share: the head's and the embedding's, mostly. What shares them is found by the Parameter, what ought to by transformers' declaration."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from diffpeft.errors import listed
from diffpeft.model.attach import Plan

FIELD = "tie_word_embeddings"
Holder = tuple[dict[str, Any], str]  # a module's table of parameters, and a name in it


def loosen(plan: Plan, model: nn.Module) -> None:
    """Add to a plan what a model must know of the ties that the plan undoes, so that it can be saved and loaded: `tie_word_embeddings=False`. Warns.

    Where some declared ties remain, or the config's class does not let the field be False (T5), it stays True: transformers leaves weights alone that
    a file holds apart.
    """
    later = {(id(table), name): new for table, name, new in plan.held}
    for prefix, module in model.named_modules():
        ties = list(_declared(module))
        broken = [
            target
            for target, one, other in ties
            if one[0][one[1]] is other[0][other[1]] and _then(later, one) is not _then(later, other)
        ]
        if not broken:
            continue
        config: Any = module.config
        whole = not any(_then(later, one) is _then(later, other) for _, one, other in ties) and _may_be_untied(config)
        said = f"Setting `{FIELD}=False` in the model config." if whole else "They are saved apart."
        warnings.warn(
            f"Input and output embeddings are no longer tied after merging: {listed(f'{prefix}.{t}'.strip('.') for t in broken)}. {said}",
            stacklevel=4,
        )
        if whole:
            plan.settings.append((config, FIELD, False))
    _forget(plan, model, later)


def _declared(module: Any) -> Iterator[tuple[str, Holder, Holder]]:
    """(name of the target, the target, the source) of the ties that a model of transformers declares, or of its head and its embedding."""
    if getattr(getattr(module, "config", None), FIELD, False) is not True:
        return
    if hasattr(module, "get_expanded_tied_weights_keys"):
        for target, source in module.get_expanded_tied_weights_keys(all_submodels=False).items():
            one, other = _holder(module, target), _holder(module, source)
            if one and other:
                yield target, one, other
    elif hasattr(module, "get_input_embeddings") and hasattr(module, "get_output_embeddings"):
        embeddings = module.get_output_embeddings(), module.get_input_embeddings()
        if all(isinstance(m, nn.Module) and m._parameters.get("weight") is not None for m in embeddings):
            yield "the output embeddings", *((m._parameters, "weight") for m in embeddings)  # type: ignore[misc]


def _holder(model: nn.Module, name: str) -> Holder | None:
    """Where a parameter is held, if it is there."""
    *path, last = name.split(".")
    module: Any = model
    for segment in path:
        module = module._modules.get(segment)
        if module is None:
            return None
    return (module._parameters, last) if module._parameters.get(last) is not None else None


def _then(later: Any, holder: Holder) -> Any:
    """The parameter that will be there."""
    table, name = holder
    return later.get((id(table), name), table[name])


def _may_be_untied(config: Any) -> bool:
    """Whether a config of this class can say that nothing is tied, and says nothing else by it."""
    fields = {**config.to_dict(), FIELD: False}
    try:
        again = type(config)(**{k: v for k, v in fields.items() if k != "model_type"}).to_dict()
    except Exception:  # a config of somebody else's
        return True
    return again.get(FIELD) is False


def _forget(plan: Plan, model: nn.Module, later: Any) -> None:
    """transformers' own list of what is tied, without what no longer is."""
    for module in model.modules():
        known: Any = module.__dict__.get("all_tied_weights_keys")
        if isinstance(known, dict):
            tied = {t: s for t, s in known.items() if _still(module, t, s, later)}
            if len(tied) < len(known):
                plan.settings.append((module, "all_tied_weights_keys", tied))


def _still(module: nn.Module, target: str, source: str, later: Any) -> bool:
    one, other = _holder(module, target), _holder(module, source)
    return one is None or other is None or _then(later, one) is _then(later, other)
