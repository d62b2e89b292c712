"""What a run starts from besides the model: an adapter to go on with, adapters that belong to the base, and one that is on only while training."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from diffpeft.errors import ConfigError, inside, listed, shown
from diffpeft.files import Json
from diffpeft.model.fuse import fuse
from diffpeft.model.state import slots_of
from diffpeft.model.target import adapted, components
from diffpeft.pipeline.adapters import set_adapters, unload
from diffpeft.pipeline.load import load_lora

TRAINING = "training-adapter"  # its name on the pipeline


def weighted(option: str, said: str | Sequence[str] | None) -> list[tuple[str, float]]:
    """`a.safetensors:0.5,b.safetensors` -> [(file, strength)]; a strength that is not said is 1. Raises ConfigError."""
    entries = said.split(",") if isinstance(said, str) else said or ()
    return [_weighted(option, entry.strip()) for entry in entries]


def _weighted(option: str, entry: str) -> tuple[str, float]:
    source, colon, text = entry.rpartition(":")
    if not colon or not source or "/" in text or "\\" in text:  # a Windows path has a colon too
        return entry, 1.0
    try:
        return source, float(text)
    except ValueError:
        raise ConfigError(
            f"{option} has {shown(entry)}", remedy="It is FILE:STRENGTH, such as style.safetensors:0.8."
        ) from None


def bake(pipe: object, said: str | Sequence[str] | None) -> None:
    """Put adapters into the weights of the base for good, before anything is computed with it. Raises as `load_lora` and `fuse`."""
    names = []
    for number, (source, strength) in enumerate(weighted("base_lora", said)):
        names.append(f"base-lora-{number}")
        with inside("--base-lora", config=True):
            load_lora(pipe, source, name=names[-1], weight=strength)
    if not names:
        return
    fuse(pipe, names)
    layers = [module for model in components(pipe).values() for _, module, _ in adapted(model)]
    fused = [
        (module, name, p.detach().clone()) for module in layers for name, p in module.named_parameters(recurse=False)
    ]
    unload(pipe, names)
    with torch.no_grad():
        for module, name, weight in fused:
            module.get_parameter(name).copy_(weight)


def adopt(pipe: object, source: str, name: str, trained: Collection[str]) -> Json:
    """Load the adapter to go on with, as one to be trained; {option of the run: what it has}. `trained` are the components that may be.

    Raises as `load_lora`, and ConfigError for an adapter of a component that is not trained.
    """
    with inside("--init-from", config=True):
        report = load_lora(pipe, source, name=name, trainable=True)
    if others := {layer.partition(".")[0] for layer in slots_of(pipe, name)} - set(trained):
        unload(pipe, name)
        raise ConfigError(
            f"the adapter changes the {listed(sorted(others))} too, which is not trained",
            where=source,
            remedy="Pass --train-text-encoder.",
        )
    ranks = [slot.rank for slot in slots_of(pipe, name).values() if slot.parts]
    alphas = [
        part.spec.alpha for slot in slots_of(pipe, name).values() for part in slot.parts if part.spec.alpha is not None
    ]
    rank = max(ranks, default=1)
    return {
        "method": "+".join(sorted(report.methods)),
        "rank": rank,
        "alpha": float(alphas[0]) if alphas else float(rank),
    }


def assist(pipe: object, said: str | None, name: str) -> None:
    """Load the adapter that is on while training, before the one that is trained. Raises as `load_lora`."""
    if said is None:
        return
    ((source, strength),) = weighted("training_adapter", [said])
    with inside("--training-adapter", config=True):
        load_lora(pipe, source, name=TRAINING, weight=strength)
    set_adapters(pipe, {TRAINING: strength, name: 1.0})


def without(name: str, said: str | None) -> dict[str, float]:
    """The strengths of what is on while training but for the adapter that is trained."""
    strengths = [strength for _, strength in weighted("training_adapter", said)]
    return {name: 0.0, **dict.fromkeys([TRAINING] * len(strengths), sum(strengths))}


def dismiss(pipe: object, said: str | None) -> None:
    """Take that adapter off again: what is drawn and measured is without it."""
    if said is not None:
        unload(pipe, TRAINING)
