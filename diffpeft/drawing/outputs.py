"""The files that pictures are written into: one name, a pattern such as `{prompt}-{seed}.png`, or a folder. Imports no torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from string import Formatter

from diffpeft.drawing.infotext import FORMATS
from diffpeft.drawing.shots import Shot
from diffpeft.errors import ConfigError, UnknownNameError, listed, shown

_IN_FOLDER = "{n:04}-{seed}.png"
_NO_NAME = re.compile(r"[^\w.+-]+")
_LONGEST = 60  # of a prompt in a name


def names_for(out: str, shots: Sequence[Shot]) -> list[Path]:
    """A file for each picture. Several in one name are numbered; a folder has `0001-SEED.png`.

    Raises ConfigError for a format that is none here, and for two pictures in one file, UnknownNameError for a field that there is not.
    """
    path = Path(out)
    fields = fields_of(out)
    if not fields and (out.endswith(("/", "\\")) or path.is_dir() or not path.suffix):
        path, fields = path / _IN_FOLDER, fields_of(_IN_FOLDER)
    elif not fields and len(shots) > 1:
        path, fields = path.with_name(f"{path.stem}-{{n}}{path.suffix}"), {"n"}
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(
            f"the output is {shown(out)}", remedy=f"Its name ends in {', '.join(FORMATS)}, or it is a folder."
        )
    names = [Path(str(path).format(**_facts(n, shot))) if fields else path for n, shot in enumerate(shots, 1)]
    twice = [name.name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ConfigError(
            f"several pictures would be in one file: {listed(twice, 3)}",
            where=out,
            remedy="Put {n}, the picture's number, into the name.",
        )
    return names


def fields_of(out: str) -> set[str]:
    """The fields of a pattern. Raises UnknownNameError for one that there is not, ConfigError for braces that are no fields."""
    known = _facts(1, Shot("a"))
    try:
        names = {name for _, name, _, _ in Formatter().parse(out) if name is not None}
        UnknownNameError.check("field of a name called", next(iter(names - known.keys()), None), known)
        out.format(**known)
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        if isinstance(error, UnknownNameError):
            raise
        raise ConfigError(f"the output is {shown(out)}", remedy="A field is {n}, {n:04}, {seed} or {prompt}.") from None
    return names


def _facts(n: int, shot: Shot) -> dict[str, object]:
    """What the fields of a name stand for."""
    prompt = _NO_NAME.sub("_", shot.prompt).strip("._")[:_LONGEST] or "picture"
    return {"n": n, "seed": shot.seed, "prompt": prompt}
