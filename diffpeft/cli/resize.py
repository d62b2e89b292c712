"""diffpeft resize, diffpeft scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from diffpeft.cli.columns import columns
from diffpeft.cli.options import Finite, NegativeLast, rewriting

if TYPE_CHECKING:
    from diffpeft.tools.resizing import ResizeReport

_LISTED = 10  # layers in the table without --all


@click.command()
@click.option("-r", "--rank", type=int, help="The most that a layer has.")
@click.option("--energy", type=Finite(), help="The share of each layer's squared norm to keep, such as 0.95.")
@click.option("--max-size", help="Of the file, such as 50MB or 48MiB: ranks go where they keep most.")
@click.option("--all", "all_", is_flag=True, help="Print every layer, not those that lose most only.")
@rewriting
def resize(
    source: str,
    out: str,
    rank: int | None,
    energy: float | None,
    max_size: str | None,
    family: str | None,
    all_: bool,
    overwrite: bool,
) -> None:
    """Write an adapter of fewer ranks: each layer's the best that so many ranks can do.

    LoRA and DoRA stay what they are. LoHa, LoKr and whole differences become LoRAs. What has no ranks stays as it is.

    \b
    Example: diffpeft resize style.safetensors small.safetensors --max-size 50MB
             diffpeft resize style.safetensors small.safetensors --energy 0.95
    """
    from diffpeft.cli.errors import naming
    from diffpeft.tools import resizing

    with naming(out):
        report = resizing.resize(
            source, out, rank=rank, energy=energy, max_size=max_size, family=family, overwrite=overwrite
        )
    _show(report, all_)


def _show(report: ResizeReport, all_: bool) -> None:
    """A table of the layers that lose most, and what became of the others."""
    from diffpeft.errors import joined
    from diffpeft.readable import bytes_in_words

    layers = sorted(report.energy, key=lambda layer: report.energy[layer])
    rows = [("before", "after", "energy kept", "layer")] + [
        (str(report.before[layer]), str(report.after[layer]), f"{report.energy[layer]:.4f}", layer)
        for layer in (layers if all_ else layers[:_LISTED])
    ]
    for line in columns(rows):
        click.echo(line)
    if not all_ and len(layers) > _LISTED:
        click.echo(
            f"and {len(layers) - _LISTED} more that keep at least {report.energy[layers[_LISTED]]:.4f} (--all prints them)"
        )
    if report.became_lora:
        click.echo(f"{len(report.became_lora)} layers became LoRAs: {joined(report.became_lora, 3)}")
    for why in dict.fromkeys(report.unchanged.values()):
        same = [layer for layer, reason in report.unchanged.items() if reason == why]
        click.echo(f"{len(same)} layers stay as they are ({why}): {joined(same, 3)}")
    click.echo(
        f"{bytes_in_words(report.size_before)} to {bytes_in_words(report.size)}, {report.kept_energy:.4f} of the energy kept"
    )
    click.echo(report.path)


@click.command(cls=NegativeLast)
@rewriting
@click.argument("by", metavar="BY", type=Finite())
def scale(source: str, out: str, by: float, family: str | None, overwrite: bool) -> None:
    """Write an adapter that does at strength 1 what IN does at strength BY.

    The number goes into alphas where a method has them, so that the factors keep their bytes. DoRA and rotations are refused.

    Example: diffpeft scale style.safetensors style-08.safetensors 0.8
    """
    from diffpeft.cli.errors import naming
    from diffpeft.tools import resizing

    with naming(out):
        report = resizing.scale(source, out, by, family=family, overwrite=overwrite)
    click.echo(f"{report.layers} layers times {report.by:g}")
    click.echo(report.path)
