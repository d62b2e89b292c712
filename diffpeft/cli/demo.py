"""diffpeft demo."""

from __future__ import annotations

import click

from diffpeft.cli.completion import completed
from diffpeft.cli.options import overwriting
from diffpeft.train.method import ADAPTERS


@click.command()
@click.option(
    "--method", default="lora", show_default=True, shell_complete=completed(ADAPTERS), help="The adapter method."
)
@click.option("--steps", type=click.IntRange(min=1), default=900, show_default=True, help="Training steps.")
@click.option(
    "-o",
    "--out",
    type=click.Path(file_okay=False),
    default="demo-out",
    show_default=True,
    help="Folder for the results.",
)
@overwriting
def demo(method: str, steps: int, out: str, overwrite: bool) -> None:
    """Learn a drawing style on the embedded base model, and see it: minutes on two cores, no network.

    Writes the adapter, before_after.png, metrics.json and report.html.

    Example: diffpeft demo -o my-demo
    """
    from diffpeft.cli.errors import naming
    from diffpeft.cli.progress import Progress
    from diffpeft.train import demo as job
    from diffpeft.train.progress import quiet_bars

    with naming(out), Progress() as progress:
        quiet_bars()
        files = job.demo(out, method, steps, progress, overwrite)
    for file in files:
        click.echo(file)
