"""Patterns for names of layers: PEFT's rules, matched in bounded time. Patterns come from files too, and none of them may run for ever.

A pattern that is a plain name is compared as one. Any other must be an expression that Python's `re` takes; it is matched by `regex`, which can be
stopped.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

from diffpeft.errors import ConfigError, DiffpeftError, shown

if TYPE_CHECKING:
    import regex

Value = TypeVar("Value")
Result = TypeVar("Result")
SECONDS = 1.0  # of computing, for all matches of one operation: the patterns that people write take microseconds
MAX_LENGTH = 20_000  # characters of a pattern; PEFT writes one of some thousand for models with many kinds of blocks
_LITERAL = re.compile(r"[\w.\-/]+")
_here = threading.local()  # `budget` inside this thread's `limited()` blocks


class _Budget:
    """The seconds that are left for matching, and the error that says that there are none."""

    def __init__(self, error: type[DiffpeftError], where: object):
        self.left, self.error, self.where = SECONDS, error, where

    def refusal(self, pattern: str) -> DiffpeftError:
        return self.error(
            f"the pattern {shown(pattern)} takes too long to match",
            where=self.where,
            remedy="Write a simpler one, or a list of names.",
        )


@contextlib.contextmanager
def limited(error: type[DiffpeftError] = ConfigError, where: object = "") -> Iterator[None]:
    """All matches in this block (of this thread) share one second. Inside another such block that one's counts.

    Args:
        error: what is raised when the second is over, naming the pattern and `where`.
    """
    if getattr(_here, "budget", None) is not None:
        yield
        return
    _here.budget = _Budget(error, where)
    try:
        yield
    finally:
        _here.budget = None


def check(pattern: str) -> None:
    """Raise ConfigError unless `pattern` is a regular expression of a usual length."""
    if not isinstance(pattern, str):
        raise ConfigError(
            f"{shown(pattern)} is no pattern", remedy="A pattern is a text: a name or a regular expression."
        )
    if len(pattern) > MAX_LENGTH:
        raise ConfigError(f"a pattern has {len(pattern)} characters", remedy=f"At most {MAX_LENGTH} are read.")
    with _spent() as budget:
        if budget.left <= 0:
            raise budget.refusal(pattern)
        _compiled(pattern)


@contextlib.contextmanager
def _spent() -> Iterator[_Budget]:
    """The budget in force, or one for this alone. What the block takes is off it: a pattern takes longer to be understood than to be matched."""
    budget, start = getattr(_here, "budget", None) or _Budget(ConfigError, ""), time.thread_time()
    try:
        yield budget
    finally:
        budget.left -= time.thread_time() - start


@functools.lru_cache(1024)
def _compiled(pattern: str) -> regex.Pattern[str]:
    import regex

    try:
        re.compile(pattern)  # the dialect is Python's
        return regex.compile(pattern)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ConfigError(
            f"{shown(pattern)} is no regular expression ({error})",
            remedy="Put a backslash before a character that stands for itself.",
        ) from error


def match(pattern: str, name: str, *, whole: bool = False) -> regex.Match[str] | None:
    """`re.match` (`whole`: `re.fullmatch`), in bounded time. Raises ConfigError, or what `limited` says, for a pattern that takes longer or is none."""
    return _timed(pattern, lambda compiled, left: (compiled.fullmatch if whole else compiled.match)(name, timeout=left))


def _timed(pattern: str, use: Callable[[regex.Pattern[str], float], Result]) -> Result:
    """`use(the compiled pattern, the seconds that are left)`."""
    if len(pattern) > MAX_LENGTH:
        check(pattern)
    with _spent() as budget:
        try:
            if budget.left <= 0:
                raise TimeoutError
            return use(_compiled(pattern), budget.left)
        except TimeoutError:
            raise budget.refusal(pattern) from None


def replaced(replacements: Mapping[str, str], name: str) -> str:
    """A name in which the first pattern that is found in it is replaced, everywhere, as `re.sub` does. Raises as `match`."""
    for pattern, new in replacements.items():

        def replace(compiled: regex.Pattern[str], left: float, new: str = new) -> tuple[str, int]:
            return compiled.subn(new, name, timeout=left)

        other, number = _timed(pattern, replace)
        if number:
            return other
    return name


def fullmatch(pattern: str, name: str) -> bool:
    """Whether a pattern matches a whole name."""
    plain, _ = _plain(pattern)
    return name == plain if plain is not None else match(pattern, name, whole=True) is not None


def ends(pattern: str, name: str) -> bool:
    """PEFT's rule of `rank_pattern`: whether a pattern matches a name, or its end at a dot."""
    plain, anchored = _plain(pattern)
    if plain is not None:
        return name == plain or (name.endswith(f".{plain}") and not anchored)
    return match(rf"(.*\.)?({pattern})$", name) is not None


def first(patterns: Mapping[str, Value] | None, names: Iterable[str], default: Value) -> Value:
    """The value of the first pattern that matches (as `ends` says) one of the names of a layer."""
    if not patterns:
        return default
    keys, names = tuple(patterns), tuple(names)
    full, ending, others = _index(keys)
    places = [full[name] for name in names if name in full]
    places += [place for name in names for end in name_ends(name) if (place := ending.get(end)) is not None]
    best = min(places, default=len(keys))
    best = next((place for place in others if place < best and any(ends(keys[place], name) for name in names)), best)
    return patterns[keys[best]] if best < len(keys) else default


@functools.lru_cache(32)
def _index(keys: tuple[str, ...]) -> tuple[dict[str, int], dict[str, int], list[int]]:
    """The places of patterns that are whole names, of those that are ends of names, and of all others."""
    full: dict[str, int] = {}
    ending: dict[str, int] = {}
    others: list[int] = []
    for place, key in enumerate(keys):
        plain, alone = _plain(key)
        if plain is None:
            others.append(place)
        else:
            (full if alone else ending).setdefault(plain, place)
    return full, ending, others


def _plain(pattern: str) -> tuple[str | None, bool]:
    """The name that a pattern is, if it is one, and whether it must be the whole name."""
    name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    return (name if _LITERAL.fullmatch(name) else None), pattern.startswith("^")


def name_ends(name: str) -> Iterator[str]:
    """A name, and what follows each of its dots."""
    yield name
    at = name.find(".")
    while at >= 0:
        yield name[at + 1 :]
        at = name.find(".", at + 1)
