"""diffpeft train: its options are the fields of TrainConfig."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from diffpeft.cli.options import options_from, options_of
from diffpeft.train.config import TrainConfig


@click.command()
@click.argument("config", required=False, type=click.Path(exists=True, dir_okay=False))
@options_of(TrainConfig)
def train(config: str | None, **typed: Any) -> None:
    """Train an adapter on your own images, DreamBooth-style.

    CONFIG is a TOML file with the same options by name (rank = 16); what is typed wins.

    Example: diffpeft train -m MODEL -d photos -o out --instance-prompt "a photo of sks dog"
    """
    options = options_from(TrainConfig, config, typed)

    from diffpeft.cli.progress import Progress

    with Progress() as progress:
        from diffpeft.cli.errors import quiet_bars
        from diffpeft.train import dreambooth, report

        quiet_bars()
        run = dreambooth.train(options, progress)
        progress.phase("writing")
        files = dreambooth.save(run)
        out = Path(options.out or "")
        files.append(
            report.write(
                out / "report.html",
                title=f"diffpeft: {run.name}",
                losses=run.losses,
                options=run.config.resolved(),
                files=[*files, out / "report.html"],
            )
        )
    for file in files:
        click.echo(file)
