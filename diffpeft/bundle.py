"""Bundle: an adapter between file and model. Every file becomes one, every adapted model becomes one.

It holds entries, whose tensors are as stored (dtype, shape and where the bytes are), under canonical names, and what a file has beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diffpeft.definition import deltas
from diffpeft.entries import COMPONENTS, Entry, Rule, canonical, dotted, parted
from diffpeft.handles import Handle, nbytes
from diffpeft.readable import Readable, family_in_words, keys_in_words, size_in_words

if TYPE_CHECKING:
    import torch

__all__ = [
    "COMPONENTS",
    "Bundle",
    "Entry",
    "Handle",
    "Rule",
    "canonical",
    "dotted",
    "parted",
    "trigger_words",
]


MEMORY = "memory"  # the format of an adapter that is on a model


@dataclass(repr=False)
class Bundle(Readable):
    """A whole adapter: entries in file order, tensors that are no adapter's under their original keys, and the file's metadata."""

    format: str
    family: str
    entries: list[Entry]
    carried: dict[str, Handle] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    source: str = "a dict of tensors"
    families: tuple[str, ...] = ()  # every family the names fit, the likeliest first
    order: tuple[str, ...] = ()  # the file's keys

    @property
    def shared(self) -> dict[str, Mapping[str, Handle]]:
        """{component: the tensors by role that all its entries share}, where a method has such."""
        return {parted(entry.layer)[0]: entry.shared for entry in self.entries if entry.shared}

    @property
    def methods(self) -> set[str]:
        """Names of the methods in use."""
        return {method for entry in self.entries for method in entry.methods}

    @property
    def trigger_words(self) -> tuple[str, ...]:
        """What the file says must stand in a prompt, from `modelspec.trigger_phrase` or `trained_words`."""
        return trigger_words(self.metadata)

    def _title(self) -> str:
        return self.source

    def _rows(self) -> dict[str, str]:
        handles = [h for entry in self.entries for h in entry.tensors.values()] + [*self.carried.values()]
        components = dict.fromkeys(parted(entry.layer)[0] or "the model" for entry in self.entries)
        return {
            "format": self.format,
            "family": family_in_words(self.family, self.families[1:]),
            "methods": ", ".join(sorted(self.methods)),
            "layers": f"{len(self.entries)} in {', '.join(components)}",
            "ranks": ", ".join(str(rank) for rank in sorted({entry.rank for entry in self.entries} - {0})),
            "size": size_in_words(len(handles), sum(map(nbytes, handles)), (h.dtype for h in handles)),
            "trigger words": ", ".join(self.trigger_words),
            "not an adapter's": keys_in_words(self.carried),
        }

    def deltas(self, base: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """{canonical layer: f(W) - W in float64}, by each method's definition. `base` {layer: W} is for methods that need W, such as DoRA and OFT.

        Entries that change nothing but a bias are left out. Raises ConfigError if W is needed and not there.
        """
        return deltas(self.entries, base or {})


def trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """What a file says must stand in a prompt."""
    text = metadata.get("modelspec.trigger_phrase") or metadata.get("trained_words") or ""
    return tuple(word for word in (part.strip(" []\"'") for part in text.split(",")) if word)
