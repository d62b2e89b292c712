"""The options of a training run. One list: the command line, the TOML file and the report are made from it. Imports no torch."""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from diffpeft.errors import ConfigError, UnknownNameError, near, shown


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    below: float | None = None,
    required: bool = False,
) -> Any:
    """A field with what the command line says of it and the values that are allowed."""
    return field(
        default=default,
        metadata={"help": help, "choices": choices, "at_least": at_least, "below": below, "required": required},
    )


@dataclass
class Options:
    """The options that every training run has, and the checks of all."""

    model: str | None = option(None, "A folder with a model, or a Hub id.", required=True)
    data: str | None = option(None, "What to train on.", required=True)
    out: str | None = option(None, "The folder for what is written.", required=True)
    dtype: str | None = option(
        None,
        "What the base computes in; default fp32 on a CPU, else bf16. The adapter is fp32.",
        choices=("fp32", "bf16"),
    )
    method: str = option("lora", "The adapter method.")
    rank: int = option(16, "Rank of the adapter.", at_least=1)
    alpha: float | None = option(None, "The adapter's scale is alpha / rank; default: the rank.")
    targets: str = option("full", "Which layers.")
    dropout: float = option(
        0.0, "Probability with which an input feature of the adapter is dropped.", at_least=0, below=1
    )
    lr: float = option(1e-4, "Learning rate.", at_least=0)
    lr_scheduler: str = option(
        "constant", "How it goes on after the warm-up.", choices=("constant", "linear", "cosine")
    )
    warmup: int = option(0, "Steps in which the learning rate rises.", at_least=0)
    steps: int = option(500, "Optimiser steps.", at_least=1)
    batch_size: int = option(1, "Examples a step.", at_least=1)
    weight_decay: float = option(0.01, "AdamW's weight decay.", at_least=0)
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm.", at_least=0)
    seed: int = option(0, "Everything random follows from it.", at_least=0)

    def validate(self) -> None:
        """Raise ConfigError for the first option with a value that is not allowed."""
        for f in fields(self):
            value, meta = getattr(self, f.name), f.metadata
            if value is None:
                if meta["required"]:
                    raise ConfigError(f"--{f.name} is missing", remedy=f"Pass --{f.name}. {meta['help']}")
                continue
            _check_type(f.name, value, str(f.type))
            if meta["choices"] and value not in meta["choices"]:
                raise ConfigError(
                    f"{f.name} is {shown(value)}",
                    remedy=f"{near(str(value), meta['choices'])} Allowed: {', '.join(meta['choices'])}.".strip(),
                )
            low, high = meta["at_least"], meta["below"]
            if (low is not None and value < low) or (high is not None and value >= high):
                raise ConfigError(
                    f"{f.name} is {value}",
                    remedy=f"It is at least {low:g}" + (f" and below {high:g}." if high is not None else "."),
                )

    def resolved(self) -> dict[str, Any]:
        """Every option by its name."""
        return asdict(self)

    def output(self) -> Path:
        """The folder for what is written. Raises ConfigError if it cannot be; makes nothing."""
        out = Path(self.out or "").resolve()
        there = next(folder for folder in (out, *out.parents) if folder.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise ConfigError("the output folder cannot be written", where=there, remedy="Pass another --out.")
        return out


@dataclass
class TrainConfig(Options):
    """A DreamBooth-style training run. Defaults are the community's for Stable Diffusion 1.5."""

    model: str | None = option(
        None, "A diffusers folder, a single .safetensors file (with --base), or a Hub id.", required=True
    )
    base: str | None = option(None, "The folder or Hub id with the configs and the tokenizer of a single-file model.")
    data: str | None = option(None, "A folder of images; NAME.txt beside NAME.png is its caption.", required=True)
    instance_prompt: str | None = option(None, "The caption of images without a .txt.")
    class_prompt: str | None = option(
        None, "Switches prior preservation on: what the class is called, without the new word."
    )
    class_data: str | None = option(
        None, "A folder of class images; missing ones are generated into it. Default: OUT/class."
    )
    num_class_images: int = option(100, "How many class images there shall be.", at_least=1)
    resolution: int | None = option(
        None, "Side of the training images in pixels; default: what the model was made for.", at_least=8
    )
    flip: bool = option(False, "Mirror images at random.")
    caption_dropout: float = option(
        0.0, "Probability of an empty caption, which guidance needs.", at_least=0, below=1.0001
    )
    targets: str = option("attn", "Which layers: attn, attn-mlp, full, or a regular expression for whole names.")
    train_text_encoder: bool = option(False, "Adapt the text encoder too.")
    batch_size: int = option(1, "Images a step (as many class images come on top).", at_least=1)
    snr_gamma: float | None = option(None, "Weight the loss by min-SNR with this gamma; 5 is usual.", at_least=0)
    prior_weight: float = option(1.0, "Weight of the class images.", at_least=0)
    name: str | None = option(None, "Name of the adapter; default: the output folder's.")

    def validate(self) -> None:
        """Raise ConfigError for the first option with a value that is not allowed."""
        super().validate()
        if self.class_data and not self.class_prompt:
            raise ConfigError(
                "class_data without class_prompt", remedy="Say with --class-prompt what the class images show."
            )


Run = TypeVar("Run", bound=Options)


def _check_type(name: str, value: Any, declared: str) -> None:
    kinds = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}[declared.partition(" ")[0]]
    if (
        not isinstance(value, kinds)
        or (isinstance(value, bool) and bool not in kinds)
        or (isinstance(value, float) and not math.isfinite(value))
    ):
        raise ConfigError(
            f"{name} is {shown(value)}",
            remedy=f"It is a {'finite ' if float in kinds else ''}{declared.partition(' ')[0]}.",
        )


def from_toml(path: str | Path, overrides: Mapping[str, Any], kind: type[Run] = TrainConfig) -> Run:  # type: ignore[assignment]
    """The options in a TOML file, replaced by `overrides`. Raises ConfigError or UnknownNameError."""
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config file: {error.strerror}", where=path) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the config file is no TOML ({error})", where=path) from error
    known = {f.name for f in fields(kind)}
    for name in values:
        if name.replace("-", "_") not in known:
            raise UnknownNameError.of("option", name, known, where=path)
    return kind(**{name.replace("-", "_"): value for name, value in values.items()} | dict(overrides))
