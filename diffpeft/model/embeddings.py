"""Embeddings and heads that an adapter brings along with its file: they act while it does, in the place of the model's own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffpeft.errors import AdapterStateError, CheckpointWarning, listed
from diffpeft.layers.carried import op_of, record_of
from diffpeft.layers.slot import BIAS, Piece, Slot, pieces_of
from diffpeft.methods import Spec

WHOLE = "set_weight"  # the role of such a weight in a slot, below the adapter's own tensors
TensorsByLayer = Mapping[str, Mapping[str, Tensor]]  # {layer: {name in it: tensor}}


def embedding_layers(model: Any) -> dict[str, nn.Module]:
    """{name: layer} of a language model's input and output embeddings."""
    if not hasattr(model, "get_input_embeddings"):
        return {}
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name: module for name, module in model.named_modules() if any(module is layer for layer in layers)}


def parameter_of(module: nn.Module, name: str) -> Tensor:
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
        same = all(torch.equal(p := parameter_of(module, name), t.to(p)) for name, t in tensors.items())
        if not same:
            different.append(layer)
        record = record_of(module)
        if layer in slots or (record is not None and record.slots):
            under |= {} if same else {layer: above(module, tensors, slots.get(layer))}
        else:
            copied[layer] = module
    if different:
        warnings.warn(
            f"the file has embeddings of its own, which act while the adapter does: {listed(different)}",
            CheckpointWarning,
            stacklevel=5,
        )
    return under, copied


def above(module: nn.Module, tensors: Mapping[str, Tensor], slot: Slot | None) -> Slot:
    """A slot (with the tensors of one that is there) that starts from a weight of its own, which is not trained.

    Raises AdapterStateError for a bias of its own.
    """
    if "bias" in tensors:
        bias = parameter_of(module, "bias")
        if not torch.equal(bias, tensors["bias"].to(bias)):
            raise AdapterStateError(
                "the file has a bias for an embedding that carries adapters", remedy="Unload the other adapters first."
            )
    pieces = [p for p in (pieces_of(slot) if slot else ()) if WHOLE not in {**p.frozen, **p.tensors}]
    weight = tensors["weight"].to(parameter_of(module, "weight").device)
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
