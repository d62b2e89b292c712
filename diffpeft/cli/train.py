"""diffpeft train: its options are the fields of TrainConfig."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from diffpeft.cli.launch import follow_launcher, launched, wait_for_main
from diffpeft.cli.options import Chosen, options_from, options_of
from diffpeft.cli.pasted import PASTED, Pasted
from diffpeft.train import machines
from diffpeft.train.config import TrainConfig

if TYPE_CHECKING:
    from diffpeft.train.dreambooth import TrainRun


@click.command(cls=Pasted)
@click.argument("config", required=False, type=click.Path(exists=True, dir_okay=False))
@options_of(TrainConfig)
@click.option(
    "--print-config", is_flag=True, help="Print the options as a TOML file, with where each is from, and do nothing."
)
@click.option(
    "--dry-run", is_flag=True, help="Say what would be trained, written and needed, and do nothing. No weight is read."
)
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: as JSON.")
@click.pass_context
def train(
    ctx: click.Context, config: str | None, print_config: bool, dry_run: bool, as_json: bool, **typed: object
) -> int | None:
    """Train an adapter on your own images, DreamBooth-style.

    CONFIG is a TOML file with the same options by name (rank = 16); what is typed wins. A job file of ai-toolkit and the
    TOML files of sd-scripts are read too, and so are the names that they and diffusers have for options.

    Ctrl-C finishes the step and saves the state; diffpeft train --resume OUT goes on from it.

    Example: diffpeft train -m MODEL -d photos -o out --instance-prompt "a photo of sks dog"
    """
    chosen = options_from(TrainConfig, config, typed, ctx.meta[PASTED], complete=not print_config)
    if print_config:
        _print(chosen)
        return None
    options = chosen.options
    if dry_run:
        _plan(chosen, as_json)
        return None

    if (code := launched(options)) is not None:
        return code

    from diffpeft.cli.progress import watching
    from diffpeft.train.check import check
    from diffpeft.train.lock import occupied
    from diffpeft.train.signals import ending

    follow_launcher()
    with ending(), watching() as progress, occupied(options.output()):
        wait_for_main()  # what it refuses is refused once
        for note in chosen.notes:
            progress.note(note)
        progress.phase("looking at the data")
        checked = check(options, chosen.origins)
        for line in checked.account.lines():
            progress.note(line)

        from diffpeft.train import dreambooth
        from diffpeft.train.progress import quiet_bars
        from diffpeft.train.save import earlier_files

        quiet_bars()
        run = dreambooth.train(options, progress, checked)
        if not machines.world().main:
            dreambooth.save(run)
            return None
        progress.phase("writing")
        files, readers = _written(run)
        if run.best:
            progress.note(f"the adapter is that of step {run.best.step}: {run.best.reason}")
        for name, text in readers.items():
            progress.note(f"{name}: {text}")
        for name in earlier_files(run):
            progress.note(f"{name}: of an earlier run, and not written by this one")
    for file in dict.fromkeys([*files, *run.files]):
        click.echo(file)
    if options.push_to_hub:
        from diffpeft.train.publish import push

        click.echo(push(run))
    return None


def _plan(chosen: Chosen[TrainConfig], as_json: bool) -> None:
    """What a run would do in one process, on stdout, and notes on stderr."""
    from diffpeft.train.check import check

    for note in chosen.notes:
        click.echo(f"note: {note}", err=True)
    checked = check(replace(chosen.options, num_processes=None, fsdp=False), chosen.origins)

    from diffpeft.train.dry import plan
    from diffpeft.train.progress import quiet_bars

    quiet_bars()
    planned = plan(checked.config, checked)
    click.echo(json.dumps(planned.table(), indent=2) if as_json else planned)


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
    """Write the figures, the adapter and the page; the files, and which programs read them."""
    from diffpeft.train import dreambooth
    from diffpeft.train.watching import write_metrics

    metrics = write_metrics(run)
    files = [*dreambooth.save(run), metrics]
    return [*files, run.config.output() / "report.html"], dreambooth.readers(run, files)
