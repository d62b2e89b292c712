"""The pictures of grids: one for each place, where a setting of each axis holds. Imports no torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from diffpeft.drawing.axes import Axis
from diffpeft.drawing.plan import Active, Shelf
from diffpeft.drawing.shots import Shot
from diffpeft.pipeline.prompt import Tag

_NOTHING = Axis("", "", ("",))


@dataclass(frozen=True)
class GridPage:
    """One grid: its labels, and which pictures lie where, by their numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[str]
    numbers: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Varied:
    """What the axes of a grid are about.

    Args:
        by_text: the first picture of each prompt as it was typed.
        shelf: the adapters.
        choices: the names of the adapters that an axis chooses among.
    """

    by_text: Mapping[str, Shot]
    shelf: Shelf
    choices: frozenset[str]


def on_grid(
    shots: Sequence[Shot], grid: Sequence[Axis], by_text: Mapping[str, Shot], shelf: Shelf
) -> tuple[list[Shot], list[GridPage]]:
    """Pictures at each place of a grid, and the grids: one for each picture that is asked for, and each combination of the axes after the second.

    Where axes are of prompts or seeds, they say themselves which are asked for. Raises UnknownNameError for an adapter that there is not.
    """
    named = [name for axis in grid if axis.kind == "lora" for text in axis.values for name, _ in shelf.named(str(text))]
    varied = Varied(by_text, shelf, frozenset(named))
    across, down, *deeper = [*grid, _NOTHING][: max(2, len(grid))]
    bases = _bases(shots, {axis.kind for axis in grid})
    pages, cells = list[GridPage](), list[Shot]()
    for base in bases:
        for picked in itertools.product(*(list(zip(axis.values, axis.labels, strict=True)) for axis in deeper)):
            settings = [(axis, value) for axis, (value, _) in zip(deeper, picked, strict=True)]
            numbers = []
            for row in down.values:
                numbers.append([*range(len(cells), len(cells) + len(across.values))])
                cells += [_at(base, [*settings, (across, c), (down, row)], varied) for c in across.values]
            labels = [base.title(bases), *(label for _, label in picked)]
            rows = down.labels if down.kind else [""]
            pages.append(GridPage(", ".join(filter(None, labels)), across.labels, rows, numbers))
    return cells, pages


def _bases(shots: Sequence[Shot], kinds: set[str]) -> list[Shot]:
    """The pictures that a grid is made for each of: those that differ in what no axis says."""
    bases: dict[object, Shot] = {}
    for shot in shots:
        seed = 0 if "seed" in kinds else shot.seed
        bases.setdefault((seed, None if "prompt" in kinds else replace(shot, seed=0)), shot)
    return list(bases.values())


def _at(base: Shot, settings: Sequence[tuple[Axis, object]], varied: Varied) -> Shot:
    """A picture with a value of each axis. Which adapters are on is settled before how strong they are."""
    shot = base
    for axis, value in sorted(settings, key=lambda setting: list(_CHANGES).index(setting[0].kind)):
        shot = _CHANGES[axis.kind](shot, axis, value, varied)
    return shot


def _prompted(shot: Shot, axis: Axis, value: object, varied: Varied) -> Shot:
    return replace(varied.by_text[str(value)], seed=shot.seed)


def _adapted(shot: Shot, axis: Axis, value: object, varied: Varied) -> Shot:
    """One of the adapters on an axis is on, beside those that are on no axis."""
    others = tuple(row for row in shot.adapters or () if row[0] not in varied.choices)
    return replace(shot, adapters=(*others, *varied.shelf.named(str(value))))


def _strong(shot: Shot, axis: Axis, value: object, varied: Varied) -> Shot:
    """The adapters that an axis chooses among, or all if there is no such axis, have a strength."""
    return replace(shot, adapters=_at_strength(shot.adapters or (), value, varied.choices))


def _weighted(shot: Shot, axis: Axis, value: object, varied: Varied) -> Shot:
    return replace(shot, adapters=_at_strength(shot.adapters or (), value, frozenset([axis.name])))


def _at_strength(mix: Active, value: object, names: frozenset[str]) -> Active:
    """Adapters, of which some have another strength; what a tag says of blocks and steps stays."""
    assert isinstance(value, float)
    meant = names or {name for name, _ in mix}
    return tuple(
        (name, strength if name not in meant else strength.at(value) if isinstance(strength, Tag) else value)
        for name, strength in mix
    )


def _set(shot: Shot, axis: Axis, value: object, varied: Varied) -> Shot:
    return replace(shot, **{axis.kind: value})  # type: ignore[arg-type]


Change = Callable[[Shot, Axis, object, Varied], Shot]
_CHANGES: Mapping[str, Change] = {
    "": lambda shot, *_: shot,
    "prompt": _prompted,
    "lora": _adapted,
    "strength": _strong,
    "weight": _weighted,
    **dict.fromkeys(("seed", "steps", "guidance", "scheduler"), _set),
}
