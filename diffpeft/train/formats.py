"""The formats that a run is saved in: which were asked for, which of them can hold what is trained, and which one does where none can. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from diffpeft.bundle import Bundle, Entry, dotted, parted
from diffpeft.converters.detection import COMPONENT
from diffpeft.converters.formats import FORMATS
from diffpeft.converters.formats.base import table_of
from diffpeft.converters.holding import held
from diffpeft.converters.writing import by_component
from diffpeft.errors import CannotConvertError, ConfigError, UnknownNameError, listed
from diffpeft.train.config import TrainConfig
from diffpeft.train.groups import entries_of

WRITABLE = tuple(name for name, format in FORMATS.items() if format.writable)
# Those that are tried where none that was asked for can hold the adapter: what most programs read comes first, then what most methods fit into.
INSTEAD = ("kohya", "diffusers", "kohya-diffusers", "comfyui", "lycoris", "onetrainer", "xlabs", "peft")


@dataclass(frozen=True)
class SavedFormats:
    """The formats that are written, and {format that was asked for: why it is not}. `instead` is one that nobody asked for."""

    written: tuple[str, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    instead: str | None = None


def asked(config: TrainConfig) -> tuple[str, ...]:
    """The formats that were asked for, each once. Raises UnknownNameError, and ConfigError for one that is only read."""
    names = [name.lower() for name in entries_of(config.formats)]
    for name in names:
        UnknownNameError.check("format", name, FORMATS)
        if name not in WRITABLE:
            raise ConfigError(
                f"formats has {name}, which is only read", remedy=f"These can be written: {', '.join(WRITABLE)}."
            )
    return tuple(dict.fromkeys(names))


# {denoiser of a model of two: what is in the name of its file}, in formats that have a name for one alone
HALVES = {"transformer": "high", "transformer_2": "low"}


def file_of(name: str, format: str, half: str = "") -> str:
    """What the file of an adapter, or of a half of it, is called in a format, or its folder."""
    called = f"{name}.{half}.{format}" if half else f"{name}.{format}"
    return called if FORMATS[format].folder else f"{called}.safetensors"


def half_of(name: str, file: Path) -> str | None:
    """The denoiser that a file of an adapter is for, by its name; None if it is for all."""
    return next((denoiser for denoiser, half in HALVES.items() if file.name.startswith(f"{name}.{half}.")), None)


def for_a_program(files: Sequence[Path], name: str) -> Sequence[Path]:
    """Of the files of an adapter that a program reads those that it is handed: the first, or both halves of the first format that has such."""
    halves = [file for file in files if half_of(name, file)]
    return [file for file in halves if file.suffixes[-2:] == halves[0].suffixes[-2:]] or files[:1]


def for_the_second(name: str, file: Path) -> str:
    """What is said to diffusers' `load_lora_weights` of a file of the second of two denoisers."""
    return ", load_into_transformer_2=True" if half_of(name, file) == SECOND else ""


def files_of(name: str) -> list[str]:
    """What the files of an adapter may be called."""
    return [file_of(name, format, half) for format in WRITABLE for half in ("", *HALVES.values())]


def halves_of(bundle: Bundle, format: str) -> dict[str, Bundle]:
    """{half: what of an adapter a file of a format holds}: all of it, under no name, where names tell the denoisers apart, and that of each denoiser.

    A half is for the first denoiser by its names; its metadata say whose it is.
    """
    second = any(parted(entry.layer)[0] == SECOND for entry in bundle.entries)
    if FORMATS[format].folder or not second:
        return {"": bundle}
    table = table_of(FORMATS[format], bundle.family)
    told_apart = len({FORMATS[format].word(denoiser, table) for denoiser in HALVES}) > 1
    held_together = {"": bundle} if told_apart and held(bundle, format).answer else {}
    by_component: dict[str, list[Entry]] = {}
    for entry in bundle.entries:
        component, layer = parted(entry.layer)
        alone = replace(entry, layer=dotted(FIRST, layer)) if component == SECOND else entry
        by_component.setdefault(component if component in HALVES else FIRST, []).append(alone)
    return held_together | {
        HALVES[component]: replace(bundle, entries=entries, metadata={**bundle.metadata, COMPONENT: component})
        for component, entries in by_component.items()
    }


FIRST, SECOND = HALVES


def chosen(bundle: Bundle, names: Sequence[str]) -> SavedFormats:
    """The formats of these that can hold an adapter; where none can, the first of all others that does. Raises CannotConvertError if there is none."""
    reasons = {name: why for name in names if (why := _refusal(bundle, name))}
    written = tuple(name for name in names if name not in reasons)
    if written:
        return SavedFormats(written, reasons)
    instead = next((name for name in INSTEAD if name not in names and not _refusal(bundle, name)), None)
    if instead is None:
        raise CannotConvertError(
            f"no format can hold this adapter: {'; '.join(f'{name}: {why}' for name, why in reasons.items())}",
            where=listed(sorted(bundle.methods)),
            remedy="Choose other layers with --targets, or another --method.",
        )
    return SavedFormats((instead,), reasons, instead)


def _refusal(bundle: Bundle, format: str) -> str:
    """Why a format cannot hold an adapter; empty if it can. A folder holds each component for itself."""
    halves = halves_of(bundle, format).values()
    parts = by_component(bundle, format).values() if FORMATS[format].folder else [held(half, format) for half in halves]
    no = next((part for part in parts if not part.answer), None)
    layers = no and f"{len(set(no.answer.layers))} of {len(no.bundle.entries)} layers"
    return f"{layers} cannot be held: {no.answer.why}" if no else ""
