"""How a page says numbers and measures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Worded(NamedTuple):
    """What a measure of metrics.json is, in words, and which way is better."""

    words: str
    better: str = ""


_LOWER, _HIGHER = "lower is better", "higher is better"
MEASURES: Mapping[str, Worded] = {
    "heldout_loss": Worded("Loss on what was not trained on", _LOWER),
    "distance_to_target": Worded("Distance of small patches to true pictures in the new style", _LOWER),
    "distance_to_original": Worded("Distance of small patches to pictures in the old style", "higher: further from it"),
    "shape_kept": Worded("Overlap of shapes with and without the adapter", _HIGHER),
}


def measure(name: str) -> Worded:
    """A measure in words; one that is not known by its name."""
    return MEASURES.get(name, Worded(name.replace("_", " ").capitalize()))


def duration(seconds: float) -> str:
    """Seconds as 45 s, 3:20 min or 2:05 h."""
    minutes, left = divmod(max(round(seconds), 0), 60)
    if not minutes:
        return f"{left} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d} h" if hours else f"{minutes}:{left:02d} min"


def size(number: int) -> str:
    """Bytes as 512 MiB or 1.5 GiB."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def speed(per_second: float) -> str:
    """Steps per second, or seconds a step where that is slow."""
    return f"{per_second:.2f} it/s" if per_second >= 1 or not per_second else f"{1 / per_second:.1f} s/it"


def number(value: float) -> str:
    """A loss or a rate with four digits that count."""
    return f"{value:.4g}"


def change(before: float, after: float, error: float | None = None) -> str:
    """How much a measure changed, in percent of what it was, with its standard error."""
    if not before:
        return ""
    if after > 4 * before > 0:
        return f"{after / before:.1f} times"
    said = f"{100 * (after - before) / abs(before):+.1f} %"
    return said if error is None else f"{said} ± {100 * error / abs(before):.1f}"
