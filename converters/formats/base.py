"""What a format is: a way to take keys apart and to put them together, and a place for alphas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from diffpeft.bundle import Entry


@dataclass(frozen=True)
class Part:
    """A key taken apart: the component, the layer as the format spells it, and the role of the tensor (`alpha` among them)."""

    component: str
    layer: str
    role: str


class Format(Protocol):
    """How files spell things. `flat` formats write a layer's dots as underscores."""

    name: str
    flat: bool
    alpha_is_tensor: bool  # else alphas stand in the metadata

    def split(self, key: str) -> Part | None:
        """The parts of a key, or None if the key is not of this format."""

    def join(self, part: Part) -> str:
        """The key that `split` takes apart into `part`; `part.layer` has dots."""

    def alphas(self, metadata: Mapping[str, str], ranks: Mapping[str, int]) -> dict[str, float]:
        """{canonical layer: alpha} as the metadata gives them, for the layers in `ranks`."""

    def metadata(self, entries: Sequence[Entry], ranks: Mapping[str, int]) -> dict[str, str]:
        """What this format says about the entries in the metadata."""
