"""A finished training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffpeft.families import Family
from diffpeft.train import data
from diffpeft.train.config import TrainConfig


@dataclass
class TrainRun:
    """A finished training run: every option as it was used, the pipeline with the adapter on it, the losses by step, the seconds it took.

    `account` says what the data held, and `origins` where the value of each option is from. `files` are those that `save` wrote; `class_images` how many
    images of the class there are.
    """

    config: TrainConfig
    family: Family
    name: str
    losses: list[float]
    seconds: float
    account: data.Account
    origins: Mapping[str, str] = field(default_factory=dict)
    class_images: int = 0
    files: list[Path] = field(default_factory=list)
