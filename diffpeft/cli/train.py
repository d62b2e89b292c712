"""diffpeft train: its options are the fields of TrainConfig."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from diffpeft.cli.launch import launched
from diffpeft.cli.options import Chosen, Command, options_from, options_of
from diffpeft.cli.pasted import PASTED, Pasted
from diffpeft.train import machines
from diffpeft.train.config import TrainConfig
from diffpeft.train.outputs import METRICS, PAGE

if TYPE_CHECKING:
    from diffpeft.train.check import Checked
    from diffpeft.train.dreambooth import TrainRun
    from diffpeft.train.watch import Watch

AnyTraining = TypeVar("AnyTraining", bound=TrainConfig)


def before_a_run(command: Command) -> Command:
    """The options with which a command says what it would do."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="With --dry-run: as JSON."),
        click.option(
            "--dry-run",
            is_flag=True,
            help="Say what would be trained, written and needed, and do nothing. No weight is read.",
        ),
        click.option(
            "--print-config",
            is_flag=True,
            help="Print the options as a TOML file, with where each is from, and do nothing.",
        ),
    ):
        command = option(command)
    return command


@click.command(cls=Pasted)
@click.argument("config", required=False, type=click.Path(exists=True, dir_okay=False))
@options_of(TrainConfig)
@before_a_run
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
    return perform(chosen, print_config, dry_run, as_json)


def perform(chosen: Chosen[AnyTraining], print_config: bool, dry_run: bool, as_json: bool) -> int | None:
    """Do what was asked for with the options of a run; the exit code of processes that were started for it."""
    if print_config:
        _print(chosen)
        return None
    if as_json and not dry_run:
        raise click.UsageError("--json is for --dry-run.")
    if dry_run:
        _plan(chosen, as_json)
        return None
    if (code := launched(chosen.options)) is not None:
        return code
    _run(chosen)
    return None


def _run(chosen: Chosen[AnyTraining]) -> None:
    """Train, in this process or one of several, and print the paths of the files."""
    from diffpeft.cli.progress import running

    options: TrainConfig = chosen.options
    with running(options) as progress:
        checked = _checked(chosen, progress)
        progress.note(f"to watch in a browser, from the first step on: {options.output() / 'report.html'}")

        from diffpeft.train import dreambooth
        from diffpeft.train.budget import fitted
        from diffpeft.train.progress import quiet_bars

        quiet_bars()
        options, checked = fitted(checked, progress)
        run = dreambooth.train(options, progress, checked)
        if not machines.world().main:
            dreambooth.save(run)
            return
        files = _saved(run, progress)
    for file in dict.fromkeys([*files, *run.files]):
        click.echo(file)
    if options.push_to_hub:
        from diffpeft.train.publish import push

        click.echo(push(run))


def _checked(chosen: Chosen[AnyTraining], watch: Watch) -> Checked:
    """What the checks say that need no model; notes on options and the account are told."""
    from diffpeft.train.check import check

    for note in chosen.notes:
        watch.note(note)
    watch.phase("looking at the data")
    checked = check(chosen.options, chosen.origins)
    for line in checked.account.lines():
        watch.note(line)
    return checked


def _plan(chosen: Chosen[AnyTraining], as_json: bool) -> None:
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


def _print(chosen: Chosen[AnyTraining]) -> None:
    """The options as a file, on stdout, and notes on stderr."""
    from diffpeft.train.origins import origins_of, text_of
    from diffpeft.train.resolve import preview

    for note in chosen.notes:
        click.echo(f"note: {note}", err=True)
    typed: TrainConfig = chosen.options
    said: Mapping[str, str] = chosen.origins
    if typed.memory and typed.model and typed.data and typed.out:  # what is picked follows from the model and the data
        from diffpeft.train.budget import fitted
        from diffpeft.train.check import check

        typed, checked = fitted(check(typed, said))
        said = checked.origins
    options = preview(typed)
    text = text_of(options, origins_of(typed, options, said), f"diffpeft {options.COMMAND} THIS_FILE")
    click.echo(text, nl=False)


def _saved(run: TrainRun, watch: Watch) -> list[Path]:
    """Write the adapter, the figures and the page, and say whose step it is and which programs read the files; the paths."""
    from diffpeft.train import dreambooth
    from diffpeft.train.save import earlier_files

    watch.phase("writing")
    out = Path(run.config.out or "")  # as it was typed
    files = [*dreambooth.save(run), out / METRICS]
    if run.best:
        watch.note(f"the adapter is that of step {run.best.step}: {run.best.reason}")
    for name, text in dreambooth.readers(run, files).items():
        watch.note(f"{name}: {text}")
    for name in earlier_files(run):
        watch.note(f"{name}: of an earlier run, and not written by this one")
    return [*files, out / PAGE]
