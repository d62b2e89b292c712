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
from diffpeft.errors import CheckpointWarning, NonFiniteError, ShapeMismatchError, shown
from diffpeft.layers.slot import Slot
from diffpeft.methods.peft_config import PeftConfig
from diffpeft.model.embeddings import TensorsByLayer, embedding_layers, parameter_of
from diffpeft.model.target import modules_of

NAMES = ("embed_tokens", "lm_head")  # what PEFT looks for in target_modules


# Saving


def saved_along(
    model: nn.Module, slots: Mapping[str, Slot], config: PeftConfig, wanted: bool | str
) -> dict[str, Tensor]:
    """The model's own embeddings, by PEFT's keys, where they are wanted or (auto) the file needs them; if adapters are on one, not those of the other."""
    if wanted == "auto":
        wanted = bool(why := _needed(model, config))
        if why:
            warnings.warn(f"Setting `save_embedding_layers` to `True` as {why}.", CheckpointWarning, stacklevel=4)
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
        shape = parameter_of(module, name).shape
        if shape != tensor.shape:
            raise ShapeMismatchError(
                f"size mismatch: {shown(f'{layer}.{name}')} is {tuple(shape)} in the model, the file has {tuple(tensor.shape)}",
                where=source,
                remedy=f"Call model.resize_token_embeddings({len(tensor)}) first.",
            )
        if not io.finite(tensor):
            raise NonFiniteError(f"{shown(f'{layer}.{name}')} has values that are not finite", where=source)
