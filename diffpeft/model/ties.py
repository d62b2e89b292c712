"""Weights that modules of a language model share, mostly the head's and the embedding's: LoRAs that are tied as they are, and ties that a merge undoes.

What shares them is found by the Parameter, what ought to by transformers' declaration.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from diffpeft.errors import AdapterStateWarning, listed
from diffpeft.layers.carried import op_of
from diffpeft.layers.slot import Piece, Slot, pieces_of
from diffpeft.methods import Spec
from diffpeft.model.plan import Plan
from diffpeft.model.target import modules_of
from diffpeft.model.tied import same_product

FIELD = "tie_word_embeddings"
Holder = tuple[dict[str, object], str]  # a module's table of parameters, and a name in it


def tied_to_embedding(model: Any) -> dict[str, str]:
    """{module: the input embeddings} of the modules that share the weight of a language model's input embeddings, by name.

    None do where the model's config says `tie_word_embeddings=False`.
    """
    if getattr(getattr(model, "config", None), FIELD, True) is False:
        return {}
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    shared = getattr(table, "_parameters", {}).get("weight")
    if shared is None:
        return {}
    same = modules_of(model, lambda m: m._parameters.get("weight") is shared)
    source = next((name for name, (module, _) in same.items() if module is table), None)
    return {} if source is None else {name: source for name in same if name != source}


def twin(slot: Slot, module: nn.Module, trainable: bool) -> Slot:
    """The LoRA of an embedding [dim, tokens], in the same memory, as that of another embedding, or of a head [tokens, dim]."""
    (piece,) = pieces_of(slot)
    tensors = {role: t.data for role, t in piece.tensors.items()}
    if not isinstance(module, nn.Embedding):
        tensors = {"lora_A": tensors["lora_embedding_B"].t(), "lora_B": tensors["lora_embedding_A"].t()}
    spec = Spec(op_of(module).geometry, piece.spec.alpha, piece.spec.options)
    return Slot([Piece(piece.method, tensors, piece.alpha, spec)], trainable=trainable).train(slot.training)


def twins_of(modules: Mapping[str, nn.Module], ties: Mapping[str, str], slots: Mapping[str, Slot]) -> dict[str, Slot]:
    """{layer: slot} of fresh LoRAs tied to another's, {layer: the other}: in its memory."""
    return {layer: twin(slots[other], modules[layer], True) for layer, other in ties.items()}


def twins(model: nn.Module, ties: Mapping[str, str], slots: Mapping[str, Slot], trainable: bool) -> dict[str, Slot]:
    """{layer: slot} of the LoRAs that are tied to another's, {layer: the other}: in its memory, if they are the same."""
    return {
        layer: twin(slots[other], model.get_submodule(layer), trainable)
        for layer, other in ties.items()
        if layer in slots and other in slots and same_product(slots[layer], slots[other])
    }


def loosen(plan: Plan, model: nn.Module) -> None:
    """Add to a plan what a model must know of the ties that the plan undoes, or that are none, so that it can be saved and loaded:
    `tie_word_embeddings=False`. Warns.

    Where some declared ties remain, or the config's class does not let the field be False (T5), it stays True: transformers leaves weights alone that
    a file holds apart.
    """
    later = plan.entries
    for prefix, module in model.named_modules():
        ties = list(_declared(module))
        broken = [target for target, one, other in ties if _apart(_then(later, one), _then(later, other))]
        if not broken:
            continue
        config: Any = module.config
        whole = not any(_then(later, one) is _then(later, other) for _, one, other in ties) and _may_be_untied(config)
        said = f"Setting `{FIELD}=False` in the model config." if whole else "They are saved apart."
        warnings.warn(
            f"Input and output embeddings are no longer tied after merging: {listed(f'{prefix}.{t}'.strip('.') for t in broken)}. {said}",
            AdapterStateWarning,
            stacklevel=4,
        )
        if whole:
            plan.set(config, **{FIELD: False})
    _forget(plan, model, later)


def _apart(one: object, other: object) -> bool:
    """Whether two parameters are different ones, as far as that can be told: not of what is stored elsewhere."""
    return one is not other and not any(isinstance(p, nn.Parameter) and p.is_meta for p in (one, other))


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


def _then(later: Mapping[tuple[int, str], object], holder: Holder) -> object:
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


def _forget(plan: Plan, model: nn.Module, later: Mapping[tuple[int, str], object]) -> None:
    """transformers' own list of what is tied, without what no longer is."""
    for module in model.modules():
        known: Any = module.__dict__.get("all_tied_weights_keys")
        if isinstance(known, dict):
            tied = {t: s for t, s in known.items() if _still(module, t, s, later)}
            if len(tied) < len(known):
                plan.set(module, all_tied_weights_keys=tied)


def _still(module: nn.Module, target: str, source: str, later: Mapping[tuple[int, str], object]) -> bool:
    one, other = _holder(module, target), _holder(module, source)
    return one is None or other is None or _then(later, one) is _then(later, other)
