"""What configs have in common: checks that name the field and say what is allowed, and PEFT's rule for patterns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from diffpeft.errors import ConfigError, NotBuiltError
from diffpeft.patterns import check as compiled


class Product(Protocol):
    """What the configs of LoHa and LoKr have in common."""

    r: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]

    @property
    def init_weights(self) -> bool | str:
        """How the tensors begin."""


FP32_MAX = float.fromhex("0x1.fffffep+127")


def is_fp32(value: object) -> bool:
    """Whether a value is a number that fp32 can hold: no truth value, not NaN, not infinite, not beyond. Strengths and scales gate in fp32."""
    return not isinstance(value, bool) and isinstance(value, (int, float)) and abs(value) <= FP32_MAX


def check_rank(name: str, r: object) -> None:
    """A rank is a whole number of at least 1."""
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ConfigError(f"{name} is {r!r}", remedy="A rank is a whole number of at least 1.")


def check_alpha(name: str, alpha: object) -> None:
    """An alpha is a finite number."""
    if not is_fp32(alpha):
        raise ConfigError(f"{name} is {alpha!r}", remedy="An alpha is a finite number.")


def check_probability(name: str, p: object) -> None:
    """A probability of dropping something is in [0, 1)."""
    if not isinstance(p, (int, float)) or not 0 <= p < 1:
        raise ConfigError(f"{name} is {p!r}", remedy="It is a probability: at least 0 and less than 1.")


def check_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """The value is one of at least two allowed ones."""
    allowed = list(allowed)
    if value not in allowed:
        *others, last = map(repr, allowed)
        raise NotBuiltError(f"{name} is {value!r}", remedy=f"It is {', '.join(others)} or {last}.")


def check_patterns(name: str, patterns: Mapping[str, object], check: Callable[[str, object], None]) -> None:
    """Every key of {regular expression: value} compiles and every value passes `check`."""
    for key, value in patterns.items():
        check(f"{name}[{key!r}]", value)
        try:
            compiled(key)
        except ConfigError as error:
            raise ConfigError(f"{name} has {key!r}", remedy=f"{error.what}.") from error


def check_whole(name: str, value: object, least: int) -> None:
    """A setting is a whole number of at least so much."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} is {value!r}", remedy=f"It is a whole number of at least {least}.")


def check_either(config: object, one: str, other: str) -> None:
    """Of two settings one is a whole number above 0, the other 0."""
    for name in (one, other):
        check_whole(name, getattr(config, name), 0)
    if bool(getattr(config, one)) == bool(getattr(config, other)):
        raise ConfigError(
            f"{one} is {getattr(config, one)} and {other} is {getattr(config, other)}",
            remedy="Give one of them, and 0 for the other.",
        )


def check_product(config: Product, inits: Iterable[object]) -> None:
    """What LoHa and LoKr have in common: rank, alpha, dropouts, inits and patterns."""
    check_rank("r", config.r)
    check_alpha("alpha", config.alpha)
    for name in ("rank_dropout", "module_dropout"):
        check_probability(name, getattr(config, name))
    check_choice("init_weights", config.init_weights, inits)
    check_patterns("rank_pattern", config.rank_pattern, check_rank)
    check_patterns("alpha_pattern", config.alpha_pattern, check_alpha)


def chosen(config: object, *names: str) -> dict[str, object]:
    """The named fields that are set to something: the options of a fresh adapter."""
    return {name: value for name in names if (value := getattr(config, name))}
