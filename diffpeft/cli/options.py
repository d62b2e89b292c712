"""Command-line options from the fields of an options dataclass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from typing import Any

import click

from diffpeft.errors import UnknownNameError, near
from diffpeft.files import Json
from diffpeft.train.checkpoints import LATEST
from diffpeft.train.config import PATHS, AnyOptions, hint, values_of
from diffpeft.train.method import CONFIGS
from diffpeft.train.optimizers import OPTIMIZERS
from diffpeft.train.resume import remembered

_SHORT = {"model": "-m", "data": "-d", "out": "-o", "rank": "-r"}
_TYPES = {"int": int, "float": float, "str": str}
Command = Callable[..., None]


def completed(words: Collection[str]) -> Callable[..., list[str]]:
    """What a shell completes to one of these words."""
    return lambda ctx, param, begun: [word for word in words if word.startswith(begun)]


_COMPLETE = {"method": completed(list(CONFIGS)), "optimizer": completed(list(OPTIMIZERS))}


def unknown_option(error: click.NoSuchOption) -> UnknownNameError:
    """An option that a command does not have: what it is called here, or the near matches."""
    command = error.ctx.command if error.ctx else None
    flags = [o for p in getattr(command, "params", ()) for o in (*p.opts, *p.secondary_opts)]
    names = {flag[2:]: flag for flag in flags if flag.startswith("--")}
    called = hint(error.option_name, {name.replace("-", "_") for name in names}, "--")
    close = near(error.option_name.strip("-"), names)
    for name, flag in names.items():
        close = close.replace(f"'{name}'", flag)
    help_ = f"diffpeft {command.name if command else ''} --help lists them."
    return UnknownNameError(f"no option {error.option_name}", remedy=called or close or help_)


def options_of(kind: type) -> Callable[[Command], Command]:
    """One option a field. Defaults stay None here, so that what was typed can be told from what was not."""

    def add(command: Command) -> Command:
        for f in reversed(fields(kind)):
            flag, type_name, meta = "--" + f.name.replace("_", "-"), str(f.type).partition(" ")[0], f.metadata
            boolean = type_name == "bool"
            names = [n for n in (_SHORT.get(f.name), f"{flag}/--no-{flag[2:]}" if boolean else flag) if n]
            shown = "" if f.default is None or boolean else f" [default: {f.default}]"
            choice = click.Choice(meta["choices"]) if meta["choices"] else click.Path() if f.name in PATHS else None
            type_ = None if boolean else choice or _TYPES[type_name]
            alone: Json = {"is_flag": False, "flag_value": LATEST} if f.name == "resume" else {}
            command = click.option(
                *names,
                f.name,
                type=type_,
                default=None,
                help=meta["help"] + shown,
                shell_complete=_COMPLETE.get(f.name),
                **alone,
            )(command)
        return command

    return add


def options_from(kind: type[AnyOptions], config: str | None, typed: Mapping[str, Any]) -> AnyOptions:
    """The options of a file, replaced by what was typed; where a run goes on, those of neither are the run's. Checked."""
    values = {name: value for name, value in typed.items() if value is not None}
    options = kind(**remembered(kind, (values_of(config, kind) if config else {}) | values))
    options.validate()
    return options
