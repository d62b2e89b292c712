"""What results of this package are in print: one line as `repr`, a few as `str`, a table in notebooks. All three are made of the same rows."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path

from diffpeft.errors import joined

LINE = 280  # characters of a repr, and of one value in it
VALUE, MANY = 60, 8  # a collection of more than MANY is told by its size
LABEL = 17  # the width of the column of names


class Readable:
    """A result that can be read. Its dataclass is made with `repr=False`.

    A class says its own `_rows`, {what is said: in words}, where those of its fields would not do, and its `_title`.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        """The type and its fields in one line: long values by their size, those at their defaults left out."""
        name, room, parts = type(self).__name__, LINE, list[str]()
        for field, value in _said(self):
            part = f"{field}={brief(value)}"
            room -= len(part) + 2
            if room < len(name):
                parts.append("...")
                break
            parts.append(part)
        return f"{name}({', '.join(parts)})"

    def __str__(self) -> str:
        """The title, and a line for each row that says something."""
        rows = [f"  {name:{LABEL}} {words(text)}" for name, text in self._rows().items() if text]
        return "\n".join([self._title(), *rows])

    def _repr_html_(self) -> str:
        """The rows as a table, for notebooks."""
        cells = (
            f'<tr><th style="text-align:left">{html.escape(name)}</th><td style="text-align:left">{html.escape(text)}</td></tr>'
            for name, text in self._rows().items()
            if text
        )
        return f"<table><caption>{html.escape(self._title())}</caption>{''.join(cells)}</table>"

    def _title(self) -> str:
        """What stands over the rows."""
        return type(self).__name__

    def _rows(self) -> dict[str, str]:
        """{what is said: in words, empty where there is nothing to say}."""
        return {field.replace("_", " "): words(value) for field, value in _said(self)}


class Residuals(Readable, dict[str, float]):
    """{layer: the share that is lost of what an adapter does there}, as norms."""

    __slots__ = ()

    def __repr__(self) -> str:
        """How many layers there are, and the largest share."""
        return f"{type(self).__name__}({len(self)} layers, at most {max(self.values(), default=0.0):.3g})"

    def _title(self) -> str:
        return repr(self)

    def _rows(self) -> dict[str, str]:
        worst = sorted(self.items(), key=lambda item: -item[1])
        more = {"...": f"{len(worst) - MANY} more, of less"} if len(worst) > MANY else {}
        return {layer: f"{share:.3g}" for layer, share in worst[:MANY]} | more


def _said(result: object) -> Iterator[tuple[str, object]]:
    """The fields of a dataclass that do not have their defaults."""
    for field in dataclasses.fields(result):  # type: ignore[arg-type]
        value = getattr(result, field.name)
        factory = field.default_factory
        default = factory() if callable(factory) else field.default
        if value is not default and not (type(value) is type(default) and value == default):
            yield field.name, value


def brief(value: object) -> str:
    """A value in a few characters: as it is, or how many it has, or its type."""
    if isinstance(value, (str, Path)):
        text = str(value)
        return repr(text if len(text) <= VALUE else f"{text[: VALUE - 3]}...")
    text = "" if isinstance(value, Collection) and len(value) > MANY else _plain(value)
    if text and len(text) <= VALUE and "\n" not in text:
        return text
    return f"<{len(value)} items>" if isinstance(value, Collection) else f"<{type(value).__name__}>"


def _plain(value: object) -> str:
    """A value as Python writes it, sets in order."""
    if isinstance(value, Set) and value:
        return f"{{{', '.join(sorted(map(repr, value)))}}}"
    return repr(value)


def words(value: object) -> str:
    """A value for people; empty where there is nothing to say."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or (isinstance(value, Collection) and not value):
        return ""
    if isinstance(value, Mapping):
        return joined((f"{words(key) or 'none'}: {words(inner)}" for key, inner in value.items()), MANY)
    if isinstance(value, (list, tuple)):
        return joined(map(words, value), MANY)
    if isinstance(value, Set):
        return joined(sorted(map(words, value)), MANY)
    text = repr(value) if isinstance(value, Readable) else f"{value:g}" if isinstance(value, float) else str(value)
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def family_in_words(family: str, others: Iterable[str] = ()) -> str:
    """The family that a file is for, and the others that it may be for."""
    return f"{family or 'unknown'} (or {', '.join(names)})" if (names := tuple(others)) else family or "unknown"


def bytes_in_words(size: int) -> str:
    """So many bytes for people."""
    unit, name = next((pair for pair in ((2**30, "GiB"), (2**20, "MiB")) if size >= pair[0]), (2**10, "KiB"))
    return f"{size / unit:.1f} {name}"


def ranks_in_words(ranks: Sequence[int]) -> str:
    """The ranks of layers, the smallest first, as `rank 4-16`; empty if there are none."""
    return f"rank {ranks[0]}" + (f"-{ranks[-1]}" if ranks[-1] != ranks[0] else "") if ranks else ""


def size_in_words(tensors: int, size: int, dtypes: Iterable[str]) -> str:
    """How much so many tensors of so many bytes are."""
    return f"{tensors} tensors, {bytes_in_words(size)}, {', '.join(dict.fromkeys(dtypes))}"


def keys_in_words(keys: Iterable[str]) -> str:
    """Keys that are no adapter's: how many, and one of them."""
    names = [*keys]
    return f"{len(names)} keys, such as {words(names[0])}" if names else ""
