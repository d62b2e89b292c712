"""Packages that diffusers' own modules do without, until they are asked."""

from __future__ import annotations

import sys

from diffpeft.errors import ConfigError


def check_imported(kind: type, name: str, package: str, what: str) -> None:
    """Raise ConfigError where the module of a class of diffusers has no `name`, which is of a package that is not installed. `what` needs it."""
    if not hasattr(sys.modules[kind.__module__], name):
        raise ConfigError(
            f"{what} by {package}, which is not installed", where=kind.__name__, remedy=f"pip install {package}"
        )
