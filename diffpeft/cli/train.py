"""diffpeft train: its options are the fields of TrainConfig."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from diffpeft.train.config import TrainConfig, from_toml

_SHORT = {"model": "-m", "data": "-d", "out": "-o", "rank": "-r"}
_TYPES = {"int": int, "float": float, "str": str}


def _options(command: Callable[..., None]) -> Callable[..., None]:
    """One option a field. Defaults stay None here, so that what was typed can be told from what was not."""
    for f in reversed(fields(TrainConfig)):
        flag, kind, meta = "--" + f.name.replace("_", "-"), str(f.type).partition(" ")[0], f.metadata
        names = [n for n in (_SHORT.get(f.name), f"{flag}/--no-{flag[2:]}" if kind == "bool" else flag) if n]
        shown = "" if f.default is None or kind == "bool" else f" [default: {f.default}]"
        type_ = None if kind == "bool" else click.Choice(meta["choices"]) if meta["choices"] else _TYPES[kind]
        command = click.option(*names, f.name, type=type_, default=None, help=meta["help"] + shown)(command)
    return command


@click.command()
@click.argument("config", required=False, type=click.Path(exists=True, dir_okay=False))
@_options
def train(config: str | None, **typed: Any) -> None:
    """Train an adapter on your own images, DreamBooth-style.

    CONFIG is a TOML file with the same options by name (rank = 16); what is typed wins.

    Example: diffpeft train -m MODEL -d photos -o out --instance-prompt "a photo of sks dog"
    """
    given = {name: value for name, value in typed.items() if value is not None}
    options = from_toml(config, given) if config else TrainConfig(**given)
    options.validate()

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
