"""The optimisers, a row each. Any other class of torch's kind is named by its path. Imports no torch before one is made.

Prodigy, Lion and Schedule-Free are written here after their papers: the packages have not been kept up, and some read numbers from the device at each step.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diffpeft.errors import ConfigError, UnknownNameError, listed, shown
from diffpeft.files import Json

if TYPE_CHECKING:
    import torch

    from diffpeft.train.config import Options


@dataclass(frozen=True)
class OptimizerRow:
    """An optimiser: the path of its class, what it is made with, and its learning rate where nothing is said (None: the run's default).

    `state`: the bytes of its state for a number that it trains. `one_rate`: it estimates a rate for all parameters together, so that they cannot have several.
    """

    path: str
    keywords: Mapping[str, object] = field(default_factory=dict)
    lr: float | None = None
    one_rate: bool = False
    state: float = 8.0


OPTIMIZERS = {
    "adamw": OptimizerRow("torch.optim.AdamW", {"fused": True}),
    "adamw8bit": OptimizerRow("bitsandbytes.optim.AdamW8bit", state=2.03),
    "adafactor": OptimizerRow(
        "transformers.optimization.Adafactor",
        {"scale_parameter": False, "relative_step": False, "warmup_init": False},
        state=0.5,
    ),
    "prodigy": OptimizerRow(
        "diffpeft.train.optimizers.prodigy.Prodigy", {"safeguard_warmup": True}, lr=1.0, one_rate=True, state=16.0
    ),
    "lion": OptimizerRow("diffpeft.train.optimizers.lion.Lion", lr=3e-5, state=4.0),
    "schedulefree": OptimizerRow("diffpeft.train.optimizers.schedulefree.AdamWScheduleFree", lr=1e-3),
}


def row_of(name: str) -> OptimizerRow:
    """The row of an optimiser, or one for a class by its path. Raises UnknownNameError for a name that is neither."""
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    if "." not in name:
        error = UnknownNameError.of("optimizer", name, OPTIMIZERS)
        raise UnknownNameError(error.what, remedy=f"{error.remedy} Or a class by its path: torch.optim.SGD.")
    return OptimizerRow(name)


def rate_of(options: Options) -> float:
    """The learning rate: what was said, or the optimiser's, or the run's default."""
    if options.lr is not None:
        return options.lr
    return row_of(options.optimizer).lr or options.LR


def keywords_of(options: Options) -> dict[str, object]:
    """What `--optimizer-args` says: `betas=0.9,0.99 d_coef=2` -> {"betas": (0.9, 0.99), "d_coef": 2}. Raises ConfigError."""
    said = options.optimizer_args or ()
    pairs = shlex.split(said) if isinstance(said, str) else said
    keywords = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(
                f"optimizer_args has {shown(pair)}",
                remedy="It is name=value, with blanks between: betas=0.9,0.99 eps=1e-8.",
            )
        keywords[name] = _value(value)
    return keywords


def _value(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def class_of(name: str) -> type[torch.optim.Optimizer]:
    """The class of an optimiser. Raises UnknownNameError if there is none of this path, ConfigError for what is no optimiser of torch's kind."""
    import torch

    module, _, last = row_of(name).path.rpartition(".")
    try:
        optimizer = getattr(importlib.import_module(module), last)
    except (ImportError, AttributeError, ValueError) as error:
        raise UnknownNameError(
            f"no optimizer {shown(name)} ({error})",
            remedy=f"Install its package, or choose one of {', '.join(OPTIMIZERS)}.",
        ) from error
    if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
        raise ConfigError(
            f"{shown(name)} is no optimizer of torch's kind", remedy="Name a class below torch.optim.Optimizer."
        )
    _refuse_closures(name, optimizer)
    return optimizer


def _refuse_closures(name: str, optimizer: type[torch.optim.Optimizer]) -> None:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"{shown(name)} computes the loss several times a step",
            remedy="Choose one that takes a step from the gradients.",
        )


def check(options: Options) -> None:
    """Raise for an optimiser that is not known, keywords that are none, and rates that it cannot have. Imports nothing."""
    row = row_of(options.optimizer)
    keywords_of(options)
    several = [name for name in ("lora_plus_ratio", "lr_pattern") if getattr(options, name) is not None]
    if row.one_rate and several:
        raise ConfigError(
            f"{options.optimizer} finds one learning rate for all layers, and {several[0]} gives them several",
            remedy=f"Leave --{several[0].replace('_', '-')} out, or choose another --optimizer.",
        )


def make(options: Options, groups: Sequence[Json]) -> torch.optim.Optimizer:
    """The optimiser over these groups of parameters. Raises ConfigError for keywords that it does not take."""
    optimizer = class_of(options.optimizer)
    known = inspect.signature(optimizer.__init__).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in known.values())
    keywords: Json = {**row_of(options.optimizer).keywords, **keywords_of(options)}
    if unknown := [name for name in keywords if name not in known and not takes_all]:
        raise UnknownNameError.of(f"argument of {options.optimizer}", unknown[0], set(known) - {"self", "params"})
    if "weight_decay" in known and "weight_decay" not in keywords:
        keywords["weight_decay"] = options.weight_decay
    elif "weight_decay" not in known:
        groups = [{name: value for name, value in group.items() if name != "weight_decay"} for group in groups]
    try:
        return optimizer([dict(group) for group in groups], **{"lr": rate_of(options), **keywords})
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{options.optimizer} cannot be made ({error})",
            remedy=f"It was given {listed(keywords)}: see --optimizer-args.",
        ) from error
