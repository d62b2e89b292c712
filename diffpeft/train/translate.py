"""Options of other trainers as ours: each through its row of `other_names.TABLE`, and what several of theirs say together through a part of
`translated_data`, `translated_network` or `translated_steps`.

Nothing is left out in silence: what changes nothing here is named in a note, and what would change the result and cannot be had is refused, by name.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from diffpeft.errors import ConfigError, UnknownNameError, listed, shown
from diffpeft.train import translated_data, translated_network, translated_steps
from diffpeft.train.other_names import TABLE, OtherName, words
from diffpeft.train.translation import FALSE, TRUE, Translation, key_of

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", dict: "a table", str: "a text"}
_PARTS = (*translated_data.PARTS, *translated_network.PARTS, *translated_steps.PARTS)


def is_alias(name: str, known: Collection[str]) -> bool:
    """Whether this is another trainer's option, and none of ours."""
    return key_of(name) in TABLE and key_of(name) not in known


def translated(pairs: Iterable[tuple[str, object]], known: Collection[str], where: object = "") -> Translation:
    """Options of another trainer, by their names, as ours, of which `known` are the names.

    Raises UnknownNameError for a name that nobody has, ConfigError for values that are none, for two that disagree, and for options that cannot be had.
    """
    to = Translation(where)
    for name, value in pairs:
        _place(to, name, value, known)
    for part in _PARTS:
        part(to)
    to.check()
    for ours in to.values:
        if ours not in known:
            raise UnknownNameError.of("option", to.names[ours], known, where=where)
    return to


def _place(to: Translation, name: str, value: object, known: Collection[str]) -> None:
    """Put one option where its row says."""
    key = key_of(name)
    row = TABLE.get(key)
    if row is None:
        if key not in known:
            raise UnknownNameError.of("option", name, known, where=to.where)
        return to.put(key, value, name)
    if row.reads is bool and key in known and isinstance(value, str) and value.lower() not in (*TRUE, *FALSE):
        return to.put(key, value, name)  # a flag there that takes a value here
    value = _read(row, name, value, to.where)
    if value not in (None, "", []) and not any(value == off and type(value) is type(off) for off in _both(row.off)):
        _placed(to, row, name, value)


def _placed(to: Translation, row: OtherName, name: str, value: object) -> None:
    """Put a value that may change something where its row says."""
    key = key_of(name)
    if row.idle:
        if value not in (False, 0):
            to.idle.setdefault(row.idle, []).append(name.lstrip("-"))
    elif row.remedy:
        to.refused[name] = row.remedy
    elif not row.part:
        to.put(row.ours, _turned(row, name, value, to), name)
    elif to.theirs.setdefault(key, value) != value:
        raise ConfigError(f"{name} is {shown(to.theirs[key])} and {shown(value)}", where=to.where)


def _both(off: Iterable[object]) -> Iterable[object]:
    """Whole numbers as such and as floats."""
    for value in off:
        yield value
        if isinstance(value, int) and not isinstance(value, bool):
            yield float(value)


def _read(row: OtherName, name: str, value: object, where: object) -> object:
    """A value as what it is said to be: texts of a command line are read. Raises ConfigError."""
    try:
        if value is None or row.reads is list:
            return None if value is None else list(words(value))
        if row.reads is bool:
            return _boolean(value)
        if row.reads in (int, float):
            number = float(value)  # type: ignore[arg-type]
            if isinstance(value, bool) or (row.reads is int and number != int(number)):
                raise ValueError
            return row.reads(number)
        if row.reads is dict and not isinstance(value, Mapping):
            raise ValueError
        return value if isinstance(value, (list, dict)) else str(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(
            f"{name} is {shown(value)}", where=where, remedy=f"It is {_WORDS.get(row.reads, 'a list')}."
        ) from None


def _boolean(value: object) -> bool:
    text = str(value).lower()
    if text not in (*TRUE, *FALSE):
        raise ValueError
    return text in TRUE


def _turned(row: OtherName, name: str, value: object, to: Translation) -> object:
    """A value as it is here. Raises ConfigError for one that there is none for."""
    if row.turn is None:
        return value
    if isinstance(row.turn, Mapping):
        if str(value) not in row.turn:
            raise ConfigError(f"{name} is {shown(value)}", where=to.where, remedy=f"It is {listed(row.turn)}.")
        return row.turn[str(value)]
    try:
        turned = row.turn(value)
    except ValueError as error:
        raise ConfigError(f"{name} is {shown(value)}", where=to.where, remedy=str(error)) from None
    if row.ours == "resolution" and str(turned) not in str(value):
        to.notes.append(f"{name} {value} is {turned} here: the side of the square with that area, in steps of 64")
    return turned
