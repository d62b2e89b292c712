"""diffpeft list."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from diffpeft.cli.columns import columns, printed
from diffpeft.cli.options import overwriting
from diffpeft.readable import bytes_in_words, ranks_in_words

if TYPE_CHECKING:
    from diffpeft.tools.listing import AdapterRow

WORDS = 40  # characters of trigger words


@click.command("list")
@click.argument("folder", metavar="DIR", default=".", type=click.Path(exists=True))
@click.option("-r", "--recursive", is_flag=True, help="Look through the folders inside, too.")
@click.option("--json", "as_json", is_flag=True, help="Print every field as JSON.")
@click.option(
    "--html",
    "out",
    metavar="OUT.html",
    type=click.Path(dir_okay=False),
    help="Write a page with the adapters' pictures, too.",
)
@overwriting
def list_(folder: str, recursive: bool, as_json: bool, out: str | None, overwrite: bool) -> None:
    """Say what the adapters in a folder are, a line each: family, method, rank, size, picture, trigger words.

    Only headers are read. A picture is NAME.preview.png or NAME.png beside the file, or in its metadata. A file that
    cannot be read is a line that says why, and no error: the exit code is 0 if the folder could be read.

    Example: diffpeft list loras --recursive --html loras.html
    """
    from diffpeft.files import refuse_existing
    from diffpeft.tools.catalogue import catalogue
    from diffpeft.tools.listing import list_adapters

    refuse_existing([out] if out else [], overwrite)
    rows = list_adapters(folder, recursive=recursive)
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
    elif not rows:
        click.echo(f"no .safetensors file in {folder}")
    else:
        for line in columns([_texts(row, Path(folder)) for row in rows]):
            click.echo(line)
    if out:
        from diffpeft.cli.errors import naming

        with naming(out):
            catalogue(rows, out, overwrite=overwrite)
        click.echo(out, err=as_json)


def _texts(row: AdapterRow, folder: Path) -> list[str]:
    path = Path(row.path)
    name = str(path.relative_to(folder)) if folder in path.parents else path.name
    if row.error:
        return [printed(name), f"! {printed(row.error)}"]
    ranks, size = ranks_in_words(row.ranks), bytes_in_words(row.size)
    words = f"words: {printed(', '.join(row.trigger_words), WORDS)}" if row.trigger_words else ""
    picture = "picture" if row.thumbnail else ""
    return [printed(name), row.family or "unknown", "+".join(row.methods), ranks, size, picture, words]
