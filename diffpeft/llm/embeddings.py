"""Embeddings and heads that PEFT saves along with an adapter: where adapters are on them, where the vocabulary was resized, or where that is asked for.

They belong to the adapter: they act while it does, in the place of the model's own, which stay as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffpeft import io, patterns
from diffpeft.errors import AdapterStateError, NonFiniteError, ShapeMismatchError, listed, shown
from diffpeft.layers.carried import op_of, record_of
from diffpeft.layers.slot import BIAS, Piece, Slot, pieces_of
from diffpeft.methods import Spec
from diffpeft.model.target import modules_of

NAMES = ("embed_tokens", "lm_head")  # what PEFT looks for in target_modules
WHOLE = "set_weight"  # the role of such a weight in a slot, below the adapter's own tensors
Tensors = Mapping[str, Mapping[str, Tensor]]  # {layer: {name in it: tensor}}


def embedding_layers(model: Any) -> dict[str, Any]:
    """{name: layer} of a language model's input and output embeddings."""
    if not hasattr(model, "get_input_embeddings"):
        return {}
    own = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    return {name: module for name, module in model.named_modules() if any(module is layer for layer in own)}


# Saving


def saved_along(model: Any, slots: Mapping[str, Slot], config: Any, wanted: bool | str) -> dict[str, Tensor]:
    """The model's own embeddings, by PEFT's keys, where they are wanted or (auto) the file needs them; if adapters are on one, not those of the other."""
    if wanted == "auto":
        wanted = bool(why := _needed(model, config))
        if why:
            warnings.warn(f"Setting `save_embedding_layers` to `True` as {why}.", stacklevel=4)
    if not wanted:
        return {}
    layers = embedding_layers(model)
    on = {f"{name}.base_layer": module for name, module in layers.items() if name in slots}
    return {
        f"{name}.{key}": tensor.detach()
        for name, module in (on or layers).items()
        for key, tensor in module._parameters.items()
        if tensor is not None
    }


def _needed(model: Any, config: Any) -> str:
    """Why a file of the adapter needs the embeddings: PEFT's words; empty if it does not."""
    targets = getattr(config, "target_modules", None) or ()
    if isinstance(targets, str):
        on = any(patterns.fullmatch(targets, n) for n, _ in model.named_modules() if n.rpartition(".")[2] in NAMES)
    else:
        on = any(name in targets for name in NAMES)
    if on and not getattr(config, "trainable_token_indices", None):
        return "embedding layers found in `target_modules`"
    size, before = getattr(getattr(model, "config", None), "vocab_size", None), _vocabulary(model, config)
    return "the embedding layer has been resized during finetuning" if size and before and size != before else ""


def _vocabulary(model: Any, config: Any) -> int | None:
    """The vocabulary that the base model's folder or repository says; None where nobody can tell."""
    name = getattr(config, "base_model_name_or_path", None)
    if not name or not hasattr(type(getattr(model, "config", None)), "from_pretrained"):
        return None
    local = {"local_files_only": True} if not Path(name).exists() else {}
    try:
        return getattr(type(model.config).from_pretrained(name, **local), "vocab_size", None)
    except Exception:  # there is no such folder, or no network
        return None


# Loading


def place(layers: Mapping[str, Any], key: str) -> tuple[str, str] | None:
    """(layer, name in it) of a key that names a parameter of an embedding, PEFT's `base_layer` or not."""
    layer, _, name = key.replace(".base_layer.", ".").rpartition(".")
    return (layer, name) if layer in layers and layers[layer]._parameters.get(name) is not None else None


def followed(model: nn.Module, found: Tensors, taken: Iterable[str], source: str) -> dict[str, dict[str, Tensor]]:
    """What a file has for embeddings, and the same for the modules that share a weight with one of these. `taken` are trained whole.

    Raises ShapeMismatchError or NonFiniteError.
    """
    for layer, own in found.items():
        _check(layer, model.get_submodule(layer), own, source)
    out = {layer: dict(own) for layer, own in found.items()}
    if not out:
        return out
    holders = {n: m for n, (m, _) in modules_of(model, lambda m: m._parameters.get("weight") is not None).items()}
    for layer, own in found.items():
        shared = holders[layer]._parameters["weight"]
        for name, module in holders.items():
            if "weight" in own and module._parameters["weight"] is shared and name not in taken:
                theirs = out.setdefault(name, {})
                if "weight" not in theirs or torch.equal(theirs["weight"], own["weight"]):
                    theirs["weight"] = own["weight"]
    return out


def _check(layer: str, module: nn.Module, own: Mapping[str, Tensor], source: str) -> None:
    for name, tensor in own.items():
        mine: Any = module._parameters[name]
        if mine.shape != tensor.shape:
            raise ShapeMismatchError(
                f"{shown(f'{layer}.{name}')} is {tuple(mine.shape)} in the model, the file has {tuple(tensor.shape)}",
                where=source,
                remedy=f"Call model.resize_token_embeddings({len(tensor)}) first.",
            )
        if not io.finite(tensor):
            raise NonFiniteError(f"{shown(f'{layer}.{name}')} has values that are not finite", where=source)


def divided(
    model: nn.Module, found: Tensors, slots: Mapping[str, Slot]
) -> tuple[dict[str, Slot], dict[str, nn.Module]]:
    """Where what a file has for embeddings goes: the adapter's slots on layers that carry adapters, and modules that get a copy.

    A layer with a slot of this adapter whose own weight is the file's needs nothing.
    """
    under: dict[str, Slot] = {}
    copied: dict[str, nn.Module] = {}
    different: list[str] = []
    for layer, own in found.items():
        module: Any = model.get_submodule(layer)
        same = all(
            torch.equal(module._parameters[name].detach(), t.to(module._parameters[name])) for name, t in own.items()
        )
        if not same:
            different.append(layer)
        record = record_of(module)
        if layer in slots or (record is not None and record.slots):
            under |= {} if same else {layer: above(module, own, slots.get(layer))}
        else:
            copied[layer] = module
    if different:
        warnings.warn(
            f"the file has embeddings of its own, which act while the adapter does: {listed(different)}", stacklevel=5
        )
    return under, copied


def above(module: Any, own: Mapping[str, Tensor], slot: Slot | None) -> Slot:
    """A slot (with the tensors of one that is there) that starts from a weight of its own, which is not trained.

    Raises AdapterStateError for a bias of its own.
    """
    if "bias" in own and not torch.equal(module.bias.detach(), own["bias"].to(module.bias)):
        raise AdapterStateError(
            "the file has a bias for an embedding that carries adapters", remedy="Unload the other adapters first."
        )
    pieces = [p for p in (pieces_of(slot) if slot else ()) if WHOLE not in {**p.frozen, **p.tensors}]
    weight = own["weight"].to(module._parameters["weight"].device)
    below = Piece("full", {}, None, Spec(op_of(module).geometry, None, {}), {WHOLE: weight})
    beside = {BIAS: slot.tensors[BIAS]} if slot and BIAS in slot.tensors else {}
    made = Slot((below, *pieces), beside, trainable=False)
    if slot is not None:
        made._parameters.update({role: p for role, p in slot._parameters.items() if role in made._parameters})
        made.training = slot.training
    return made


def fill(copies: Mapping[str, nn.Module], found: Tensors) -> None:
    """Put what a file has into fresh copies; those that get the same tensor share it, as the model's own modules do."""
    shared: dict[int, Any] = {}
    for layer, fresh in copies.items():
        own = found[layer]
        fresh.load_state_dict({**fresh.state_dict(), **own})
        if "weight" in own:
            fresh._parameters["weight"] = shared.setdefault(id(own["weight"]), fresh._parameters["weight"])
