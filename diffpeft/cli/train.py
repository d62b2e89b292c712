"""diffpeft train: its options are the fields of TrainConfig."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from diffpeft.cli.options import Chosen, options_from, options_of
from diffpeft.cli.pasted import PASTED, Pasted
from diffpeft.train.config import TrainConfig

if TYPE_CHECKING:
    from diffpeft.train.dreambooth import TrainRun


@click.command(cls=Pasted)
@click.argument("config", required=False, type=click.Path(exists=True, dir_okay=False))
@options_of(TrainConfig)
@click.option(
    "--print-config", is_flag=True, help="Print the options as a TOML file, with where each is from, and do nothing."
)
@click.pass_context
def train(ctx: click.Context, config: str | None, print_config: bool, **typed: object) -> None:
    """Train an adapter on your own images, DreamBooth-style.

    CONFIG is a TOML file with the same options by name (rank = 16); what is typed wins. A job file of ai-toolkit and the
    TOML files of sd-scripts are read too, and so are the names that they and diffusers have for options.

    Ctrl-C finishes the step and saves the state; diffpeft train --resume OUT goes on from it.

    Example: diffpeft train -m MODEL -d photos -o out --instance-prompt "a photo of sks dog"
    """
    chosen = options_from(TrainConfig, config, typed, ctx.meta[PASTED], complete=not print_config)
    if print_config:
        _print(chosen)
        return
    options = chosen.options

    from diffpeft.cli.progress import Progress
    from diffpeft.train.check import check
    from diffpeft.train.lock import occupied
    from diffpeft.train.signals import ending

    with ending(), Progress() as progress, occupied(options.output()):
        for note in chosen.notes:
            progress.note(note)
        progress.phase("looking at the data")
        checked = check(options, chosen.origins)
        for line in checked.account.lines():
            progress.note(line)

        from diffpeft.cli.errors import quiet_bars
        from diffpeft.train import dreambooth

        quiet_bars()
        run = dreambooth.train(options, progress, checked)
        progress.phase("writing")
        files, readers = _written(run)
        if run.best:
            progress.note(f"the adapter is that of step {run.best.step}: {run.best.reason}")
        for name, text in readers.items():
            progress.note(f"{name}: {text}")
    for file in files:
        click.echo(file)


def _print(chosen: Chosen[TrainConfig]) -> None:
    """The options as a file, on stdout, and notes on stderr."""
    from diffpeft.train.origins import origins_of, text_of
    from diffpeft.train.resolve import preview

    for note in chosen.notes:
        click.echo(f"note: {note}", err=True)
    options = preview(chosen.options)
    text = text_of(options, origins_of(chosen.options, options, chosen.origins), "diffpeft train THIS_FILE")
    click.echo(text, nl=False)


def _written(run: TrainRun) -> tuple[list[Path], dict[str, str]]:
    """Write the adapter and the report; the files, and which programs read them."""
    from diffpeft.cli.errors import naming
    from diffpeft.train import dreambooth, report
    from diffpeft.train.watching import write_metrics

    files = [*dreambooth.save(run), write_metrics(run)]
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
