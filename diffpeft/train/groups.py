"""Which layers learn how fast, and with which rank: patterns of an option, LoRA+, and the optimiser's groups that come of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from diffpeft import patterns
from diffpeft.errors import ConfigError, UnknownNameError, shown
from diffpeft.files import Json
from diffpeft.methods.layout import LAYOUTS

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from diffpeft.train.config import Options

_NAME = re.compile(r"[\w.\-]+")
EMBEDDING_LR = 1e-6  # LoRA+'s, whatever the other rates are


def numbers_of(option: str, said: str | Sequence[str] | None) -> dict[str, float]:
    """`up_blocks.1=32,mid_block=8` -> {pattern: number}, where a name stands for all layers in it, as PEFT's patterns are written. Raises ConfigError."""
    numbers: dict[str, float] = {}
    for entry in entries_of(said):
        name, equals, text = entry.rpartition("=")
        try:
            number = float(text)
        except ValueError:
            number = -1.0
        if not equals or not name or not 0 < number < float("inf"):
            raise ConfigError(
                f"{option} has {shown(entry)}",
                remedy="It is names and numbers above 0, with commas: up_blocks.1=32,mid_block=8.",
            )
        numbers[pattern_of(name)] = number
    return numbers


def entries_of(said: str | Sequence[str] | None) -> list[str]:
    """What an option says with commas, or as a list."""
    return [entry.strip() for entry in (said.split(",") if isinstance(said, str) else said or ())]


def pattern_of(name: str) -> str:
    """A name of layers or of what holds layers as a pattern; what is no plain name is a pattern already. Raises ConfigError if it is none."""
    pattern = rf"{re.escape(name)}(\..+)?" if _NAME.fullmatch(name) else name
    patterns.check(pattern)
    return pattern


def check_used(option: str, names: Iterable[str], layers: Sequence[str]) -> None:
    """Raise UnknownNameError for a pattern that no layer matches."""
    for pattern in names:
        if not any(patterns.ends(pattern, layer) for layer in layers):
            name = re.sub(r"\\(.)", r"\1", pattern.removesuffix(r"(\..+)?"))
            parts = {part for layer in layers for part in _within(layer)}
            raise UnknownNameError.of(f"layer in {option} called", name, parts)


def _within(layer: str) -> Iterable[str]:
    """The blocks that a layer is in."""
    parts = layer.split(".")
    return (".".join(parts[:end]) for end in range(1, min(len(parts), 3) + 1))


def rank_patterns(options: Options, layers: Sequence[str]) -> dict[str, int]:
    """{pattern: rank}. Raises UnknownNameError for one that no layer matches, ConfigError for what is no whole number."""
    numbers = numbers_of("rank_pattern", options.rank_pattern)
    check_used("rank_pattern", numbers, layers)
    if broken := [n for n in numbers.values() if n != int(n)]:
        raise ConfigError(f"rank_pattern has {broken[0]}", remedy="A rank is a whole number.")
    return {pattern: int(number) for pattern, number in numbers.items()}


def set_ranks(config: object, options: Options, layers: Sequence[str]) -> None:
    """Put the ranks of some layers into a method's config, with alphas of the same scale. `layers` are all that are adapted.

    Raises ConfigError for a method whose layers have one rank.
    """
    ranks = rank_patterns(options, layers)
    if not ranks:
        return
    if not LAYOUTS[options.method].patterns:
        raise ConfigError(
            f"rank_pattern with {options.method}, whose layers have one rank", remedy="Leave --rank-pattern out."
        )
    vars(config).update({LAYOUTS[options.method].patterns: ranks})
    if LAYOUTS[options.method].alpha_field:
        alpha = options.rank if options.alpha is None else options.alpha
        vars(config).update(alpha_pattern={pattern: alpha * rank / options.rank for pattern, rank in ranks.items()})


def groups_of(options: Options, parameters: Mapping[str, nn.Parameter], rate: float) -> list[Json]:
    """The optimiser's groups: parameters of one rate, each with its `factor` for the schedule's rate. Names end with roles: layer.lora_A.

    Raises UnknownNameError for a pattern that no layer matches, ConfigError where LoRA+ would change nothing.
    """
    factors = numbers_of("lr_pattern", options.lr_pattern)
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))
    check_used("lr_pattern", factors, layers)
    members: dict[tuple[float, bool], list[nn.Parameter]] = {}
    with patterns.limited(where="lr_pattern"):
        for name, parameter in parameters.items():
            layer, _, role = name.rpartition(".")
            plus, decays = _plus(options, role, parameter, rate)
            members.setdefault((patterns.first(factors, (layer,), 1.0) * plus, decays), []).append(parameter)
    if options.lora_plus_ratio is not None and not any(
        _plus(options, name.rpartition(".")[2], p, rate)[0] != 1 for name, p in parameters.items()
    ):
        raise ConfigError(
            f"lora_plus_ratio with {options.method}, which has no factors B, and so it would do nothing",
            remedy="Leave --lora-plus-ratio out, or choose --method lora or dora.",
        )
    return [
        {"params": group, "lr": rate * factor, "factor": factor, **({} if decays else {"weight_decay": 0.0})}
        for (factor, decays), group in members.items()
    ]


def factors_of(optimizer: Optimizer) -> dict[str, float]:
    """{group: its factor for the schedule's rate}, groups of one factor being one: `adapter`, or if there are several `x0.5` and the like."""
    factors = dict.fromkeys(float(group.get("factor", 1.0)) for group in optimizer.param_groups)
    return {f"x{factor:g}" if len(factors) > 1 else "adapter": factor for factor in factors}


def _plus(options: Options, role: str, parameter: nn.Parameter, rate: float) -> tuple[float, bool]:
    """LoRA+'s factor of the rate for a tensor, and whether it decays."""
    from diffpeft.model.loraplus import kind_of

    if options.lora_plus_ratio is None:
        return 1.0, True
    kind = kind_of(role, parameter)
    factor = {"A": 1.0, "embedding": EMBEDDING_LR / rate}.get(kind, options.lora_plus_ratio)
    return factor, kind != "no decay"
