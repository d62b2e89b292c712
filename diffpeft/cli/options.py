"""Command-line options from the fields of an options dataclass."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any, Generic

import click

from diffpeft.cli.completion import completions, family_names
from diffpeft.errors import ConfigError, UnknownNameError, listed, near, shown
from diffpeft.files import Json, near_path
from diffpeft.train.checkpoints import LATEST
from diffpeft.train.config import PATHS, AnyOptions, Options
from diffpeft.train.config_files import Said, data_pairs, said_by, said_in
from diffpeft.train.origins import COMMAND, RESUMED
from diffpeft.train.other_names import hint, words
from diffpeft.train.resume import remembered
from diffpeft.train.translation import key_of

_SHORT = {"model": "-m", "data": "-d", "out": "-o", "rank": "-r"}
_TYPES = {"int": int, "float": float, "str": str}  # that they are finite is checked with the other fields
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


_PLACE = {  # what `converters.located` is told beside a source
    "filename": (("--filename", "--weight-name"), str, "The file of a folder or a repository that holds several."),
    "subfolder": (("--subfolder",), str, "The folder of a repository that it is in."),
    "revision": (("--revision",), str, "The branch, tag or commit of a repository on the Hub."),
    "token": (("--token",), str, "For a private or gated repository. Default: that of `hf auth login`."),
    "cache_dir": (("--cache-dir",), click.Path(file_okay=False), "Where to keep what is fetched from the Hub."),
}


def place_options(command: Command) -> Command:
    """The options of a command that reads one adapter: which file it is, and how the Hub is reached."""
    for name, (flags, kind, help_) in reversed(_PLACE.items()):
        command = click.option(*flags, name, type=kind, help=help_)(command)
    return command


class Finite(click.FloatRange):
    """A number, and neither NaN nor infinite."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number of a text."""
        number = float(super().convert(value, param, ctx))  # type: ignore[arg-type]  # click's own signature is too narrow
        if not math.isfinite(number):
            self.fail(f"{value!r} is no finite number", param, ctx)
        return number


class NegativeLast(click.Command):
    """A command whose last argument is a number that may be negative: -0.5 is no option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, with the number behind the `--` that ends options."""
        numbers = [word for word in args if _NEGATIVE.fullmatch(word)]
        others = [word for word in args if word not in numbers]
        return super().parse_args(ctx, [*others, "--", *numbers] if numbers and "--" not in args else args)


_NEGATIVE = re.compile(r"-\.?\d[\w.+-]*")


def overwriting(command: Command) -> Command:
    """The option without which no command replaces what is there."""
    return click.option("--overwrite", is_flag=True, help="Replace the output if it is there already.")(command)


def rewriting(command: Command) -> Command:
    """What each command has that writes an adapter file anew: IN, OUT, the family and --overwrite."""
    command = overwriting(command)
    help_ = "What the adapter is for, if that is not what it looks like."
    command = click.option("--family", shell_complete=family_names, help=help_)(command)
    for name, shown_as in (("out", "OUT"), ("source", "IN")):
        command = click.argument(name, metavar=shown_as, type=click.Path())(command)
    return command


_FILES = {"base", "resume", "control", "base_lora", "training_adapter"}  # may be files, folders or something else


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


def misunderstood(error: click.UsageError, ctx: click.Context) -> ConfigError:
    """What click says of an argument, with the near matches of a command, a choice or a path that there is not."""
    param = error.param if isinstance(error, click.BadParameter) else None
    kind = param.type if param else None
    quoted = _QUOTED.search(error.message)
    value, close = quoted[1] if quoted else "", ""
    if isinstance(kind, click.Choice):
        close = near(value, map(str, kind.choices))
    elif isinstance(kind, click.Path):
        close = _file_inside(value, isinstance(param, click.Argument)) if os.path.isdir(value) else near_path(value)
    elif isinstance(ctx.command, click.Group):
        close = near(value, ctx.command.commands)
    what = error.format_message().partition(". Did you mean")[0].rstrip(".")
    what = re.sub(r"^Invalid value for (.*?): (.)", lambda m: f"{m[1].replace(chr(39), '')}: {m[2].lower()}", what)
    what = re.sub(r"^(Missing \w+) '(.*?)'$", r"\1 \2", what)
    what = what if isinstance(error, click.BadParameter) and what[:7] != "Missing" else what[:1].lower() + what[1:]
    help_ = f"{ctx.command_path} --help says what there is."
    return ConfigError(what, remedy=f"{close} {help_}".strip())


_QUOTED = re.compile(r"'([^']*)'")


def _file_inside(folder: str, adapter: bool) -> str:
    """What to do about a folder where a file is asked for, of an adapter or another one."""
    names = sorted(
        os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".safetensors") and adapter
    )
    return f"Give a file: {listed(names, 3)}." if names else "Give a file."


def options_of(kind: type[Options], only: Collection[str] | None = None) -> Callable[[Command], Command]:
    """One option a field, or a field of `only`. Defaults stay None here, so that what was typed can be told from what was not."""

    def add(command: Command) -> Command:
        names_, words_ = kind.names() if only is None else only, completions(kind)
        for f in reversed([f for f in fields(kind) if f.name in names_]):
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
                shell_complete=words_.get(f.name),
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
    if option.name in PATHS | _FILES:
        return click.Path()
    return Numbers() if option.metadata["several"] == "commas" else _TYPES[kind]


@dataclass
class Chosen(Generic[AnyOptions]):
    """The options of a run, where those that were said are from, and what people should know."""

    options: AnyOptions
    origins: dict[str, str]
    notes: list[str]


def options_from(
    kind: type[AnyOptions],
    config: str | None,
    typed: Mapping[str, Any],
    pasted: Sequence[tuple[str, object]] = (),
    complete: bool = True,
) -> Chosen[AnyOptions]:
    """The options of a file, replaced by what was typed; where a run goes on, those of neither are the run's. Checked.

    Args:
        pasted: what was typed by the names of another trainer.
        complete: whether all that a run needs must be there.

    Raises ConfigError, also for an option that was typed by both names with two values, or UnknownNameError.
    """
    values = {name: value for name, value in typed.items() if value not in (None, ())}
    config, pasted = _with_files(config, pasted)
    file = said_in(config, kind) if config else Said()
    line = said_by(pasted, set(kind.names())) if pasted else Said()
    for name in values.keys() & line.values.keys() - line.implied:
        _check_equal(name, values[name], line)
    for name in line.implied & (file.values.keys() - file.implied):
        del line.values[name]
    said = remembered(kind, file.values | line.values | values)
    origins = dict.fromkeys(said, RESUMED) | file.origins
    origins |= {name: line.origins[name] for name in line.values} | dict.fromkeys(values, COMMAND)
    options = kind(**said)
    options.validate() if complete else options.check_values()
    return Chosen(options, origins, file.notes + line.notes)


def _with_files(
    config: str | None, pasted: Sequence[tuple[str, object]]
) -> tuple[str | None, list[tuple[str, object]]]:
    """The file of options and what was pasted, with what sd-scripts' files of data sets say."""
    pairs: list[tuple[str, object]] = []
    for name, value in pasted:
        if key_of(name) == "config_file":
            path = Path(str(value))
            config = str(path if path.exists() else path.with_suffix(".toml"))
        elif key_of(name) == "dataset_config":
            pairs += data_pairs(Path(str(value)))
        else:
            pairs.append((name, value))
    return config, pairs


def _check_equal(name: str, value: object, line: Said) -> None:
    """Raise ConfigError if an option was typed by both names, with two values."""
    theirs = line.values[name]
    if value != theirs and [value] != theirs and list(words(value)) != list(words(theirs)):
        raise ConfigError(
            f"{name} is {shown(value)} and {line.origins[name].removeprefix('alias ')} is {shown(theirs)}: they are one option",
            remedy="Leave one of them out.",
        )
