"""diffpeft inspect."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from diffpeft.errors import CheckpointError, DiffpeftError, UnreadableFileError

BAR = 30  # characters


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path())
@click.option(
    "--json", "as_json", is_flag=True, help="Print every field as JSON: one object, or a list for several files."
)
@click.option(
    "--norms", is_flag=True, help="Read the tensors too: norms by block, dead layers, values that are not finite."
)
@click.pass_context
def inspect(ctx: click.Context, files: tuple[str, ...], as_json: bool, norms: bool) -> None:
    """Say what adapter files are: format, family, methods, ranks, trigger words, and which programs read them.

    A FILE may be a folder, whose files are shown, a PEFT folder, or a link to the Hub. One that cannot be read does not hide the others.

    Example: diffpeft inspect style.safetensors --norms
    """
    from diffpeft.cli.errors import show

    shown, codes = [], []
    for one in _each(files, norms):
        if isinstance(one, DiffpeftError):
            show(one)
            codes.append(one.exit_code)
        elif as_json:
            shown.append(_plain(asdict(one)))
        else:
            _show(one)
    if as_json and (shown or not codes):
        click.echo(json.dumps(shown[0] if len(shown) == 1 and not codes else shown, indent=2))
    if codes:
        ctx.exit(codes[0])


def _each(files: Iterable[str], norms: bool) -> Iterator[Any]:
    """What each file is, or the error that it gives; those of folders one by one."""
    import converters

    for file in files:
        try:
            paths = _paths(file)
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


def _paths(file: str) -> list[Any]:
    """The adapters that an argument stands for: a file, a PEFT folder, or the files and PEFT folders in a folder."""
    import converters
    from diffpeft.pipeline.locate import PEFT, located

    folder = Path(file)
    if not folder.is_dir() or (folder / PEFT[1]).is_file():
        return [folder if folder.is_dir() else located(file)]
    inside = converters.components_in(folder) or sorted(
        path for path in folder.iterdir() if path.suffix == ".safetensors" or (path / PEFT[1]).is_file()
    )
    if not inside:
        raise CheckpointError(
            "the folder holds no .safetensors file",
            where=folder,
            remedy="Pass an adapter's file, or a folder with one.",
        )
    return list(inside)


def _plain(value: Any) -> Any:
    """JSON has no keys but strings, and no NaN."""
    if isinstance(value, dict):
        return {"null" if k is None else str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and value - value != 0 else value


def _show(one: Any) -> None:
    from converters.inspection import by_block, listed_values

    family = one.family or "unknown"
    rows = {
        "format": one.format,
        "family": f"{family} (or {', '.join(one.alternatives)})" if one.alternatives else family,
        "methods": ", ".join(one.methods),
        "layers": f"{one.layers} in {', '.join(one.components)}",
        "ranks": listed_values(one.ranks),
        "alphas": listed_values(one.alphas),
        "size": f"{one.tensors} tensors, {one.bytes / 2**20:.1f} MiB, {', '.join(one.dtypes)}",
        "trigger words": ", ".join(one.trigger_words),
        "read by": ", ".join(one.readable_by),
        "not an adapter's": f"{len(one.carried)} keys, such as {one.carried[0]}" if one.carried else "",
    }
    if one.norms is not None:
        rows["dead layers"] = ", ".join(one.dead[:5]) + (f" and {len(one.dead) - 5} more" if len(one.dead) > 5 else "")
        rows["not finite"] = ", ".join(one.nonfinite[:5])
    click.echo(one.path)
    for name, text in rows.items():
        if text:
            click.echo(f"  {name:17} {text}")
    if one.norms is not None:
        blocks = by_block(one.norms)
        largest = max((n for n in blocks.values() if n == n and n != float("inf")), default=0) or 1
        for block, norm in blocks.items():
            click.echo(
                f"  {block:40} {'█' * round(BAR * min(norm / largest, 1)) if norm == norm else '?':{BAR}} {norm:.3g}"
            )
