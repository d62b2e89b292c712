"""Rows of texts as columns of a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def printed(text: str, most: int = 100) -> str:
    """A text from a file as it may be shown in a terminal, cut at `most` characters."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: most + 1])
    return text if len(text) <= most else f"{text[: most - 1]}…"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line a row, its texts under each other; the last of a row is as long as it is."""
    widths = [max((len(row[n]) for row in rows if n < len(row) - 1), default=0) for n in range(max(map(len, rows)))]
    return ["  ".join(f"{text:{width}}" for text, width in zip(row, widths, strict=False)).rstrip() for row in rows]
