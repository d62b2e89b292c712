"""diffpeft edit."""

from __future__ import annotations

import click

from diffpeft.cli.options import overwriting
from diffpeft.errors import ConfigError


@click.command()
@click.argument("file", metavar="FILE", type=click.Path(dir_okay=False))
@click.option(
    "--set", "pairs", multiple=True, metavar="KEY=TEXT", help="What the metadata are to say; may be repeated."
)
@click.option("--unset", multiple=True, metavar="KEY", help="What they are to say no more; may be repeated.")
@click.option("--trigger-words", metavar='"A, B"', help="What must stand in a prompt, with commas; empty for nothing.")
@click.option(
    "--thumbnail", metavar="PICTURE", type=click.Path(exists=True, dir_okay=False), help="A picture to show it by."
)
@click.option(
    "--hashes", "hashed", is_flag=True, help="Add the hashes by which other programs know it, if it has none."
)
@click.option(
    "-o", "--out", type=click.Path(dir_okay=False), help="Write a copy. Default: FILE itself, replaced as a whole."
)
@overwriting
def edit(
    file: str,
    pairs: tuple[str, ...],
    unset: tuple[str, ...],
    trigger_words: str | None,
    thumbnail: str | None,
    hashed: bool,
    out: str | None,
    overwrite: bool,
) -> None:
    """Change what an adapter file's metadata say; its tensors keep their bytes, and its hashes are renewed.

    \b
    Example: diffpeft edit style.safetensors --set modelspec.title="My style" --trigger-words "mystyle, ink"
             diffpeft edit style.safetensors --thumbnail picture.png -o shared.safetensors
    """
    from diffpeft.cli.errors import naming
    from diffpeft.tools import editing

    words = None if trigger_words is None else trigger_words.split(",")
    with naming(out or file):
        report = editing.edit(
            file,
            set=dict(map(_pair, pairs)),
            unset=unset,
            trigger_words=words,
            thumbnail=thumbnail,
            hashed=hashed,
            out=out,
            overwrite=overwrite,
        )
    for label, keys in (("set", report.changed), ("removed", report.removed)):
        if keys:
            click.echo(f"{label}: {', '.join(keys)}")
    click.echo(report.path)


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {text!r} has no KEY=TEXT", remedy='For example --set modelspec.title="My style".')
    return key, value
