"""Packages that diffusers' own modules do without, until they are asked."""

from __future__ import annotations

import sys

from diffpeft.errors import ConfigError


def check_imported(kind: type, name: str, package: str, what: str) -> None:
    """Raise ConfigError where the module of a class of diffusers has no `name`, which is of a package that is not installed. `what` needs it."""
    if not hasattr(sys.modules[kind.__module__], name):
        raise _lacking(what, kind, package)


def check_installed(kind: type, error: Exception) -> None:
    """Raise ConfigError if what a class of diffusers ended with is that it lacks a package which is optional there: a name that it has not imported."""
    from diffusers import utils

    package = error.name if isinstance(error, (ImportError, NameError)) else None
    if package and hasattr(utils, f"is_{package}_available"):
        raise _lacking("the pipeline works", kind, package) from error


def _lacking(what: str, kind: type, package: str) -> ConfigError:
    return ConfigError(
        f"{what} by {package}, which is not installed", where=kind.__name__, remedy=f"pip install {package}"
    )
