"""Several numbers as people type them: `1,2,5-8` and `0:1.5:0.5`."""

from __future__ import annotations

import math
import re

from diffpeft.errors import ConfigError, shown

_MOST = 10_000  # more is a slip of the hand
_SPAN = re.compile(r"\s*(\d{1,19})\s*-\s*(\d{1,19})\s*")
_WHOLE = "Whole numbers from {} with commas, or spans of them: 1,2,5-8."
_NUMBERS = "Numbers with commas, 0,0.5,1, or FIRST:LAST:STEP, 0:1.5:0.5, with the last one among them."


def whole_numbers(text: str, where: str, least: int = 0) -> list[int]:
    """`1,2,5-8` -> 1, 2, 5, 6, 7, 8. Raises ConfigError for what is none, and for numbers below `least`."""
    numbers: list[int] = []
    for part in text.split(","):
        span = _SPAN.fullmatch(part)
        if span and 0 <= int(span[2]) - int(span[1]) < _MOST:
            numbers += range(int(span[1]), int(span[2]) + 1)
        elif re.fullmatch(r"\s*\d{1,19}\s*", part):
            numbers.append(int(part))
        else:
            raise ConfigError(f"{where} is {shown(text)}", where=where, remedy=_WHOLE.format(least))
    if min(numbers) < least or max(numbers) >= 2**63 or len(numbers) > _MOST:
        raise ConfigError(f"{where} is {shown(text)}", where=where, remedy=_WHOLE.format(least))
    return numbers


def numbers(text: str, where: str) -> list[float]:
    """`0,0.5,1` as they are, and `0:1.5:0.5` -> 0, 0.5, 1, 1.5. Raises ConfigError for what is none."""
    spread: list[float] = []
    for part in text.split(","):
        try:
            bounds = [float(number) for number in part.split(":")]
        except ValueError:
            bounds = []
        if len(bounds) not in (1, 3) or not all(map(math.isfinite, bounds)):
            raise ConfigError(f"{where} is {shown(text)}", where=where, remedy=_NUMBERS)
        spread += bounds if len(bounds) == 1 else _spread(bounds, where, text)
    return spread


def _spread(bounds: list[float], where: str, text: str) -> list[float]:
    """The numbers from the first to the last, rounded to what was meant: 0.1 three times is 0.3."""
    start, last, step = bounds
    count = (last - start) / step if step else math.nan
    if not 0 <= count < _MOST:
        raise ConfigError(f"{where} is {shown(text)}: that step does not lead there", where=where, remedy=_NUMBERS)
    return [float(f"{start + i * step:.10g}") for i in range(math.floor(count + 1e-9) + 1)]
