"""diffpeft: adapters (LoRA and kin) for diffusion models.

The public names are imported on first use, so that `import diffpeft` costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "diffpeft.errors": (
        "DiffpeftError CheckpointError UnreadableFileError UnsafeFileError UnknownKeysError MissingKeysError ShapeMismatchError "
        "NonFiniteError AmbiguousFormatError WrongBaseError CannotConvertError UnknownNameError AdapterStateError ConfigError DataError DivergedError"
    ),
    "diffpeft.bundle": "Bundle Entry",
    "diffpeft.methods": "BOFTConfig IA3Config LoHaConfig LoKrConfig LoraConfig METHODS OFTConfig",
    "diffpeft.model.attach": "attach detach AttachReport",
    "diffpeft.model.combine": "combine to_lora",
    "diffpeft.model.fuse": "fuse unfuse",
    "diffpeft.model.loraplus": "create_loraplus_optimizer",
    "diffpeft.pipeline.adapters": "set_adapters get_adapters adapters unload AdapterStatus",
    "diffpeft.pipeline.hotswap": "replace",
    "diffpeft.pipeline.load": "load_lora save_lora LoadReport",
    "diffpeft.train.config": "TrainConfig",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}
_MODULES = {"schedule": "diffpeft.model.schedule"}
__all__ = sorted([*_HOME, *_MODULES])

if TYPE_CHECKING:
    from diffpeft.bundle import Bundle as Bundle
    from diffpeft.bundle import Entry as Entry
    from diffpeft.errors import *  # noqa: F403
    from diffpeft.methods import METHODS as METHODS
    from diffpeft.methods import BOFTConfig as BOFTConfig
    from diffpeft.methods import IA3Config as IA3Config
    from diffpeft.methods import LoHaConfig as LoHaConfig
    from diffpeft.methods import LoKrConfig as LoKrConfig
    from diffpeft.methods import LoraConfig as LoraConfig
    from diffpeft.methods import OFTConfig as OFTConfig
    from diffpeft.model import schedule as schedule
    from diffpeft.model.attach import AttachReport as AttachReport
    from diffpeft.model.attach import attach as attach
    from diffpeft.model.attach import detach as detach
    from diffpeft.model.combine import combine as combine
    from diffpeft.model.combine import to_lora as to_lora
    from diffpeft.model.fuse import fuse as fuse
    from diffpeft.model.fuse import unfuse as unfuse
    from diffpeft.model.loraplus import create_loraplus_optimizer as create_loraplus_optimizer
    from diffpeft.pipeline.adapters import AdapterStatus as AdapterStatus
    from diffpeft.pipeline.adapters import adapters as adapters
    from diffpeft.pipeline.adapters import get_adapters as get_adapters
    from diffpeft.pipeline.adapters import set_adapters as set_adapters
    from diffpeft.pipeline.adapters import unload as unload
    from diffpeft.pipeline.hotswap import replace as replace
    from diffpeft.pipeline.load import LoadReport as LoadReport
    from diffpeft.pipeline.load import load_lora as load_lora
    from diffpeft.pipeline.load import save_lora as save_lora
    from diffpeft.train.config import TrainConfig as TrainConfig


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value: Any = importlib.import_module(_MODULES[name])
    elif name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'diffpeft' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
