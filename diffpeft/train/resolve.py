"""What the options of a run come to where nothing was said: of the model, of other options, of the output folder. Imports no torch."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

from diffpeft.errors import DiffpeftError
from diffpeft.train import machines, prior
from diffpeft.train.check import sizes_of
from diffpeft.train.config import TrainConfig
from diffpeft.train.optimizers import rate_of


def resolved(
    config: TrainConfig, name: str | None, dtype: str | None, resolution: int | None, max_length: int | None
) -> TrainConfig:
    """The options with what their defaults come to.

    Args:
        name: of the adapter.
        dtype: of the base, which the device may say.
        resolution, max_length: what the model was made for.
    """
    if config.class_prompt is not None and config.prior != "base":
        config = replace(config, prior="images", num_class_images=config.num_class_images or prior.IMAGES)
    if config.prior is not None:
        config = replace(config, prior_weight=config.prior_weight or prior.WEIGHT)
    return replace(
        config,
        name=name,
        num_processes=machines.several() or config.num_processes,
        dtype=dtype,
        lr=rate_of(config),
        resolution=config.resolution or resolution,
        max_length=max_length,
        alpha=config.rank if config.alpha is None else config.alpha,
    )


def preview(config: TrainConfig) -> TrainConfig:
    """The same, as far as it is known without a device and without reading data; nothing is loaded."""
    resolution = None
    if config.model and Path(config.model).exists():
        with contextlib.suppress(DiffpeftError):
            resolution = sizes_of(config).resolution
    name = config.name or (config.name_by_output() if config.out else None)
    return resolved(config, name, config.dtype, resolution, config.max_length)
