"""How a run is fitted into a memory: of the ways to save some, the least slow one whose estimate fits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace

from diffpeft.errors import ConfigError, listed
from diffpeft.train import machines
from diffpeft.train.check import Checked, held_by
from diffpeft.train.config import TrainConfig
from diffpeft.train.estimate import GIB, SHARES, Outline, Phase, sized
from diffpeft.train.watch import Watch

_SLOWING = {"gradient_checkpointing": 0.33, "int8": 0.1, "nf4": 0.2, "offload": 0.5}  # roughly, of a step's time


@dataclass(frozen=True)
class Way:
    """What is done to save memory: names and values are those of options."""

    gradient_checkpointing: bool
    quantize: str | None
    offload: float

    @property
    def slowing(self) -> float:
        """About how much longer a step takes, as a share of it."""
        return (
            _SLOWING["gradient_checkpointing"] * self.gradient_checkpointing
            + _SLOWING.get(self.quantize or "", 0)
            + _SLOWING["offload"] * self.offload
        )

    def __str__(self) -> str:
        """As options are typed."""
        words = ["--gradient-checkpointing"] if self.gradient_checkpointing else []
        words += [f"--quantize {self.quantize}"] if self.quantize else []
        words += [f"--offload {self.offload:g}"] if self.offload else []
        return " ".join(words) or "nothing that saves memory"


def ways(config: TrainConfig, said: Mapping[str, str]) -> list[Way]:
    """The ways that are open to a run, the least slow one first. What was said stays: `said` are the options that were, and where."""
    fixed = machines.sharding(config) or bool(held_by(config))
    free: dict[str, tuple[object, ...]] = {
        "gradient_checkpointing": (False, True),
        "quantize": (None,) if fixed else (None, "int8", "nf4"),
        "offload": (0.0,) if fixed or config.compile else SHARES,
    }
    default = {f.name: f.default for f in fields(config)}
    for name in free:
        if name in said or getattr(config, name) != default[name]:
            free[name] = (getattr(config, name),)
    combinations = itertools.product(*free.values())
    return sorted((Way(**dict(zip(free, values, strict=True))) for values in combinations), key=lambda way: way.slowing)  # type: ignore[arg-type]


def fitted(checked: Checked, watch: Watch | None = None) -> tuple[TrainConfig, Checked]:
    """A run with the options that make it fit into the memory that was asked for, and where these are from. `watch` is told. Loads nothing.

    Raises ConfigError if none does, with the least that is needed.
    """
    config = checked.config
    if config.memory is None:
        return config, checked
    limit, least = config.memory_left(), []
    for way, phase in estimates(config, checked):
        if phase.total <= limit:
            picked = {name: value for name, value in vars(way).items() if value != getattr(config, name)}
            origins = {**checked.origins, **dict.fromkeys(picked, f"memory {config.memory}")}
            config = replace(config, **picked)
            if watch is not None:
                watch.note(f"memory {config.memory}: {way}; {phase.what} takes {sized(phase.total)}, as estimated")
            return config, replace(checked, config=config, origins=origins)
        least.append((phase.total, way, phase))
    size, way, phase = min(least, key=lambda entry: entry[0])
    raise ConfigError(
        f"memory {config.memory} is too little: the least is {_at_least(size + config.memory_bytes() - limit)}, for {phase.what}, with {way}",
        remedy="Pass a lower --resolution, --batch-size or --rank, or more --memory"
        + (", or leave options out that keep the memory up." if len(least) < len(ways(config, {})) else "."),
    )


def _at_least(size: float) -> str:
    """Bytes as --memory takes them, rounded up: so many are enough."""
    return f"{math.ceil(100 * size / GIB) / 100:.2f}GB"


def estimates(config: TrainConfig, checked: Checked) -> Iterator[tuple[Way, Phase]]:
    """The ways that are open to a run, with the part of it that needs the most. What is computed is counted once for all shares of blocks.

    Raises ConfigError for a model of which that cannot be counted: what would fit nobody knows.
    """
    outlines: dict[tuple[bool, str | None], Outline] = {}
    for way in ways(config, checked.origins):
        key = (way.gradient_checkpointing, way.quantize)
        if key not in outlines:
            outlines[key] = Outline(replace(config, **vars(way)), checked)
        phases = outlines[key].phases(way.offload)
        if uncounted := [phase.what for phase in phases if phase.computed is None]:
            raise ConfigError(
                f"memory {config.memory}: how much this model computes cannot be told ({listed(uncounted)}), and so not what fits",
                remedy="Choose --gradient-checkpointing, --quantize and --offload yourself.",
            )
        yield way, max(phases, key=lambda phase: phase.total)
