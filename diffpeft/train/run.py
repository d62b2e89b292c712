"""A finished training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffpeft.families import Family
from diffpeft.readable import Readable, words
from diffpeft.train import data
from diffpeft.train.config import TrainConfig
from diffpeft.train.heldout import Best, HeldoutLoss
from diffpeft.train.report.live import Live
from diffpeft.train.usage import Usage


@dataclass(repr=False)
class TrainRun(Readable):
    """A finished training run: every option as it was used, the pipeline with the adapter on it, the losses by step, the seconds it took.

    `account` says what the data held, `origins` where the value of each option is from, `heldout` what was measured on pictures that were held out, `best` the
    step whose adapter it is, if it was chosen by that, `usage` what the run took, with the sessions that it went on from. `files` are those
    that `save` wrote; `class_images` how many images of the class there are.
    """

    config: TrainConfig
    family: Family
    name: str
    losses: list[float]
    seconds: float
    account: data.Account
    origins: Mapping[str, str] = field(default_factory=dict)
    heldout: list[HeldoutLoss] = field(default_factory=list)
    best: Best | None = None
    usage: Usage = field(default_factory=Usage)
    class_images: int = 0
    files: list[Path] = field(default_factory=list)
    live: Live | None = None  # its page

    def _title(self) -> str:
        return self.name

    def _rows(self) -> dict[str, str]:
        return {
            "method": self.config.method,
            "steps": f"{len(self.losses)} in {self.seconds:.0f} s",
            "loss": words(self.losses[-1] if self.losses else None),
            "held out": str(self.heldout[-1]) if self.heldout else "",
            "best": f"step {self.best.step}: {self.best.reason}" if self.best else "",
            "files": words(self.files),
            "report": words(self.report),
        }

    @property
    def step(self) -> int:
        """The step whose adapter it is."""
        return self.best.step if self.best else len(self.losses)

    @property
    def report(self) -> Path | None:
        """The page that shows the run."""
        return self.live.path if self.live else None
