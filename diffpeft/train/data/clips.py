"""The account of data with the clips that are cut out of footage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from diffpeft.errors import DataError, listed
from diffpeft.train.data.account import Account, Example
from diffpeft.train.data.framing import Framing


def cut(account: Account, framing: Framing) -> Account:
    """The account with the clips that are cut out of its footage in the place of the footage; images stay as they are.

    Raises DataError where all is too short.
    """
    examples, short = _cut(account.examples, framing)
    heldout, short_too = _cut(account.heldout, framing)
    least = framing.fitting[-1]
    if not examples:
        raise DataError(
            f"no clip has {least} frames" + (f" at {framing.rate:g} a second" if framing.rate else ""),
            where=account.folder,
            remedy=f"Pass fewer --frames, or another --fps. The clips are {listed(sorted(short), 3)}.",
        )
    return replace(account, examples=examples, heldout=heldout, short=(*short, *short_too), framing=framing)


def _cut(examples: Sequence[Example], framing: Framing) -> tuple[tuple[Example, ...], list[str]]:
    """The clips and images of examples, and the names of those that are too short."""
    clips, short = list[Example](), list[str]()
    for example in examples:
        if example.length == 1:
            clips.append(example)
            continue
        cuts = framing.cuts(example.length, example.rate)
        short += [] if cuts else [example.name]
        names = [example.name if len(cuts) == 1 else f"{example.name} {c[0] + 1}-{c[-1] + 1} ({len(c)})" for c in cuts]
        clips += [replace(example, frames=c, name=name) for c, name in zip(cuts, names, strict=True)]
    return tuple(clips), short
