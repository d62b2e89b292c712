"""diffpeft diff."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import TYPE_CHECKING

import click

from diffpeft.cli.columns import columns
from diffpeft.cli.completion import family_names
from diffpeft.errors import joined

if TYPE_CHECKING:
    from diffpeft.tools.comparing import DiffReport, Likeness

HEAD = ["", "layers", "cosine", "|a|", "|b|", "|a-b|/|a|"]


@click.command()
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option(
    "-m",
    "--model",
    type=click.Path(exists=True, file_okay=False),
    help="A diffusers folder with the base's weights, for layers of DoRA, rotations and others that depend on them.",
)
@click.option("--layers", is_flag=True, help="A line for each layer, not for each block.")
@click.option("--json", "as_json", is_flag=True, help="Print every number as JSON, layer by layer.")
@click.option("--family", shell_complete=family_names, help="What they are for, if that is not what they look like.")
def diff(a: str, b: str, model: str | None, layers: bool, as_json: bool, family: str | None) -> None:
    """Say how alike two adapters are, by what they do to weights, in whatever formats and methods they are.

    For each block and in total: the cosine of the two changes of the weights, their norms, and the norm of their difference by
    that of the first. Layers that one of them lacks count as zeros there.

    Example: diffpeft diff style.safetensors style-v2.safetensors
    """
    from diffpeft.tools import comparing

    report = comparing.diff(a, b, model=model, family=family)
    if as_json:
        click.echo(json.dumps(_table(report), indent=2))
        return
    parts = report.layers if layers else report.blocks
    rows = [HEAD, *(_row(name, part) for name, part in parts.items()), _row("total", report.total)]
    for line in columns(rows):
        click.echo(line)
    for what, names in (("only a has", report.only_a), ("only b has", report.only_b)):
        if names:
            click.echo(f"{what} {len(names)} layers: {joined(names, 3)}")
    for why, n in Counter(report.left_out.values()).items():
        click.echo(f"{n} layers are left out: {why}")


def _row(name: str, part: Likeness) -> list[str]:
    return [name, str(part.layers), *(f"{x:.4g}" for x in (part.cosine, part.norm_a, part.norm_b, part.relative))]


def _table(report: DiffReport) -> dict[str, object]:
    """What JSON can hold of a report: no number that is not finite."""

    def plain(part: Likeness) -> dict[str, float | None]:
        numbers = {
            "cosine": part.cosine,
            "norm_a": part.norm_a,
            "norm_b": part.norm_b,
            "relative": part.relative,
        }
        return {name: x if math.isfinite(x) else None for name, x in numbers.items()} | {"layers": part.layers}

    return {
        "total": plain(report.total),
        "blocks": {name: plain(part) for name, part in report.blocks.items()},
        "layers": {name: plain(part) for name, part in report.layers.items()},
        "only_a": report.only_a,
        "only_b": report.only_b,
        "left_out": dict(report.left_out),
    }
