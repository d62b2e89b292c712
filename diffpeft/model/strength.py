"""What a number must be to be a strength."""

from __future__ import annotations

from typing import Any

MAX_STRENGTH = float.fromhex("0x1.fffffep+127")  # the largest fp32 number: strengths gate in fp32


def is_strength(value: Any) -> bool:
    """Whether a value is a number that fp32 can hold: no truth value, not NaN, not infinite, not beyond."""
    return not isinstance(value, bool) and isinstance(value, (int, float)) and abs(value) <= MAX_STRENGTH
