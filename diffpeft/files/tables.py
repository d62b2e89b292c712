"""JSON that others wrote: judged by its size before it is parsed, so that a small file cannot become much memory or much work."""

from __future__ import annotations

import json
import re
from itertools import islice
from typing import Any

from diffpeft.errors import CheckpointError, UnreadableFileError

Json = dict[str, Any]  # a table that somebody else wrote: nothing is known of a value before it is looked at

MAX_CONFIG, MAX_ITEMS = 4 << 20, 300_000  # characters of a config, and its values, keys and brackets
_TOKEN = re.compile(
    r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[{,:]', re.DOTALL
)  # a text as a whole, or what opens or parts values
_OPENERS = "[{,:"


def parsed(text: str, *, items: int = MAX_ITEMS) -> Json:
    """The table that a text says in JSON. Raises ValueError, with the reason, also for a key that stands twice and for more than `items` values."""
    if sum(map(text.count, _OPENERS)) > items and _too_many(text, items):
        raise ValueError(f"it has more than {items} values")
    try:
        table = json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(table, dict):
        raise ValueError("it is no table")
    return table


def config_in(text: str, what: str, where: object = "") -> Json:
    """The table that a config says. Raises CheckpointError, which names the config by `what`."""
    try:
        if len(text) > MAX_CONFIG:
            raise ValueError(f"it has {len(text)} characters, and at most {MAX_CONFIG} are read")
        return parsed(text)
    except ValueError as error:
        raise CheckpointError(f"cannot read {what} ({error})", where=where) from error


def _too_many(text: str, items: int) -> bool:
    """Whether there are more values than that outside of texts."""
    openers = (match for match in _TOKEN.finditer(text) if text[match.start()] != '"')
    return next(islice(openers, items, None), None) is not None


def _unique(pairs: list[tuple[str, object]]) -> Json:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key stands twice")
    return table


def unreadable(where: object, what: str) -> UnreadableFileError:
    """The error for a file that is not whole."""
    return UnreadableFileError(what, where=where, remedy="Download or export it again as .safetensors.")
