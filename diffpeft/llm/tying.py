"""Weights that modules of a language model share: the head's and the embedding's, mostly.

What shares them is found by the Parameter, what ought to by transformers' declaration.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffpeft.errors import CheckpointError, ConfigError, listed, shown
from diffpeft.layers.carried import op_of
from diffpeft.layers.slot import Piece, Slot, pieces_of
from diffpeft.methods import Spec
from diffpeft.methods.peft_config import PeftConfig, PeftType
from diffpeft.model.plan import Plan
from diffpeft.model.target import modules_of
from diffpeft.model.tied import same_product

FIELD = "tie_word_embeddings"
Holder = tuple[dict[str, nn.Parameter | None], str]  # a module's table of parameters, and a name in it
Later = Mapping[tuple[int, str], object]  # {(id of a table, name in it): what a plan will put there}
_INITS = (True, False, "gaussian")  # those that a tied LoRA may have

# ensure_weight_tying: what an adapter has on tied modules is tied as well


def tied_to_embedding(model: nn.Module) -> dict[str, str]:
    """{module: the input embeddings} of the modules that share the weight of a language model's input embeddings, by name."""
    read: Callable[[], nn.Module | None] | None = getattr(model, "get_input_embeddings", None)
    table = read() if read else None
    shared = getattr(table, "_parameters", {}).get("weight")
    if shared is None:
        return {}
    same = modules_of(model, lambda m: m._parameters.get("weight") is shared)
    source = next((name for name, (module, _) in same.items() if module is table), None)
    return {} if source is None else {name: source for name in same if name != source}


def ties_of(model: nn.Module, config: PeftConfig, names: Iterable[str]) -> dict[str, str]:
    """{module: the one that it is to be tied to} where `ensure_weight_tying` says so, and one of the tied modules is among `names`."""
    if not config.ensure_weight_tying:
        return {}
    ties = tied_to_embedding(model)
    return ties if {*names} & ({*ties} | {*ties.values()}) else {}


def check_tying(model: nn.Module, config: PeftConfig, names: Iterable[str]) -> None:
    """Warn, as PEFT does, where `ensure_weight_tying` has nothing to do, or is not set where it might be. `names` are trained whole or adapted."""
    ties = tied_to_embedding(model)
    tied = bool({*names} & ({*ties} | {*ties.values()}))
    if not config.ensure_weight_tying:
        if tied and config.modules_to_save:
            warnings.warn(
                f"Model has `{FIELD}=True` and a tied layer is part of the adapter, but `ensure_weight_tying` is not set to True: "
                "its copy is trained apart, and merging unties it.",
                stacklevel=5,
            )
    elif not ties:
        warnings.warn(
            "You have requested `ensure_weight_tying`, but no tied modules were found in the model", stacklevel=5
        )
    elif not tied and not config.trainable_token_indices:
        warnings.warn(
            "You have requested `ensure_weight_tying`, but no tied modules are added in either `modules_to_save` or `target_modules`",
            stacklevel=5,
        )


def twinned(
    layers: Mapping[str, nn.Module], model: nn.Module, config: PeftConfig
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


def twin(slot: Slot, module: nn.Module, trainable: bool) -> Slot:
    """The LoRA of an embedding [dim, tokens], in the same memory, as that of another embedding, or of a head [tokens, dim]."""
    (piece,) = pieces_of(slot)
    tensors = {role: t.data for role, t in piece.tensors.items()}
    if not isinstance(module, nn.Embedding):
        tensors = {"lora_A": tensors["lora_embedding_B"].t(), "lora_B": tensors["lora_embedding_A"].t()}
    spec = Spec(op_of(module).geometry, piece.spec.alpha, piece.spec.options)
    return Slot([Piece(piece.method, tensors, piece.alpha, spec)], trainable=trainable).train(slot.training)


def twins(model: nn.Module, config: PeftConfig, slots: Mapping[str, Slot], trainable: bool) -> dict[str, Slot]:
    """{layer: slot} of the loaded LoRAs that `ensure_weight_tying` ties to another: in its memory, if they are the same."""
    return {
        layer: twin(slots[other], model.get_submodule(layer), trainable)
        for layer, other in ties_of(model, config, slots).items()
        if layer in slots and other in slots and same_product(slots[layer], slots[other])
    }


def check_alike(ties: Mapping[str, str], file: Mapping[str, Mapping[str, Tensor]], source: str) -> None:
    """Raise CheckpointError if a file has different weights for modules that it says are tied."""
    for one, other in ties.items():
        a, b = (file.get(name, {}).get("weight") for name in (one, other))
        if a is not None and b is not None and not torch.equal(a, b):
            raise CheckpointError(
                f"ensure_weight_tying is set, and the weights of {shown(one)} and {shown(other)} differ",
                where=source,
                remedy="Set it to false to train them apart.",
            )


# Merging


def loosen(plan: Plan, model: nn.Module) -> None:
    """Add to a plan what a model must know of the ties that the plan undoes, so that it can be saved and loaded: `tie_word_embeddings=False`. Warns.

    Where some declared ties remain, or the config's class does not let the field be False (T5), it stays True: transformers leaves weights alone that
    a file holds apart.
    """
    later = plan.entries
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
        all_broken = not any(_then(later, one) is _then(later, other) for _, one, other in ties)
        says_so = all_broken and _may_be_untied(config)
        said = f"Setting `{FIELD}=False` in the model config." if says_so else "They are saved apart."
        warnings.warn(
            f"Input and output embeddings are no longer tied after merging: {listed(f'{prefix}.{t}'.strip('.') for t in broken)}. {said}",
            stacklevel=4,
        )
        if says_so:
            plan.set(config, **{FIELD: False})
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
    module: nn.Module | None = model
    for segment in path:
        module = module._modules.get(segment) if module is not None else None
    if module is None:
        return None
    return (module._parameters, last) if module._parameters.get(last) is not None else None


def _then(later: Later, holder: Holder) -> object:
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


def _forget(plan: Plan, model: nn.Module, later: Later) -> None:
    """transformers' own list of what is tied, without what no longer is."""
    for module in model.modules():
        known = module.__dict__.get("all_tied_weights_keys")
        if isinstance(known, dict):
            tied = {t: s for t, s in known.items() if _still(module, t, s, later)}
            if len(tied) < len(known):
                plan.set(module, all_tied_weights_keys=tied)


def _still(module: nn.Module, target: str, source: str, later: Later) -> bool:
    one, other = _holder(module, target), _holder(module, source)
    return one is None or other is None or _then(later, one) is _then(later, other)
