"""The methods that can be trained, and a method's config from the options of a run. No torch is imported before a config is made."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from diffpeft.methods.layout import LAYOUTS
from diffpeft.train.config import Options

if TYPE_CHECKING:
    from diffpeft.methods.peft_config import PeftConfig

TRAINED = {method: layout.training for method, layout in LAYOUTS.items() if layout.training}
# The methods that images can be trained with, with keywords of attach: rotations turn the output, as in the files that image programs read.
ADAPTERS: dict[str, dict[str, Any]] = {method: dict(way.keywords) for method, way in TRAINED.items() if way.images}


def config_of(method: str, options: Options) -> PeftConfig:
    """The config of a method from a run's rank, alpha and dropout. A rotation's rank is the size of a block; (IA)^3 has none."""
    import diffpeft.methods

    way = TRAINED[method]
    alpha = options.rank if options.alpha is None else options.alpha
    values = {"rank": options.rank, "alpha": alpha, "dropout": options.dropout}
    make = getattr(diffpeft.methods, LAYOUTS[method].config)
    config: PeftConfig = make(**{field: values[option] for option, field in way.fields.items()}, **way.config)
    return config


CONFIGS: dict[str, Callable[[Options], PeftConfig]] = {
    method: functools.partial(config_of, method) for method in TRAINED
}
# Methods whose rank is that of a matrix: one above both its sides adds parameters and nothing else. (A LoKr of high rank has a full factor.)
RANKED = tuple(method for method, way in TRAINED.items() if way.matrix)
