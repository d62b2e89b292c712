"""The writing side's first step: entries for the layers that a format has. Joint layers in the original's names, taken apart in diffusers'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from diffpeft.bundle import Bundle, Entry, Rule, dotted, parted
from diffpeft.converters.families import Table
from diffpeft.converters.formats import Format, attention
from diffpeft.converters.formats.base import table_of
from diffpeft.converters.formats.fields import without_scale
from diffpeft.converters.provenance import KEY, blocks_in, places_in
from diffpeft.converters.rows import DOWN, Blocks, Unfit, aspect, joined
from diffpeft.converters.rows import split as taken_apart


@dataclass(frozen=True)
class Arranged:
    """The entries of a bundle as a format needs them.

    `failed` {layer: why it cannot be joined or taken apart}; `blocks` {joint layer: ranks of its parts}; `inexact` are layers whose numbers had to be
    computed.
    """

    entries: Sequence[Entry] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    blocks: Mapping[str, Blocks] = field(default_factory=dict)
    inexact: Sequence[str] = ()


class Place(NamedTuple):
    """Where an entry goes in a joint layer: the layer's canonical name, its rule, and which of the rule's parts the entry is for."""

    layer: str
    rule: Rule
    part: int


@dataclass(frozen=True)
class Layers:
    """Which layers a format has: the original program's, joint ones among them, or diffusers'; and those that the adapter's file of it had before."""

    table: Table
    original: bool
    before: Mapping[str, Mapping[str, tuple[int, ...]]]  # {layer: {role: shape}}

    def have(self, entry: Entry) -> bool:
        """Whether an entry's layer is one of them, or no joint one."""
        if not entry.rule or entry.layer in self.before:
            return True
        return self.original and self.table.is_original(*parted(entry.layer)) and not self._are_apart(entry)

    def _are_apart(self, entry: Entry) -> bool:
        """Whether a joint layer is read, but its parts are written one by one."""
        names = [name for name, _ in entry.rule.parts] if entry.rule else []
        place = self.table.to_original(parted(entry.layer)[0], names[0]) if len(names) > 1 else None
        return place is not None and len(place[0].parts) == 1

    def joint(self, entry: Entry) -> Place | None:
        """The joint layer among them that an entry's layer is a part of."""
        component, layer = parted(entry.layer)
        if not (self.original or self.before) or entry.rule or entry.layer in self.before:
            return None
        place = (
            self.table.to_original(component, layer, aspect(entry.shapes)) if component in self.table.rules else None
        )
        if place is None or place[0].renames:
            return None
        name = dotted(component, place[0].original)
        return Place(name, *place) if self.original or name in self.before else None


def arranged(bundle: Bundle, fmt: Format) -> Arranged:
    """A bundle's entries as a format needs them. Layers that the file had before, if it was of this format, become these again."""
    table, record = table_of(fmt, bundle.family), bundle.metadata.get(KEY, "")
    layers, blocks = Layers(table, fmt.original(table), places_in(record, fmt.name)), blocks_in(record)
    here = attention.adjusted(bundle.entries) if fmt.folder else [without_scale(entry) for entry in bundle.entries]
    apart = _apart(here, layers, blocks)
    together = _together(apart.entries, layers)
    entries = [_named(entry, table) for entry in together.entries] if fmt.folder else together.entries
    failed, blocks = {**apart.failed, **together.failed}, {**apart.blocks, **together.blocks}
    return Arranged(entries, failed, blocks, together.inexact)


def _apart(entries: Sequence[Entry], layers: Layers, blocks: Mapping[str, Blocks]) -> Arranged:
    """Entries of joint layers that the format does not have as entries of their parts."""
    parts: list[Entry] = []
    failed: dict[str, str] = {}
    for entry in entries:
        try:
            parts += [entry] if layers.have(entry) else taken_apart(entry, blocks.get(entry.layer))
        except Unfit as why:
            failed[entry.layer] = str(why)
            parts.append(entry)
    still_joint = {entry.layer: blocks[entry.layer] for entry in parts if entry.rule and entry.layer in blocks}
    return Arranged(parts, failed, still_joint)


def _together(entries: Sequence[Entry], layers: Layers) -> Arranged:
    """Entries of parts of joint layers that the format has as entries of these, each where the first of its parts was."""
    out: list[Entry] = []
    failed: dict[str, str] = {}
    blocks: dict[str, Blocks] = {}
    inexact: list[str] = []
    for place, parts in _groups(entries, layers):
        if place is None:
            out += parts.values()
            continue
        rank = next(iter(layers.before.get(place.layer, {}).get(DOWN, ())), None)
        try:
            joint = joined(parted(place.layer)[0], place.rule, parts, rank)
        except Unfit as why:
            failed |= {entry.layer: f"{place.layer}: {why}" for entry in parts.values()}
            out += parts.values()
            continue
        out.append(joint.entry)
        inexact += [] if joint.exact else [place.layer]
        blocks |= {place.layer: joint.blocks} if joint.blocks else {}
    return Arranged(out, failed, blocks, inexact)


def _groups(entries: Sequence[Entry], layers: Layers) -> list[tuple[Place | None, dict[int, Entry]]]:
    """What becomes one entry: (where, {part: entry}). A second entry of a method for a part is left to itself, as are entries of other layers."""
    groups: dict[object, tuple[Place | None, dict[int, Entry]]] = {}
    for number, entry in enumerate(entries):
        place = layers.joint(entry)
        part = place.part if place else 0
        key = (place.layer, entry.method, entry.methods) if place else number
        if key in groups and part in groups[key][1]:
            key = number
        groups.setdefault(key, (place, {}))[1][part] = entry
    return list(groups.values())


def _named(entry: Entry, table: Table) -> Entry:
    """The entry with the name that its layer has in the family's model, if no model told it."""
    component, layer = parted(entry.layer)
    if entry.own is not None or component not in table.encoders:
        return entry
    return replace(entry, own=table.own_name(component, layer))
