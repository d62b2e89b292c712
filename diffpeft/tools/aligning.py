"""Several adapters of one family, layer by layer: what each of them has for a layer, whichever names and joints its format has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from diffpeft.bundle import Bundle, Entry
from diffpeft.converters.rows import Unfit, split
from diffpeft.errors import CannotConvertError, WrongBaseError, shown

Terms = list[tuple[int, Entry]]  # of one layer: (which of the bundles, what it has)


def common_family(bundles: Sequence[Bundle]) -> tuple[str, ...]:
    """The families that all bundles may be for, the likeliest first. Raises WrongBaseError if there is none."""
    common = _families(bundles[0])
    for bundle in bundles[1:]:
        names = _families(bundle)
        if not (shared := tuple(name for name in common if name in names)):
            raise WrongBaseError(
                f"{shown(bundle.source)} is for {' or '.join(names) or 'an unknown family'}, "
                f"and {shown(bundles[0].source)} for {' or '.join(common) or 'an unknown family'}",
                where=bundle.source,
                remedy="Adapters of one family can be put together.",
            )
        common = shared
    return common


def _families(bundle: Bundle) -> tuple[str, ...]:
    return bundle.families or (bundle.family,)


def aligned(bundles: Sequence[Bundle]) -> dict[str, Terms]:
    """{layer: what the bundles have for it}, in the order in which layers come.

    A joint layer stays one where all bundles that have any of its parts have it joint; else it is taken apart.
    """
    layers_of: dict[str, set[str]] = {}
    for entry in _entries(bundles):
        for target in entry.targets:
            layers_of.setdefault(target, set()).add(entry.layer)
    terms: dict[str, Terms] = {}
    for number, bundle in enumerate(bundles):
        for entry in bundle.entries:
            alone = all(layers_of[target] == {entry.layer} for target in entry.targets)
            for piece in [entry] if alone else parts_of(entry, bundle.source):
                terms.setdefault(piece.layer, []).append((number, piece))
    return terms


def parts_of(entry: Entry, source: str) -> list[Entry]:
    """A joint layer's entry as entries of its parts. Raises CannotConvertError for a method that mixes the parts' rows."""
    try:
        return split(entry)
    except Unfit as why:
        raise CannotConvertError(
            f"a joint layer cannot be taken apart, and another file has its parts: {why}",
            where=f"{source}: {entry.layer}",
            remedy="Load the adapters onto their model and use diffpeft.combine.",
        ) from why


def _entries(bundles: Iterable[Bundle]) -> Iterable[Entry]:
    return (entry for bundle in bundles for entry in bundle.entries)
