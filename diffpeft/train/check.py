"""Everything that can be said of a run before a large library is loaded: its options, its data, and what its model's configs tell."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from diffpeft import io
from diffpeft.errors import ConfigError, DiffpeftError, UnknownNameError, WrongBaseError, shown
from diffpeft.families import check_trainable
from diffpeft.pipeline.open import Facts, check_model, facts
from diffpeft.train import data, prior
from diffpeft.train.checkpoints import Checkpoint
from diffpeft.train.config import TrainConfig
from diffpeft.train.data import Account
from diffpeft.train.method import ADAPTERS
from diffpeft.train.resume import begin

FORMATS = ("diffusers", "kohya")  # in which the adapter is saved
_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
# {a layer of an original checkpoint: what the file is}; the first that is there tells
_CHECKPOINTS = {
    "double_blocks.": "Flux",
    "joint_blocks.": "Stable Diffusion 3",
    "conditioner.embedders.": "Stable Diffusion XL",
}
_FIRST_LAYER = "model.diffusion_model.input_blocks.0.0.weight"


@dataclass(frozen=True)
class Checked:
    """A run that may begin: the adapter's name, the account of its images, its class images, if it has any, and the state that it goes on from."""

    name: str
    account: Account
    prior: prior.ClassImages | None
    checkpoint: Checkpoint | None = None


def check(config: TrainConfig) -> Checked:
    """All checks that need no model. Raises ConfigError, UnknownNameError, DataError or CheckpointError."""
    config.validate()
    if config.method not in ADAPTERS:
        raise UnknownNameError.of("method", config.method, ADAPTERS)
    out = config.output()
    name = _name(config, out)
    checkpoint = begin(config, out, [file_of(name, format) for format in FORMATS])
    check_model(config.model, config.base)
    known = _trainable(config)
    account = data.survey(str(config.data), config.instance_prompt, config.resolution or known.resolution)
    return Checked(name, account, prior.planned(config), checkpoint)


def file_of(name: str, format: str) -> str:
    """What the file of an adapter is called in a format."""
    return f"{name}.{format}.safetensors"


def _name(config: TrainConfig, out: Path) -> str:
    """The adapter's name, which begins the names of its files."""
    if config.name is None:
        return re.sub(r"[^A-Za-z0-9._-]", "_", out.name)[:128].strip(".") or "adapter"
    if not _NAME.fullmatch(config.name) or not config.name.strip("."):
        raise ConfigError(
            f"name is {shown(config.name)}", remedy="It is 1 to 128 letters, digits, dots, underscores and hyphens."
        )
    return config.name


def _trainable(config: TrainConfig) -> Facts:
    """What the configs tell of the model. Raises WrongBaseError if it cannot be trained."""
    path = Path(str(config.model))
    known = facts(config.base if path.is_file() else config.model)
    where = (config.base if path.is_file() else config.model) or ""
    if known.pipeline:
        check_trainable(known.pipeline, known.input_channels, known.image_channels, where)
    if path.is_file():
        _check_checkpoint(path, known)
    return known


def _check_checkpoint(path: Path, known: Facts) -> None:
    """Raise WrongBaseError if the names and shapes in a single file are those of a model that cannot be trained."""
    try:
        handles, _ = io.header(path)
    except DiffpeftError:  # loading it will say what is wrong
        return
    kind = next((kind for part, kind in _CHECKPOINTS.items() if any(part in key for key in handles)), None)
    if kind:
        raise WrongBaseError(f"this is a checkpoint of {kind}, which cannot be trained", where=path)
    conv_in = handles.get(_FIRST_LAYER)
    if conv_in is not None and len(conv_in.shape) > 1:
        check_trainable("StableDiffusionPipeline", conv_in.shape[1], known.image_channels, path)


def resized(checked: Checked, resolution: int) -> Checked:
    """The same for training images of `resolution` pixels."""
    return replace(checked, account=replace(checked.account, resolution=resolution))
