"""The writing side's second step: the keys, tensors and metadata with which a format says what it holds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from diffpeft import io
from diffpeft.bundle import MEMORY, Bundle, Entry, Handle, parted
from diffpeft.converters.detection import COMPONENT, FORMAT, HINT, NO_FAMILY
from diffpeft.converters.formats import FORMATS, Format
from diffpeft.converters.formats.base import table_of
from diffpeft.converters.formats.peft import CONFIG
from diffpeft.converters.holding import Held
from diffpeft.converters.provenance import KEY, Place, recorded

if TYPE_CHECKING:
    import torch

HASHES = ("sshs_", "modelspec.hash_")  # they are over tensor bytes, so a rewritten file must not keep them
OWNED = frozenset({"format"}.union(*(fmt.owned for fmt in FORMATS.values())))  # what some format says by itself


@dataclass(frozen=True)
class Draft:
    """All that a file will hold: its tensors by key, its metadata, {(layer, role): key}, and which layers' numbers had to be computed for it."""

    tensors: Mapping[str, Handle]
    metadata: Mapping[str, str]
    places: Mapping[Place, str]
    inexact: Sequence[str] = ()


def spelt(held: Held, dtype: torch.dtype | None = None) -> Draft:
    """What a format makes of the entries that it holds. `dtype` casts the factors; alphas keep theirs."""
    fmt, entries = FORMATS[held.format], held.arranged.entries
    alphas = {layer: _alpha(alpha) for layer, alpha in fmt.alphas(entries).items()}
    tensors: dict[str, Handle] = {}
    places: dict[Place, str] = {}
    for entry, name in zip(entries, held.names, strict=True):
        assert name is not None
        stored = {role: io.cast(handle, dtype, entry.layer) for role, handle in fmt.stored(entry).items()}
        stored |= {"alpha": alphas[entry.layer]} if entry.layer in alphas else {}
        for role, handle in stored.items():
            key = places[entry.layer, role] = fmt.join(replace(name, role=role), entry)
            tensors[key] = handle
    tensors |= _shared(entries, fmt, dtype)
    return Draft({**tensors, **held.bundle.carried}, _metadata(held), places, held.arranged.inexact)


def _shared(entries: Sequence[Entry], fmt: Format, dtype: torch.dtype | None) -> dict[str, Handle]:
    """The tensors of the whole adapter by their keys, unless its layers say that they are not saved."""
    saved = [entry.shared for entry in entries if entry.options.get("save_projection", True)]
    return {fmt.shared_keys[role]: io.cast(h, dtype, role) for shared in saved for role, h in shared.items()}


def _alpha(alpha: Handle | float) -> Handle:
    return alpha if isinstance(alpha, Handle) else io.scalar(float(alpha))


def _metadata(held: Held) -> dict[str, str]:
    """The metadata of the adapter that are true of any file of it, those of the format, and what was lost of those of the file that it is from."""
    bundle, fmt, entries = held.bundle, FORMATS[held.format], held.arranged.entries
    foreign = {key for other in FORMATS.values() if not other.folder for key in other.owned}
    lasting = {
        key: value
        for key, value in bundle.metadata.items()
        if key not in foreign and not key.startswith(HASHES) and (key == CONFIG or not is_ours(key))
    }
    metadata = {"format": "pt", **lasting, **fmt.metadata(entries, bundle.metadata), **_told(held, entries)}
    record = recorded(held.adapter or bundle, held.format, metadata, held.arranged.blocks)
    return metadata | ({KEY: record} if record else {})


def _told(held: Held, entries: Sequence[Entry]) -> dict[str, str]:
    """What a reader cannot see from the keys: the family, if it is certain, the component, the format."""
    bundle, fmt = held.bundle, FORMATS[held.format]
    table = table_of(fmt, bundle.family)
    components = dict.fromkeys(parted(entry.layer)[0] for entry in entries)
    words = {component: fmt.word(component, table) for component in components}
    unsaid = [c for c, word in words.items() if fmt.single or (word and fmt.component(word, table) != c)]
    component = next(iter(unsaid), "")
    certain = len(bundle.families) < 2 and (held.adapter or not fmt.folder)
    family = _family_told(bundle, components, fmt)
    return {
        **({HINT: family} if family and certain else {}),
        **({COMPONENT: component} if component else {}),
        **({FORMAT: held.format} if held.format == "onetrainer" else {}),
    }


def _family_told(bundle: Bundle, components: Collection[str], fmt: Format) -> str:
    """The family that a file says; that it is of none, where the model itself was asked, for a file alone may be of one that is not known yet."""
    denoises = not {"unet", "transformer"}.isdisjoint(components)
    is_told = bundle.format == MEMORY and denoises and not fmt.folder
    return bundle.family or (NO_FAMILY if is_told else "")


def is_ours(key: str) -> bool:
    """Whether metadata are of this package."""
    return key.startswith("diffpeft.")
