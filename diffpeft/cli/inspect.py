"""diffpeft inspect."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Unpack

import click

from diffpeft.cli.options import place_options
from diffpeft.errors import DiffpeftError, UnreadableFileError

if TYPE_CHECKING:
    from diffpeft.converters import Inspection
    from diffpeft.converters.locating import Where


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path())
@click.option(
    "--json", "as_json", is_flag=True, help="Print every field as JSON: one object, or a list for several files."
)
@click.option(
    "--norms", is_flag=True, help="Read the tensors too: norms by block, dead layers, values that are not finite."
)
@place_options
@click.pass_context
def inspect(ctx: click.Context, files: tuple[str, ...], as_json: bool, norms: bool, **where: Unpack[Where]) -> None:
    """Say what adapter files are: format, family, methods, ranks, trigger words, and which programs read them.

    A FILE may be a folder, whose files are shown, a PEFT folder, or a link to the Hub. One that cannot be read does not hide the others.

    Example: diffpeft inspect style.safetensors --norms
    """
    from diffpeft.cli.errors import show

    tables: list[object] = []
    codes: list[int] = []
    for seen in _each(files, norms, where):
        if isinstance(seen, DiffpeftError):
            show(seen)
            codes.append(seen.exit_code)
        elif as_json:
            tables.append(_plain(asdict(seen)))
        else:
            click.echo(seen)
    if as_json and (tables or not codes):
        click.echo(json.dumps(tables[0] if len(tables) == 1 and not codes else tables, indent=2))
    if codes:
        ctx.exit(codes[0])


def _each(files: Iterable[str], norms: bool, where: Where) -> Iterator[Inspection | DiffpeftError]:
    """What each file is, or the error that it gives; those of folders one by one."""
    from diffpeft import converters
    from diffpeft.tools.listing import of_argument

    for file in files:
        try:
            paths = [converters.located(file, **where)] if any(where.values()) else of_argument(file)
        except DiffpeftError as error:
            yield error
            continue
        for path in paths:
            try:
                yield converters.inspect(path, norms=norms)
            except DiffpeftError as error:
                yield error
            except OSError as error:
                yield UnreadableFileError(f"cannot read it: {error.strerror or error}", where=path)


def _plain(value: object) -> object:
    """JSON has no keys but strings, and no NaN."""
    if isinstance(value, dict):
        return {"null" if k is None else str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
