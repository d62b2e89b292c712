"""diffpeft verify."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from diffpeft.cli.completion import family_names
from diffpeft.errors import joined

if TYPE_CHECKING:
    from diffpeft.tools.verifying import Verification

UNFIT = 4  # the exit code of a file that is no good for a model


@click.command()
@click.argument("file", metavar="FILE", type=click.Path())
@click.option(
    "-m",
    "--model",
    type=click.Path(),
    help="A diffusers folder, a single file (with --base) or a Hub id. Default: the embedded base.",
)
@click.option("--base", type=click.Path(), help="The folder or Hub id with the configs of a single file.")
@click.option("--family", shell_complete=family_names, help="What FILE is for, if that is not what it looks like.")
@click.option("--values/--no-values", default=True, help="Read the tensors, for NaN, Inf and zeros. Default: yes.")
@click.option("--json", "as_json", is_flag=True, help="Print every field as JSON.")
@click.pass_context
def verify(
    ctx: click.Context,
    file: str,
    model: str | None,
    base: str | None,
    family: str | None,
    values: bool,
    as_json: bool,
) -> None:
    """Say whether an adapter fits a model: layers, sizes, family, numbers. The model's weights are not read.

    The exit code is 0 if it fits and 4 if it does not.

    Example: diffpeft verify style.safetensors -m stable-diffusion-v1-5
    """
    from diffpeft.tools import verifying

    seen = verifying.verify(file, model, base=base, family=family, values=values)
    if as_json:
        click.echo(json.dumps({"fits": seen.fits, **asdict(seen)}, indent=2))
    else:
        _show(seen)
    if not seen.fits:
        ctx.exit(UNFIT)


def _show(seen: Verification) -> None:
    verdict = "fits" if seen.fits else "does not fit"
    click.echo(f"{seen.path} {verdict} {seen.model}")
    click.echo(
        f"  {seen.layers} of {seen.of} layers fit; the file is {seen.family or '?'}, the model {seen.model_family or '?'}"
    )
    for label, kinds in (("wrong", seen.problems), ("note", seen.notes)):
        for kind, details in kinds.items():
            shown = [detail for detail in details if detail]
            count = f"{len(shown)} " if shown else ""
            click.echo(f"  {label}: {count}{kind}" + (f": {joined(shown, 3)}" if shown else ""))
