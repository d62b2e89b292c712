"""Whether a format can hold an adapter: asked once, and the answer is kept with all that was found out on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from diffpeft.bundle import Bundle, Entry, parted
from diffpeft.converters.arranging import Arranged, arranged
from diffpeft.converters.families import Table
from diffpeft.converters.formats import FORMATS, Answer, Format, KeyParts
from diffpeft.converters.formats.base import shares_word, table_of
from diffpeft.converters.rows import aspect
from diffpeft.errors import CannotConvertError, UnknownNameError, listed, shown
from diffpeft.methods.shapes import is_across


@dataclass(frozen=True)
class Held:
    """A bundle as a format has it, or why it cannot.

    `names` are how the format spells the layers of the arranged entries, None where it has no name. `adapter` is all of what the bundle may be a
    component of.
    """

    bundle: Bundle
    format: str
    answer: Answer
    arranged: Arranged = field(default_factory=Arranged)
    names: Sequence[KeyParts | None] = ()
    adapter: Bundle | None = None


def held(bundle: Bundle, format: str, adapter: Bundle | None = None) -> Held:
    """What a format makes of a bundle, which may be one component of an `adapter`."""
    fmt, layers = FORMATS[format], tuple(entry.layer for entry in bundle.entries)
    if not fmt.writable:
        return Held(bundle, format, Answer("it is only read, not written", layers))
    if bundle.family and bundle.family not in fmt.tables and not fmt.folder:
        return Held(bundle, format, Answer(f"it is not for family {shown(bundle.family)}", layers))
    order, table = arranged(bundle, fmt), table_of(fmt, bundle.family)
    names = [_name(fmt, table, entry, bundle.format) for entry in order.entries]
    reasons = (answer for answer in _answers(bundle, fmt, order, names) if not answer)
    return Held(bundle, format, next(reasons, Answer()), order, names, adapter)


def _answers(bundle: Bundle, fmt: Format, order: Arranged, names: Sequence[KeyParts | None]) -> Iterator[Answer]:
    """What is to be asked, what explains most first."""
    table, layers = table_of(fmt, bundle.family), [entry.layer for entry in bundle.entries]
    done = "joined" if fmt.original(table) else "taken apart"
    yield Answer.unless([*order.failed], f"a fused layer cannot be {done}: {next(iter(order.failed.values()), '')}")
    yield _alone(fmt, table, order, layers)
    unnamed = [entry.layer for entry, name in zip(order.entries, names, strict=True) if name is None]
    yield Answer.unless(unnamed, "it has no name for them" if table.components else _UNKNOWN)
    yield Answer.unless(_twice(order.entries, fmt), "it has room for one adapter of a kind on a layer")
    branches = [entry.layer for entry in order.entries if fmt.name not in _OF_PEFT and is_across(entry.shapes)]
    yield Answer.unless(
        branches, "PEFT's LoRA of a convolution with groups is a branch beside it, which others have not"
    )
    yield fmt.holds(order.entries)
    foreign = [key for key in bundle.carried if bundle.format != fmt.name and fmt.split(key)]
    yield Answer.unless(foreign, "there are keys that are no adapter's, and would be one's in this format")


def _alone(fmt: Format, table: Table, order: Arranged, layers: Sequence[str]) -> Answer:
    """A format of one component, or with one word for two denoisers, has room for one."""
    components = sorted({parted(entry.layer)[0] for entry in order.entries})
    alone = len(components) < 2 or not (fmt.single or shares_word(fmt, table, components))
    return Answer.unless([] if alone else layers, f"it holds one component, not {' and '.join(components)}")


_OF_PEFT = frozenset({"peft", "diffusers"})  # whose readers make PEFT's layers
_UNKNOWN = "what other programs call the layers of a model of an unknown family is not known"


def _twice(entries: Sequence[Entry], fmt: Format) -> list[str]:
    """Layers for which two tensors would have the same name."""
    taken = Counter((entry.layer, role) for entry in entries for role in fmt.stored(entry))
    return list(dict.fromkeys(layer for (layer, _), n in taken.items() if n > 1))


def _name(fmt: Format, table: Table, entry: Entry, source: str) -> KeyParts | None:
    """How a format names an entry's layer (the role is still to say); None if it has no name for it, read from a `source` of another format."""
    component, layer = parted(entry.layer)
    if fmt.folder:
        return KeyParts("", layer, "")
    word, name = fmt.word(component, table), _layer_name(fmt, table, entry, source)
    return None if word is None or name is None else KeyParts(word, name, "")


def _layer_name(fmt: Format, table: Table, entry: Entry, source: str) -> str | None:
    """What a format calls a layer within its component. One of a component that no table has (a model of an unknown family) has its own name."""
    component, layer = parted(entry.layer)
    if component not in table.components:
        return None if fmt.original(table) and not component.startswith("text_encoder") else layer
    if entry.rule:
        return layer
    if fmt.original(table) and component in table.rules:
        if place := table.to_original(component, layer, aspect(entry.shapes)):
            return place[0].original
    elif entry.own is not None or table.knows(component, layer):
        return layer
    return layer if _is_as_in(source, fmt, table, entry) else None


def _is_as_in(source: str, fmt: Format, table: Table, entry: Entry) -> bool:
    """Whether a layer that no table has is called as in its source: if both formats have the same program's names, flat or dotted."""
    component, layer = parted(entry.layer)
    if table.knows(component, layer) or fmt.flat != ("." not in layer):
        return False
    before = source in FORMATS and FORMATS[source].original(table)
    return component not in table.rules or before == fmt.original(table)


def refused(no: Held) -> CannotConvertError:
    """The error of a format that cannot hold a bundle, with the formats that can."""
    entries, format = no.bundle.entries, no.format
    told = {entry.layer: entry.targets for entry in entries}
    layers = list(dict.fromkeys(target for layer in no.answer.layers for target in told.get(layer, (layer,))))
    others = [name for name in FORMATS if name != format and held(no.bundle, name).answer]
    return CannotConvertError(
        f"{format} cannot hold {len(layers)} of {len(entries)} adapted layers: {no.answer.why}",
        where=listed(layers),
        remedy=f"These formats can: {', '.join(others)}." if others else "No format here can hold it whole.",
    )


def refusal(bundle: Bundle, format: str) -> CannotConvertError | None:
    """Why a format cannot hold an adapter, with the formats that can; None if it can. Raises UnknownNameError for none of the formats."""
    UnknownNameError.check("format", format, FORMATS)
    answered = held(bundle, format)
    return None if answered.answer else refused(answered)
