"""A table of layer names: templates in which `{}` stands for a number, and from them the way back from flat names."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """{component: templates of its layers, in diffusers' names}."""

    components: Mapping[str, Sequence[str]]

    def dotted(self, component: str, flat: str) -> str | None:
        """The layer whose dots written as underscores give `flat`; None if the family has no such layer."""
        match = _flat(tuple(self.components.get(component, ()))).fullmatch(flat)
        if match is None:
            return None
        at = int((match.lastgroup or "")[1:])
        template = self.components[component][at]
        return template.format(*(n for n in match.groups()[match.lastindex :] if n is not None))

    def knows(self, component: str, layer: str) -> bool:
        """Whether the family has a layer of this dotted name."""
        return self.dotted(component, layer.replace(".", "_")) == layer


@functools.cache
def _flat(templates: tuple[str, ...]) -> re.Pattern[str]:
    """One pattern for all templates. Its group `tN` is the N-th template, the groups after it are that template's numbers."""
    rows = (re.escape(t.replace(".", "_")).replace(r"\{\}", r"(\d+)") for t in templates)
    return re.compile("|".join(f"(?P<t{n}>{row})" for n, row in enumerate(rows)))
