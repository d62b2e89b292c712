"""What a slider is between."""

from __future__ import annotations

from typing import NamedTuple


class Concept(NamedTuple):
    """Three prompts: what is changed, and from which other one to which."""

    target: str
    positive: str
    negative: str

    def under(self, attribute: str) -> Concept:
        """The same of something that has an attribute."""
        return Concept(*(f"{attribute} {prompt}".strip() for prompt in self))
