"""The adapter methods: mathematics only. One file a method, one row in `layout`.

The names are imported on first use, so that a method's layout can be read without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from diffpeft.methods.layout import CONFIGS, LAYOUTS

if TYPE_CHECKING:
    from diffpeft.methods.base import Additive as Additive
    from diffpeft.methods.base import Fresh as Fresh
    from diffpeft.methods.base import Geometry as Geometry
    from diffpeft.methods.base import Link as Link
    from diffpeft.methods.base import Method as Method
    from diffpeft.methods.base import Operation as Operation
    from diffpeft.methods.base import Site as Site
    from diffpeft.methods.base import Spec as Spec
    from diffpeft.methods.base import Strength as Strength

    METHODS: dict[str, type[Method]]

_BASE = ("Additive", "Fresh", "Geometry", "Link", "Method", "Operation", "Site", "Spec", "Strength")
_CLASSES = {name: home for home, name in (layout.home.split(".") for layout in LAYOUTS.values())}
_HOMES = {**dict.fromkeys(_BASE, "base"), **_CLASSES, **CONFIGS}
__all__ = sorted([*_HOMES, "METHODS"])


def __getattr__(name: str) -> Any:
    if name == "METHODS":
        value: Any = {method: __getattr__(layout.home.split(".")[1]) for method, layout in LAYOUTS.items()}
    elif name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, value)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
