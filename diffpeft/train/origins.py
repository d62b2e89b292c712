"""Where the value of each option of a run is from, and the file of options that says so. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from diffpeft.errors import shown
from diffpeft.io import replacing
from diffpeft.train.config import PATHS, Options
from diffpeft.train.outputs import ACCOUNT, CONFIG

COMMAND, DEFAULT, MODEL, RESUMED, ARGUMENT = "command line", "default", "model", "resume", "argument"
_BY_MODEL = ("resolution", "max_length")  # what the model says where nobody else does
_ADOPTED = ("method", "rank", "alpha")  # what an adapter to go on with brings along
_OF_A_RUN = ("resume", "overwrite", "allow")  # how a run begins, and nothing of what it trains


def origins_of(typed: Options, resolved: Options, said: Mapping[str, str]) -> dict[str, str]:
    """{option: where its value is from}: default, model, the file, the command line, an alias there, or the run that goes on.

    Args:
        typed, resolved: the options as they were said, and as they are used.
        said: where those that were said are from; an option that is not in it and has another value than its default is an argument.
    """
    return {
        f.name: _origin(f.name, f.default, typed, resolved, said)
        for f in fields(resolved)
        if f.name in resolved.names()
    }


def _origin(name: str, default: object, typed: Options, resolved: Options, said: Mapping[str, str]) -> str:
    value, before = getattr(resolved, name), getattr(typed, name)
    if name in _ADOPTED and resolved.init_from and value != before:
        return f"file {Path(resolved.init_from).name}"
    if name in said:
        return said[name]
    if before != default:
        return ARGUMENT
    return MODEL if value != before and name in _BY_MODEL else DEFAULT


def text_of(options: Options, origins: Mapping[str, str], headline: str) -> str:
    """The options that have a value as a TOML file, each with where it is from. Paths that exist are absolute, so that the file is of use anywhere."""
    said = {name: value for name, value in options.resolved().items() if value is not None and name not in _OF_A_RUN}
    rows = [(f"{name} = {_toml(_placed(name, value))}", origins.get(name, DEFAULT)) for name, value in said.items()]
    width = min(max(len(row) for row, _ in rows), 60)
    return "\n".join([f"# {headline}", *(f"{row:{width}}  # {_plain(origin)}" for row, origin in rows)]) + "\n"


def record(out: Path, options: Options, origins: Mapping[str, str], account: Mapping[str, object]) -> None:
    """Write OUT/config.toml, with which the same command does the same again, and OUT/account.json, what `diffpeft data check --json` prints."""
    files = {
        CONFIG: text_of(options, origins, f"diffpeft {options.COMMAND} {CONFIG} --out ANOTHER does the same again"),
        ACCOUNT: json.dumps(account, indent=2) + "\n",
    }
    for name, text in files.items():
        with replacing(out / name) as f:
            f.write(text.encode(errors="replace"))


def _placed(name: str, value: object) -> object:
    """Paths that exist as absolute ones, those with a number behind them (`photos:3`) too; all else as it is."""
    if name not in PATHS:
        return value
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_placed(name, entry) for entry in value]
    path, colon, number = str(value).rpartition(":")
    if Path(str(value)).exists() or name == "out":
        return str(Path(str(value)).resolve())
    return f"{Path(path).resolve()}:{number}" if colon and Path(path).exists() else value


def _toml(value: object) -> str:
    """A text, a number, true or false, or a list of such, as TOML has them."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", r"\u007f")  # JSON's escapes are TOML's too


def _plain(text: str) -> str:
    """A text for a comment, on one line."""
    return shown(text)[1:-1]
