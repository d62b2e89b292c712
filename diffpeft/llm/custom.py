"""`LoraConfig._register_custom_module`: layers of a class of the user's own, adapted as those of one of PyTorch's.

PEFT puts the class that was registered around the module. Here modules keep their classes, so what that class derives from says as what its layers
are adapted, and code of its own would be left out: it is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import nn

from diffpeft.errors import ConfigError, ConfigWarning, shown
from diffpeft.methods.peft_config import PeftConfig
from diffpeft.model.registered import is_known, register_like
from diffpeft.model.target import kind_of

# PEFT's LoRA layers, and the classes that they are for
_LIKE: dict[str, type[nn.Module]] = {
    cls.__name__: cls for cls in (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
}
_THEIRS = ("peft.tuners.lora", "diffpeft.layers.kinds")
_CODE = frozenset({"__init__", "__new__", "__call__", "__getattr__", "__setattr__"})


def settle(config: PeftConfig, layers: Mapping[str, nn.Module]) -> list[type[nn.Module]]:
    """Let modules of registered classes be layers, where a config targets them. -> the classes that are no layers by themselves.

    Raises ConfigError for a module that cannot be one, or whose LoRA would be code that is not run here.
    """
    unknown: list[type[nn.Module]] = []
    for name, module in layers.items():
        pair = next(((key, cls) for key, cls in registered(config).items() if isinstance(module, key)), None)
        if pair is None:
            continue
        key, custom = pair
        like = _like(custom)
        if like is None:
            raise ConfigError(
                f"module {shown(name)}, a {key.__name__}, has the custom LoRA layer {custom.__name__}, whose code would not run",
                remedy="Layers keep their class here. Register a plain subclass of peft.tuners.lora.Linear, Embedding or a Conv "
                "for a module that is made like one of these, or target the layers inside.",
            )
        if not is_known(key):
            register_like(name, module, key, like)
            unknown.append(kind_of(module))
        classes: tuple[type, ...] = getattr(custom, "classes", (key,))
        if key not in classes:  # of which its instances are
            custom.classes = (*classes, key)  # type: ignore[attr-defined]
    return list(dict.fromkeys(unknown))


def registered(config: PeftConfig) -> Mapping[type[nn.Module], type]:
    """The classes of modules that were registered with a config, and those of their LoRA layers."""
    return getattr(config, "_custom_modules", None) or {}


def warn(classes: list[type[nn.Module]]) -> None:
    """Say that layers of these classes are adapted without anybody knowing them."""
    for cls in classes:
        warnings.warn(
            f"Unsupported layer type '{cls}' encountered, proceed at your own risk.", ConfigWarning, stacklevel=4
        )


def _like(custom: type) -> type[nn.Module] | None:
    """The class of PyTorch as whose layers those of a LoRA class are adapted; None for one with code of its own, or for other layers."""
    for cls in custom.__mro__:
        if cls.__module__.startswith(_THEIRS):
            return _LIKE.get(cls.__name__.removeprefix("Lora"))
        if any(name in _CODE or not name.startswith("_") for name in vars(cls).keys() - {"classes"}):
            return None
    return None
