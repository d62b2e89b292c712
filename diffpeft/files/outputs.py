"""What is there already is replaced only by who says so."""

from __future__ import annotations

import os
from collections.abc import Iterable

from diffpeft.errors import ConfigError, listed
from diffpeft.files.snapshots import present


def refuse_existing(paths: Iterable[str | os.PathLike[str]], overwrite: bool) -> None:
    """Raise ConfigError if one of the files that will be written is there already, unless they may be overwritten.

    Whoever writes asks before the work, not after it: all commands and functions with an output have this one question.
    """
    there = [] if overwrite else [str(path) for path in paths if os.path.lexists(path) or present(path)]
    if there:
        raise ConfigError(
            f"the output is there already: {listed(map(os.path.basename, there), 3)}",
            where=os.path.commonpath(there) if len(there) > 1 else there[0],
            remedy="--overwrite (in Python overwrite=True) replaces it; or give another name.",
        )
