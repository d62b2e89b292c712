"""diffpeft average."""

from __future__ import annotations

from pathlib import Path

import click

from diffpeft.cli.options import Finite, overwriting


@click.command()
@click.argument("run", metavar="RUN", type=click.Path(exists=True, file_okay=False))
@click.option("-o", "--out", required=True, type=click.Path(file_okay=False), help="Folder for the results.")
@click.option(
    "--width",
    type=Finite(),
    default=0.1,
    show_default=True,
    help="How far back it reaches: the deviation of the weights over the steps, up to 0.28, where all states count alike.",
)
@overwriting
def average(run: str, out: str, width: float, overwrite: bool) -> None:
    """Average an adapter over the states that a training run kept: an EMA made afterwards, with any width.

    RUN is the output folder of diffpeft train or sft, run with --save-every and --keep.

    Example: diffpeft average out -o averaged --width 0.15
    """
    from diffpeft.cli.errors import naming
    from diffpeft.train import posthoc

    with naming(out):
        files = posthoc.average(Path(run), Path(out), width, overwrite)
    for file in files:
        click.echo(file)
