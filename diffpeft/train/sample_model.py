"""Another checkpoint of the model's family that samples are drawn with: train on the raw model, look at the distilled one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import diffpeft
from diffpeft.errors import WrongBaseError, inside, listed
from diffpeft.families import CaptionReading, family_of, open_family
from diffpeft.model.state import bundle_of, slots_of
from diffpeft.model.target import select
from diffpeft.pipeline.open import open_parts

if TYPE_CHECKING:
    from torch import nn

    from diffpeft.families import Family
    from diffpeft.train.config import TrainConfig


def base_of(config: TrainConfig) -> str | None:
    """The folder or Hub id with the configs of a sample model that is a single file: those of the model that is trained."""
    return config.base or config.model if Path(str(config.sample_model)).is_file() else None


def open_other(config: TrainConfig, family: Family, chosen: Mapping[str, Mapping[str, object]], device: str) -> Family:
    """The model that samples are drawn with, none of it loaded yet. `chosen` says which layers of which components are trained, as `select` takes it.

    Raises CheckpointError and its kin; WrongBaseError for a model of another family, or without the layers that are trained.
    """
    with inside("--sample-model", config=True):
        base = base_of(config)  # of a single file, which the model's own VAE and text encoders go with
        parts = open_parts(
            config.sample_model,
            base,
            vae=config.vae if base else None,
            text_encoders=config.text_encoders() if base else (),
            dtype=str(config.dtype),
            device=device,
        )
        other = open_family(parts, CaptionReading(config.max_length, config.clip_skip or 1))
    if type(other) is not type(family):
        raise WrongBaseError(
            f"the sample model is a {type(other.pipe).__name__} of another family",
            where=config.sample_model,
            remedy=f"It is a checkpoint of {family.architecture}, as the model that is trained.",
        )
    other.pipe.set_progress_bar_config(disable=True)
    for component, layers in chosen.items():
        _check_layers(component, layers, family, other, str(config.sample_model))
    return other


def _check_layers(component: str, layers: Mapping[str, object], family: Family, other: Family, where: str) -> None:
    """Raise WrongBaseError if a component of the other model lacks layers that are trained, or has them in other shapes."""
    mine, theirs = family.parts.outline(component), other.parts.outline(component)
    names = select({component: mine}, **layers)[component]  # type: ignore[arg-type]
    shapes = {name: _shapes(mine.get_submodule(name)) for name in names}
    there = dict(theirs.named_modules())
    unlike = [name for name, shape in shapes.items() if name not in there or _shapes(there[name]) != shape]
    if unlike:
        raise WrongBaseError(
            f"the sample model has {len(unlike)} of the layers that are trained in other shapes or not at all: {listed(unlike, 3)}",
            where=where,
            remedy="Pass a checkpoint with the layers of the model that is trained.",
        )


def _shapes(layer: nn.Module) -> dict[str, Sequence[int]]:
    return {name: tuple(p.shape) for name, p in layer.named_parameters(recurse=False)}


@contextlib.contextmanager
def other_stage(family: Family, name: str, other: Family) -> Iterator[Family]:
    """The other model with the adapter as it is now; it is loaded, and given up afterwards."""
    bundle = bundle_of(family.pipe, name, family_of(family.pipe) or "")
    components = {layer.partition(".")[0] for layer in slots_of(family.pipe, name)}
    try:
        for component in {*other.denoisers, *other.viewers, *components}:
            other.parts(component)
        diffpeft.load_lora(other.pipe, bundle, name=name)
        yield other
    finally:
        other.parts.free(*other.denoisers, *other.viewers, *other.text_encoders)
