"""prune: an adapter without some of its blocks or layers."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from diffpeft.errors import ConfigError
from diffpeft.files import refuse_existing
from diffpeft.readable import Readable
from diffpeft.tools.choosing import Matches, check_used, of_blocks, of_layers, one_answer, read
from diffpeft.tools.rewriting import rewrite


@dataclass(frozen=True, repr=False)
class PruneReport(Readable):
    """What was left out, by diffusers' names of layers, and how many layers are left."""

    path: str
    dropped: tuple[str, ...]
    layers: int


def prune(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    blocks: Iterable[str] = (),
    layers: Iterable[str] = (),
    family: str | None = None,
    overwrite: bool = False,
) -> PruneReport:
    """Write an adapter without some layers, in its own format; what stays keeps its keys and bytes.

    Args:
        blocks: patterns for the beginning of a layer's name, as in `set_adapters`: a component (`text_encoder`), `unet.up_blocks.*`; or A1111's, `OUT03`.
        layers: patterns for the end of a layer's name, as in PEFT's `target_modules`: `to_q`, `ff.net.2`, or a regular expression.
        family: of the adapter, if that is not what the file looks like.
        overwrite: whether the output may replace what is there.

    Raises UnknownNameError for a pattern that matches nothing, with near matches; CannotConvertError for a part of a joint layer; ConfigError if nothing
    would be left or the output is there.
    """
    refuse_existing([out], overwrite)
    bundle = read(os.fspath(source), family)
    chosen: dict[str, Matches] = {pattern: of_blocks(pattern, bundle.family) for pattern in blocks}
    chosen |= {pattern: of_layers(pattern) for pattern in layers}
    if not chosen:
        raise ConfigError(
            "nothing is to be left out", remedy="Say blocks or layers: --blocks PATTERN, --layers PATTERN."
        )
    check_used(chosen, bundle)
    goes = [
        one_answer(
            entry, [any(matches(layer) for matches in chosen.values()) for layer in entry.targets], bundle.source
        )
        for entry in bundle.entries
    ]
    pairs = list(zip(bundle.entries, goes, strict=True))
    rewrite(bundle, [(entry, None if gone else entry) for entry, gone in pairs], out, overwrite=overwrite)
    dropped = dict.fromkeys(layer for entry, gone in pairs if gone for layer in entry.targets)
    left = {layer for entry, gone in pairs if not gone for layer in entry.targets}
    return PruneReport(os.fspath(out), tuple(dropped), len(left))
