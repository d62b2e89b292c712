"""diffpeft train: its options are the fields of TrainConfig."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from diffpeft.cli.groups import Grouped
from diffpeft.cli.launch import follow_launcher, launched, wait_for_main
from diffpeft.cli.options import options_from, options_of
from diffpeft.train import machines
from diffpeft.train.config import TrainConfig

if TYPE_CHECKING:
    from diffpeft.train.dreambooth import TrainRun


@click.command(cls=Grouped)
@click.argument("config", required=False, type=click.Path(exists=True, dir_okay=False))
@options_of(TrainConfig)
def train(config: str | None, **typed: object) -> int | None:
    """Train an adapter on your own images, DreamBooth-style.

    CONFIG is a TOML file with the same options by name (rank = 16); what is typed wins.

    Ctrl-C finishes the step and saves the state; diffpeft train --resume OUT goes on from it.

    Example: diffpeft train -m MODEL -d photos -o out --instance-prompt "a photo of sks dog"
    """
    options = options_from(TrainConfig, config, typed)
    if (code := launched(options)) is not None:
        return code

    from diffpeft.cli.progress import watching
    from diffpeft.train.check import check
    from diffpeft.train.lock import occupied
    from diffpeft.train.signals import ending

    follow_launcher()
    with ending(), watching() as progress, occupied(options.output()):
        wait_for_main()  # what it refuses is refused once
        progress.phase("looking at the data")
        checked = check(options)
        for line in checked.account.lines():
            progress.note(line)

        from diffpeft.cli.errors import quiet_bars
        from diffpeft.train import dreambooth

        quiet_bars()
        run = dreambooth.train(options, progress, checked)
        if not machines.world().main:
            dreambooth.save(run)
            return None
        progress.phase("writing")
        files, readers = _written(run)
        for name, text in readers.items():
            progress.note(f"{name}: {text}")
    for file in files:
        click.echo(file)
    return None


def _written(run: TrainRun) -> tuple[list[Path], dict[str, str]]:
    """Write the adapter and the report; the files, and which programs read them."""
    from diffpeft.cli.errors import naming
    from diffpeft.train import dreambooth, report

    files = dreambooth.save(run)
    readers = dreambooth.readers(run, files)
    page = Path(run.config.out or "") / "report.html"
    with naming(page):
        report.write(
            page,
            title=f"diffpeft: {run.name}",
            losses=run.losses,
            options=run.config.resolved(),
            files=[*files, page],
            data=run.account.lines(),
            readers=readers,
        )
    return [*files, page], readers
