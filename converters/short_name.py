"""`import converters`: diffpeft.converters by a shorter name. Its modules are the same objects under both names, so that no class is there twice."""

from __future__ import annotations

import importlib
import pkgutil
import sys

LONG, SHORT = "diffpeft.converters", "converters"


def share() -> None:
    """Let all modules of diffpeft.converters be importable by their short names too. Nothing in diffpeft imports them so: the name may be taken."""
    package = importlib.import_module(LONG)
    inner = (module.name for module in pkgutil.walk_packages(package.__path__, f"{LONG}."))
    for name in (LONG, *inner):
        sys.modules[SHORT + name.removeprefix(LONG)] = importlib.import_module(name)
