"""Command-line options from the fields of an options dataclass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import click

from diffpeft.train.config import Run, from_toml

_SHORT = {"model": "-m", "data": "-d", "out": "-o", "rank": "-r"}
_TYPES = {"int": int, "float": float, "str": str}
Command = Callable[..., None]


def options_of(kind: type) -> Callable[[Command], Command]:
    """One option a field. Defaults stay None here, so that what was typed can be told from what was not."""

    def add(command: Command) -> Command:
        for f in reversed(fields(kind)):
            flag, type_name, meta = "--" + f.name.replace("_", "-"), str(f.type).partition(" ")[0], f.metadata
            boolean = type_name == "bool"
            names = [n for n in (_SHORT.get(f.name), f"{flag}/--no-{flag[2:]}" if boolean else flag) if n]
            shown = "" if f.default is None or boolean else f" [default: {f.default}]"
            type_ = None if boolean else click.Choice(meta["choices"]) if meta["choices"] else _TYPES[type_name]
            command = click.option(*names, f.name, type=type_, default=None, help=meta["help"] + shown)(command)
        return command

    return add


def options_from(kind: type[Run], config: str | None, typed: Mapping[str, Any]) -> Run:
    """The options of a file, replaced by what was typed; checked."""
    given = {name: value for name, value in typed.items() if value is not None}
    options = from_toml(config, given, kind) if config else kind(**given)
    options.validate()
    return options
