"""Trackers (TensorBoard, Weights & Biases, ...) through accelerate's classes. Imports none of them before a run begins."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from diffpeft.errors import ConfigError, UnknownNameError, shown
from diffpeft.train.config import Options
from diffpeft.train.groups import entries_of

CSV, NONE = "csv", "none"
# {accelerate's name of a tracker: the packages of which it needs one}
PACKAGES: dict[str, tuple[str, ...]] = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "mlflow": ("mlflow",),
    "comet_ml": ("comet_ml",),
    "aim": ("aim",),
    "clearml": ("clearml",),
    "dvclive": ("dvclive",),
    "swanlab": ("swanlab",),
}
FOLDER = "log"  # in the output folder, of trackers that write files


def _registered() -> Mapping[str, type]:
    """The classes that accelerate knows, those that a user has registered among them, as far as it is loaded."""
    return getattr(sys.modules.get("accelerate.tracking"), "LOGGER_TYPE_TO_CLASS", {})


def logs_of(options: Options) -> list[str]:
    """Where the numbers of a run go: csv, and names of trackers.

    Raises UnknownNameError for a tracker that is not known, ConfigError for one whose package is not there.
    """
    names = list(dict.fromkeys(entries_of(options.log)))
    for name in names:
        UnknownNameError.check("log", name, {CSV, NONE, *PACKAGES, *_registered()})
    if NONE in names:
        if len(names) > 1:
            raise ConfigError(f"log is {shown(','.join(names))}", remedy=f"Leave {NONE} out, or the others.")
        return []
    for name in names:
        packages = PACKAGES.get(name, ())
        if packages and not any(find_spec(package) for package in packages):
            raise ConfigError(f"log has {name}, which is not installed", remedy=f"pip install {packages[0]}")
    return names


class TrackerLog:
    """A Sink that is one of accelerate's trackers. Raises ConfigError where it cannot begin.

    Args:
        run: the name of the run.
        out: the output folder.
        done: the steps that a run goes on after.
        values: what the tracker shows of the run's options.
    """

    def __init__(self, name: str, run: str, out: Path, done: int, values: Mapping[str, object]):
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        self.name = name
        kind = LOGGER_TYPE_TO_CLASS[name]
        places = [str(out / FOLDER)] if kind.requires_logging_directory else []
        try:
            self.tracker = kind(run, *places, **_keywords(name, run, out, done))
            self.tracker.start()
            self.tracker.store_init_configuration({option: _plain(value) for option, value in values.items()})
        except Exception as error:  # trackers raise what they like: without a network, an account, a folder
            raise ConfigError(
                f"log has {name}, which cannot begin: {error or type(error).__name__}",
                remedy=_REMEDIES.get(name, "Leave it out of --log."),
            ) from error

    def begin(self, done: int) -> None:
        """It has begun."""

    def row(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log the numbers of a step."""
        self.tracker.log(dict(numbers), step=step)

    def images(self, step: int, images: Mapping[str, Path]) -> None:
        """Log pictures, if it can."""
        import numpy as np
        from PIL import Image

        if hasattr(self.tracker, "log_images"):
            pixels = {name: np.asarray(Image.open(path).convert("RGB")) for name, path in images.items()}
            layout = {"dataformats": "NHWC"} if self.name == "tensorboard" else {}
            self.tracker.log_images({name: array[None] for name, array in pixels.items()}, step=step, **layout)

    def close(self) -> None:
        """Finish."""
        self.tracker.finish()


_REMEDIES = {"wandb": "wandb login; or WANDB_MODE=offline, which needs no network."}


def _keywords(name: str, run: str, out: Path, done: int) -> dict[str, object]:
    """What a tracker is made with beside its name: TensorBoard shows nothing of steps that are not in the state; wandb writes into the output folder."""
    if name == "tensorboard":
        return {"purge_step": done + 1} if done else {}
    if name == "wandb":
        return {"dir": str(out), "name": run}
    return {}


def _plain(value: object) -> bool | int | float | str:
    """An option's value as every tracker takes it."""
    if isinstance(value, (bool, int, float)):
        return value
    return "" if value is None else ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
