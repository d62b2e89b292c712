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
from diffpeft.errors import NonFiniteError, ShapeMismatchError, shown
from diffpeft.layers.slot import Slot
from diffpeft.model.embeddings import Tensors, embedding_layers
from diffpeft.model.target import modules_of

NAMES = ("embed_tokens", "lm_head")  # what PEFT looks for in target_modules


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
