"""The sizes of published models, by which layers of the same names are told apart: `published.json`, made from diffusers' own classes.

A model has layers of a file if it has all their names, in both programs' spelling, their rows and columns, and as many blocks. Some of the models
have no table here: what is only theirs is of a family that is not known.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Extent = tuple[int, int]  # rows and columns of a layer's weight


@dataclass(frozen=True)
class Published:
    """A published model. `depths` {stack: blocks} in each program's spelling, `layers` {flat name with # for each number: the extents of such layers,
    none of a norm}.
    """

    name: str
    family: str  # "" if there is no table of it
    depths: tuple[Mapping[str, int], ...]
    layers: Mapping[str, Sequence[Sequence[int]]]

    def knows(self, layers: LayerKinds) -> int:
        """How many of the layers have names of this model."""
        return sum(kind.count for kind in layers.kinds if kind.name in self.layers)

    def has(self, layers: LayerKinds) -> bool:
        """Whether all layers are of this model: names, extents and numbers of blocks."""
        return all(self._has(kind) for kind in layers.kinds)

    def is_full(self, layers: LayerKinds) -> bool:
        """Whether all blocks have layers, of those stacks that have any."""
        touched = {s: n for depths in self.depths for s, n in depths.items() if s in layers.blocks}
        return all(layers.blocks[stack] == frozenset(range(n)) for stack, n in touched.items())

    def is_whole(self, layers: LayerKinds) -> bool:
        """Whether all blocks have layers, of all stacks; refiners of two or three blocks do not count."""
        return any(
            all(layers.blocks.get(stack) == frozenset(range(n)) for stack, n in depths.items() if n > 3)
            for depths in self.depths
        )

    def _has(self, kind: LayerKind) -> bool:
        extents = self.layers.get(kind.name)
        depth = max((depths.get(kind.stack, 0) for depths in self.depths), default=0)
        if extents is None or (depth and max(kind.blocks) >= depth):
            return False
        return not (extents and kind.stack and kind.extent) or [*kind.extent] in extents  # inputs and outputs vary


@dataclass(frozen=True)
class LayerKind:
    """Layers of one name but for the numbers in it, and one extent (None where the tensors do not show it)."""

    name: str  # flat, with # for each number
    extent: Extent | None
    stack: str  # what is before the first number, empty if there is none
    count: int
    blocks: frozenset[int]  # the first numbers


@dataclass(frozen=True)
class LayerKinds:
    """Layers of a denoiser by kind; `blocks` {stack: the numbers of the blocks that some layer is in}."""

    kinds: tuple[LayerKind, ...]
    blocks: Mapping[str, frozenset[int]]

    def __len__(self) -> int:
        return sum(kind.count for kind in self.kinds)


_NUMBER = re.compile(r"\d+")
_STACK = re.compile(r"([a-zA-Z_]+?)_?(\d+)(?:_|$)")


def grouped(layers: Iterable[tuple[str, Extent | None]]) -> LayerKinds:
    """Layers, dotted or flat, with their extents."""
    members_of: dict[tuple[str, Extent | None], list[str]] = {}
    for layer, extent in layers:
        flat = layer.replace(".", "_")
        members_of.setdefault((_NUMBER.sub("#", flat), extent), []).append(flat)
    kinds = []
    blocks: dict[str, set[int]] = {}
    for (name, extent), members in members_of.items():
        numbered = [match for flat in members if (match := _STACK.match(flat))]
        stack = numbered[0][1] if numbered else ""
        numbers = frozenset(int(match[2]) for match in numbered)
        kinds.append(LayerKind(name, extent, stack, len(members), numbers))
        if stack:
            blocks.setdefault(stack, set()).update(numbers)
    return LayerKinds(tuple(kinds), {stack: frozenset(numbers) for stack, numbers in blocks.items()})


@functools.cache
def published() -> tuple[Published, ...]:
    """All models of the file."""
    rows = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    return tuple(Published(name, row["family"], tuple(row["depths"]), row["layers"]) for name, row in rows.items())
