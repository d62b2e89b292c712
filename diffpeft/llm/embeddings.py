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
from diffpeft.methods.peft_config import PeftConfig
from diffpeft.model.target import modules_of

NAMES = ("embed_tokens", "lm_head")  # what PEFT looks for in target_modules
WHOLE = "set_weight"  # the role of such a weight in a slot, below the adapter's own tensors
TensorsByLayer = Mapping[str, Mapping[str, Tensor]]  # {layer: {name in it: tensor}}


def embedding_layers(model: Any) -> dict[str, nn.Module]:
    """{name: layer} of a language model's input and output embeddings."""
    if not hasattr(model, "get_input_embeddings"):
        return {}
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name: module for name, module in model.named_modules() if any(module is layer for layer in layers)}


# Saving


def saved_along(
    model: nn.Module, slots: Mapping[str, Slot], config: PeftConfig, wanted: bool | str
) -> dict[str, Tensor]:
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


def _needed(model: nn.Module, config: PeftConfig) -> str:
    """Why a file of the adapter needs the embeddings: PEFT's words; empty if it does not."""
    targets = config.target_modules or ()
    if isinstance(targets, str):
        on = any(patterns.fullmatch(targets, n) for n, _ in model.named_modules() if n.rpartition(".")[2] in NAMES)
    else:
        on = any(name in targets for name in NAMES)
    if on and not config.trainable_token_indices:
        return "embedding layers found in `target_modules`"
    size, before = getattr(getattr(model, "config", None), "vocab_size", None), _vocabulary(model, config)
    return "the embedding layer has been resized during finetuning" if size and before and size != before else ""


def _vocabulary(model: Any, config: PeftConfig) -> int | None:
    """The vocabulary that the base model's folder or repository says; None where nobody can tell."""
    name = config.base_model_name_or_path
    if not name or not hasattr(type(getattr(model, "config", None)), "from_pretrained"):
        return None
    local = {"local_files_only": True} if not Path(name).exists() else {}
    try:
        return getattr(type(model.config).from_pretrained(name, **local), "vocab_size", None)
    except Exception:  # there is no such folder, or no network
        return None


# Loading


def place(layers: Mapping[str, nn.Module], key: str) -> tuple[str, str] | None:
    """(layer, name in it) of a key that names a parameter of an embedding, PEFT's `base_layer` or not."""
    layer, _, name = key.replace(".base_layer.", ".").rpartition(".")
    return (layer, name) if layer in layers and layers[layer]._parameters.get(name) is not None else None


def followed(model: nn.Module, file: TensorsByLayer, taken: Iterable[str], source: str) -> dict[str, dict[str, Tensor]]:
    """What a file has for embeddings, and the same for the modules that share a weight with one of these. `taken` are trained whole.

    Raises ShapeMismatchError or NonFiniteError.
    """
    for layer, tensors in file.items():
        _check(layer, model.get_submodule(layer), tensors, source)
    everywhere = {layer: dict(tensors) for layer, tensors in file.items()}
    if not everywhere:
        return everywhere
    holders = {n: m for n, (m, _) in modules_of(model, lambda m: m._parameters.get("weight") is not None).items()}
    for layer, tensors in file.items():
        shared = holders[layer]._parameters["weight"]
        for name, module in holders.items():
            if "weight" in tensors and module._parameters["weight"] is shared and name not in taken:
                theirs = everywhere.setdefault(name, {})
                if "weight" not in theirs or torch.equal(theirs["weight"], tensors["weight"]):
                    theirs["weight"] = tensors["weight"]
    return everywhere


def _check(layer: str, module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise unless tensors have the shapes of a module's parameters, and are finite."""
    for name, tensor in tensors.items():
        shape = _parameter(module, name).shape
        if shape != tensor.shape:
            raise ShapeMismatchError(
                f"{shown(f'{layer}.{name}')} is {tuple(shape)} in the model, the file has {tuple(tensor.shape)}",
                where=source,
                remedy=f"Call model.resize_token_embeddings({len(tensor)}) first.",
            )
        if not io.finite(tensor):
            raise NonFiniteError(f"{shown(f'{layer}.{name}')} has values that are not finite", where=source)


def _parameter(module: nn.Module, name: str) -> Tensor:
    """A module's parameter of any shape, without its gradient."""
    parameter = module._parameters[name]
    assert parameter is not None
    return parameter.detach()


def divided(
    model: nn.Module, file: TensorsByLayer, slots: Mapping[str, Slot]
) -> tuple[dict[str, Slot], dict[str, nn.Module]]:
    """Where what a file has for embeddings goes: the adapter's slots on layers that carry adapters, and modules that get a copy.

    A layer with a slot of this adapter whose own weight is the file's needs nothing.
    """
    under: dict[str, Slot] = {}
    copied: dict[str, nn.Module] = {}
    different: list[str] = []
    for layer, tensors in file.items():
        module = model.get_submodule(layer)
        same = all(torch.equal(p := _parameter(module, name), t.to(p)) for name, t in tensors.items())
        if not same:
            different.append(layer)
        record = record_of(module)
        if layer in slots or (record is not None and record.slots):
            under |= {} if same else {layer: above(module, tensors, slots.get(layer))}
        else:
            copied[layer] = module
    if different:
        warnings.warn(
            f"the file has embeddings of its own, which act while the adapter does: {listed(different)}", stacklevel=5
        )
    return under, copied


def above(module: nn.Module, tensors: Mapping[str, Tensor], slot: Slot | None) -> Slot:
    """A slot (with the tensors of one that is there) that starts from a weight of its own, which is not trained.

    Raises AdapterStateError for a bias of its own.
    """
    if "bias" in tensors:
        bias = _parameter(module, "bias")
        if not torch.equal(bias, tensors["bias"].to(bias)):
            raise AdapterStateError(
                "the file has a bias for an embedding that carries adapters", remedy="Unload the other adapters first."
            )
    pieces = [p for p in (pieces_of(slot) if slot else ()) if WHOLE not in {**p.frozen, **p.tensors}]
    weight = tensors["weight"].to(_parameter(module, "weight").device)
    below = Piece("full", {}, None, Spec(op_of(module).geometry, None, {}), {WHOLE: weight})
    beside = {BIAS: slot.tensors[BIAS]} if slot and BIAS in slot.tensors else {}
    made = Slot((below, *pieces), beside, trainable=False)
    if slot is not None:
        made._parameters.update({role: p for role, p in slot._parameters.items() if role in made._parameters})
        made.training = slot.training
    return made


def fill(copies: Mapping[str, nn.Module], file: TensorsByLayer) -> None:
    """Put what a file has into fresh copies; those that get the same tensor share it, as the model's own modules do."""
    shared: dict[int, nn.Parameter | None] = {}
    for layer, fresh in copies.items():
        tensors = file[layer]
        fresh.load_state_dict({**fresh.state_dict(), **tensors})
        if "weight" in tensors:
            fresh._parameters["weight"] = shared.setdefault(id(tensors["weight"]), fresh._parameters["weight"])
