"""Command-line options from the fields of an options dataclass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, fields
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
Command = Callable[..., int | None]


class Numbers(click.ParamType):
    """One whole number, or several with commas."""

    name = "numbers"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        """512 as it is, 512,768 as both."""
        try:
            numbers = tuple(int(number) for number in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is no whole number, and no numbers with commas.", param, ctx)
        return numbers if len(numbers) > 1 else numbers[0]


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


def options_of(kind: type, only: Collection[str] | None = None) -> Callable[[Command], Command]:
    """One option a field, or a field of `only`. Defaults stay None here, so that what was typed can be told from what was not."""

    def add(command: Command) -> Command:
        for f in reversed([f for f in fields(kind) if only is None or f.name in only]):
            flag, meta, type_ = "--" + f.name.replace("_", "-"), f.metadata, _type_of(f)
            names = [n for n in (_SHORT.get(f.name), flag if type_ else f"{flag}/--no-{flag[2:]}") if n]
            shown = "" if f.default is None or type_ is None else f" [default: {f.default}]"
            alone: Json = {"is_flag": False, "flag_value": LATEST} if f.name == "resume" else {}
            command = click.option(
                *names,
                f.name,
                type=type_,
                default=None,
                multiple=meta["several"] == "repeated",
                help=meta["help"] + shown,
                shell_complete=_COMPLETE.get(f.name),
                **alone,
            )(command)
        return command

    return add


def _type_of(option: Field[object]) -> click.ParamType | type | None:
    """How click reads an option's value; None for one that is on or off."""
    kind = str(option.type).partition(" ")[0]
    if kind == "bool":
        return None
    if option.metadata["choices"]:
        return click.Choice(option.metadata["choices"])
    if option.name in PATHS:
        return click.Path()
    return Numbers() if option.metadata["several"] == "commas" else _TYPES[kind]


def options_from(kind: type[AnyOptions], config: str | None, typed: Mapping[str, Any]) -> AnyOptions:
    """The options of a file, replaced by what was typed; where a run goes on, those of neither are the run's. Checked."""
    values = {name: value for name, value in typed.items() if value not in (None, ())}
    options = kind(**remembered(kind, (values_of(config, kind) if config else {}) | values))
    options.validate()
    return options
