"""diffpeft prune."""

from __future__ import annotations

import click

from diffpeft.cli.options import rewriting


@click.command()
@click.option(
    "--blocks",
    multiple=True,
    metavar="PATTERN",
    help="How names of layers to leave out begin, such as text_encoder or 'unet.up_blocks.*', or a block of A1111's (OUT03); may be repeated.",
)
@click.option(
    "--layers", multiple=True, metavar="PATTERN", help="How names of layers to leave out end: to_q; may be repeated."
)
@rewriting
def prune(
    source: str, out: str, blocks: tuple[str, ...], layers: tuple[str, ...], family: str | None, overwrite: bool
) -> None:
    """Write an adapter without some of its blocks or layers, in its own format.

    \b
    Example: diffpeft prune style.safetensors unet-only.safetensors --blocks text_encoder
             diffpeft prune style.safetensors small.safetensors --blocks OUT03 --layers ff.net.0.proj
    """
    from diffpeft.cli.errors import naming
    from diffpeft.errors import joined
    from diffpeft.tools import pruning

    with naming(out):
        report = pruning.prune(source, out, blocks=blocks, layers=layers, family=family, overwrite=overwrite)
    click.echo(
        f"left out {len(report.dropped)} of {len(report.dropped) + report.layers} layers: {joined(report.dropped, 5)}"
    )
    click.echo(report.path)
