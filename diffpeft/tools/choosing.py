"""Which layers of a file a pattern means: a block from the front of a layer's name, or a layer from its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from diffpeft import converters, patterns
from diffpeft.bundle import Bundle, Entry, parted
from diffpeft.errors import CannotConvertError, ConfigError, UnknownNameError, listed, near, shown
from diffpeft.pipeline.prompt import VECTORS, places

Answer = TypeVar("Answer")
Matches = Callable[[str], bool]  # of a canonical layer name


def of_blocks(pattern: str, family: str) -> Matches:
    """Layers that a pattern leads to, as in `set_adapters` (`unet.up_blocks.*`); or a block by the name that A1111's block weights have for it (`OUT03`)."""
    from diffpeft.model.mix import leads_to

    return lambda layer: any(leads_to(way, *parted(layer)) for way in ways(pattern, family))


def ways(pattern: str, family: str) -> Sequence[str]:
    """A pattern, or those of A1111's block of that name."""
    return places(family).get(pattern, (pattern,)) if family in VECTORS else (pattern,)


def of_layers(pattern: str) -> Matches:
    """Layers whose names end in a pattern, by PEFT's rule: `to_q`, or a regular expression."""
    patterns.check(pattern)
    return lambda layer: patterns.ends(pattern, layer)


def layers_of(bundle: Bundle) -> list[str]:
    """All layers that a bundle has something for, by diffusers' names."""
    return list(dict.fromkeys(target for entry in bundle.entries for target in entry.targets))


def check_used(chosen: Mapping[str, Matches], bundle: Bundle) -> None:
    """Raise UnknownNameError for a pattern that means no layer of a bundle, with the near ones."""
    layers = layers_of(bundle)
    for pattern, matches in chosen.items():
        if not any(map(matches, layers)):
            raise UnknownNameError(
                f"pattern {shown(pattern)} matches none of the {len(layers)} adapted layers",
                where=bundle.source,
                remedy=f"{near(pattern, _pieces(layers, bundle.family))} Layers are such as {listed(layers, 2)}.".strip(),
            )


def _pieces(layers: Sequence[str], family: str) -> set[str]:
    """What could have been meant: blocks, ends of names, A1111's blocks."""
    names = [layer.split(".") for layer in layers]
    fronts = {".".join(name[:k]) for name in names for k in range(1, len(name) + 1)}
    ends = {".".join(name[-k:]) for name in names for k in range(1, min(len(name), 4))}
    return fronts | ends | {*(places(family) if family in VECTORS else ())}


def one_answer(entry: Entry, answers: Sequence[Answer], source: str) -> Answer:
    """What is said of all of an entry's layers. Raises CannotConvertError if different things are said of a joint layer's parts."""
    if any(answer != answers[0] for answer in answers):
        raise CannotConvertError(
            f"{shown(parted(entry.layer)[1])} is {len(entry.targets)} layers in one, and they are not to be treated alike",
            where=f"{source}: {listed(entry.targets, 3)}",
            remedy="Convert the file to diffusers' names first, which have them apart.",
        )
    return answers[0]


def read(source: str, family: str | None) -> Bundle:
    """The adapter in a file or folder. Raises ConfigError for one without layers."""
    from diffpeft.converters import located

    bundle = converters.read(located(source), family=family)
    if not bundle.entries:
        raise ConfigError(
            "there is no layer in it", where=source, remedy="Give an adapter: diffpeft inspect says what a file is."
        )
    return bundle
