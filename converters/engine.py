"""The engine's reading side: header -> parts -> layers -> entries. The way back is writing.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from diffpeft.bundle import Bundle, Entry, Handle
from diffpeft.converters.detection import Detection, Fit, fit, methods_of
from diffpeft.converters.families import TABLES, Table
from diffpeft.converters.formats import FORMATS, Format
from diffpeft.converters.formats.base import table_of
from diffpeft.converters.judging import check_alpha, judged, with_alphas
from diffpeft.converters.locating import Where, located
from diffpeft.converters.opening import Opened, Source, opened, parts_of
from diffpeft.converters.placing import Names, Reading, literal, placed
from diffpeft.errors import (
    AmbiguousFormatError,
    CheckpointError,
    UnknownNameError,
    WrongBaseError,
    inside,
    listed,
)
from diffpeft.methods.layout import LAYOUTS


def detect(source: Source, **where: Unpack[Where]) -> Detection:
    """What a file or dict of tensors is, from the header alone. `where`: which file, as for `located`.

    Raises AmbiguousFormatError if its names fit families that spell others apart.
    """
    tensors, metadata, place = opened(located(source, **where))
    with inside(place):
        fits = fit(tensors, metadata, place)
        refuse_ambiguous(fits, place)
        return detected(fits, tensors)


def fitting(source: Source, family: str | None = None) -> Fit:
    """All that a file fits, the ambiguous among it. Of a folder with a file for each component, what all of them fit.

    `family` is known to be what the file is asked for, where formats of different families look alike.
    """
    if several := parts_of(source):
        return _common(several)
    tensors, metadata, where = opened(source)
    with inside(where):
        return fit(tensors, metadata, where, family=family)


def detected(fits: Fit, tensors: Mapping[str, Handle]) -> Detection:
    """A Detection of what fits."""
    layers: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {}
    for key, part in fits.parts.items():
        shapes = layers.setdefault((part.word, part.layer), {})
        shapes |= {part.role: tensors[key].shape} if part.role != "alpha" else {}
    family = fits.families[0] if fits.families else ""
    return Detection(fits.format, family, methods_of(layers.values()), fits.confidence(len(tensors)), fits.families[1:])


def refuse_ambiguous(fits: Fit, where: str) -> None:
    """Raise AmbiguousFormatError where only a guess is left."""
    if fits.ambiguous:
        raise AmbiguousFormatError(
            f"these layers are in {' and in '.join(fits.families)}, and nothing else tells which it is",
            where=where,
            remedy=f"Say family=, for example family={fits.families[0]!r} (--family {fits.families[0]}).",
        )


def read(
    source: Source,
    *,
    family: str | None = None,
    format: str | None = None,
    names: Names | None = None,
    fits: Fit | None = None,
    metadata: Mapping[str, str] | None = None,
    alpha: float | None = None,
    **where: Unpack[Where],
) -> Bundle:
    """A file, a PEFT folder or a dict of tensors as a Bundle. Reads the header; the tensors stay where they are.

    `family` and `format` override detection. `names` {component: layer names, or {name: shape of the canonical weight}} are a model's own, against
    which names are resolved beside the family's table, and which tell the component where the file does not. `fits` is what `fitting` has said
    of it. `metadata` are added to the file's. `alpha` is that of all layers for which the file tells none; without it such a layer has scale 1.
    `where`: which file, as for `located`.
    """
    check_alpha(alpha)
    UnknownNameError.check("format", format, FORMATS)
    UnknownNameError.check("family", family, TABLES)
    source = located(source, **where)
    if several := parts_of(source):
        common = _common(several)
        family = family or (common.families[0] if common.families and not common.ambiguous else None)
        bundles = [read(part, family=family, format=format, names=names, alpha=alpha) for part in several]
        return _merged(bundles, source)
    tensors, told, place = fits.opened if fits else opened(source)
    with inside(place):
        return _read(Opened(tensors, {**told, **(metadata or {})}, place), family, format, names, fits, alpha)


def _read(
    source: Opened,
    family: str | None,
    format: str | None,
    names: Names | None,
    fits: Fit | None,
    alpha: float | None,
) -> Bundle:
    tensors, metadata, where = source
    fits = fits or fit(tensors, metadata, where, format, family)
    fmt = FORMATS[fits.format]
    families = _families(fits, fmt, family, names, where)
    name = next(iter(families), "")
    by = Reading(fmt, table_of(fmt, name), names or {}, metadata, where)
    _refuse_unread(by.table, tensors)
    parts = {**fits.parts, **literal(tensors, fmt, by.names)}
    shared = {role: tensors[key] for role, key in fmt.shared_keys.items() if key in tensors and key not in parts}
    entries = fmt.configured(judged(placed(tensors, parts, by), by), metadata)
    entries = with_alphas([_sharing(entry, shared) for entry in entries], alpha, by)
    beside = tensors.keys() - parts.keys() - {fmt.shared_keys[role] for role in shared}
    carried = {key: handle for key, handle in tensors.items() if key in beside}
    return Bundle(fmt.name, name, entries, carried, dict(metadata), where, families, tuple(tensors))


def _refuse_unread(table: Table, keys: Iterable[str]) -> None:
    """Raise CheckpointError if the keys say that layers are laid out as nothing here reads them."""
    for spelling, why in table.unread.items():
        if keys_so := [key for key in keys if spelling in key]:
            raise CheckpointError(
                why, where=listed(keys_so, 3), remedy="Let the program that made it save it as others do."
            )


def _sharing(entry: Entry, shared: Mapping[str, Handle]) -> Entry:
    """The entry with the tensors of the whole adapter, if its method has such."""
    return replace(entry, shared=shared) if LAYOUTS[entry.method].shared else entry


def unknown_family(fits: Fit, where: object, wanted: str = "") -> WrongBaseError:
    """The error about a file whose layers no table has, with some of its keys; `wanted` is the family that it was to be."""
    alike = (
        f"its layers are those of {' or '.join(fits.looks_like[:3])}" if fits.looks_like else "no table has its layers"
    )
    keys = [key for key, part in fits.parts.items() if part.role != "alpha"]
    return WrongBaseError(
        f"this adapter is for {f'another model than {wanted}' if wanted else 'an unknown family'}: {alike}",
        where=f"{where}: {listed(keys, 3)}",
        remedy="Without a table it can only be loaded: load_lora on a pipeline of its own model takes the names from there.",
    )


def _common(parts: Sequence[Opened]) -> Fit:
    """What the files of one adapter fit together. An unknown denoiser decides; text encoders that no table knows (language models) say nothing."""
    fits = {Path(part.where).name: fitting(part) for part in parts}
    unknown = [fit_ for name, fit_ in fits.items() if not (fit_.families or name.startswith("text_encoder"))]
    known = sorted((fit_ for fit_ in fits.values() if fit_.families), key=lambda fit_: len(fit_.families))
    if unknown or not known:
        return (unknown or [*fits.values()])[0]
    families = tuple(filter(lambda family: all(family in fit_.families for fit_ in known), known[0].families))
    ambiguous = any(fit_.ambiguous for fit_ in known) and len(known[0].families) > 1
    return replace(known[0], families=families, ambiguous=bool(families) and ambiguous)


def _merged(bundles: Sequence[Bundle], source: Source) -> Bundle:
    entries = [e for b in bundles for e in b.entries]
    carried = {key: h for b in bundles for key, h in b.carried.items()}
    return replace(bundles[0], entries=entries, carried=carried, order=(), source=str(source))


def _families(fits: Fit, fmt: Format, family: str | None, names: Names | None, where: str) -> tuple[str, ...]:
    """The families to read a file as: the one that was asked for, if its names fit, or all that fit."""
    if family is None:
        if names is None:
            refuse_ambiguous(fits, where)
            if not fits.families and not fmt.folder:
                raise unknown_family(fits, where)
        return fits.families
    if names is None and fits.known.get(family, 0) < max(fits.known.values(), default=0):
        raise WrongBaseError(
            f"this adapter is for {' or '.join(fits.families)}, not {family}", where=where, remedy="Leave out family=."
        )
    return (family,)
