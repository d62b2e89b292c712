"""diffpeft merge."""

from __future__ import annotations

from collections.abc import Mapping

import click

from diffpeft.cli.completion import completed, dtype_names, family_names
from diffpeft.cli.convert import WRITTEN
from diffpeft.cli.options import Finite, overwriting
from diffpeft.drawing.plan import weighted

HOW = (
    "cat",
    "linear",
    "svd",
    "ties",
    "dare",
    "dare_ties",
    "magnitude",
)  # as in tools/merging.py, which brings torch along
_LISTED = 10  # layers in the table without --all


@click.command()
@click.argument("files", metavar="FILE[:WEIGHT[:lbw=...]]...", nargs=-1, required=True, type=click.Path())
@click.option(
    "-o", "--out", required=True, type=click.Path(), help="The file to write, or the folder of a format that is one."
)
@click.option(
    "--how",
    type=click.Choice(HOW),
    default="cat",
    show_default=True,
    help="cat: exact, ranks add up. linear: the same at its least rank. svd: cut to --rank. The others leave entries out first.",
)
@click.option(
    "-r", "--rank", type=int, help="The most ranks of a layer. Default: of what cuts, the largest among the files."
)
@click.option(
    "--density",
    type=Finite(),
    default=0.5,
    show_default=True,
    help="The share of entries that ties, dare and magnitude keep.",
)
@click.option("--seed", default=0, show_default=True, help="Of what dare leaves out.")
@click.option("--format", "format_", shell_complete=completed(WRITTEN), help="Of OUT. Default: that of the first file.")
@click.option(
    "--dtype",
    shell_complete=dtype_names,
    help="Of the factors: fp64, fp32, fp16 or bf16. Default: one that holds those of all files.",
)
@click.option(
    "--family", shell_complete=family_names, help="What the files are for, if that is not what they look like."
)
@click.option("--all", "all_", is_flag=True, help="Print the error of every layer, not the largest ones only.")
@overwriting
def merge(
    files: tuple[str, ...],
    out: str,
    how: str,
    rank: int | None,
    density: float,
    seed: int,
    format_: str | None,
    dtype: str | None,
    family: str | None,
    all_: bool,
    overwrite: bool,
) -> None:
    """Write one adapter that does what several do together, whatever their formats and methods.

    A weight may be negative; with lbw= it is by block, as in a prompt's tags. The error against the exact sum is printed by layer and in total.

    \b
    Example: diffpeft merge style.safetensors:0.7 person.safetensors:0.5 -o both.safetensors
             diffpeft merge a.safetensors:1:lbw=OUTALL b.safetensors:-0.3 -o c.safetensors --how svd --rank 32
    """
    from diffpeft.cli.errors import naming
    from diffpeft.tools import merging

    with naming(out):
        report = merging.merge(
            [weight_of(text) for text in files],
            out,
            how=how,
            rank=rank,
            density=density,
            seed=seed,
            format=format_,
            dtype=dtype,
            family=family,
            overwrite=overwrite,
        )
    for note in report.notes:
        click.echo(f"warning: {note}", err=True)
    show_errors(report.errors, report.ranks, all_, "error")
    click.echo(
        f"{len(files)} files, {report.family or 'unknown family'}, {report.layers} layers, {how}: "
        f"{report.error:.2e} of the exact sum is lost"
    )
    click.echo(report.path)


def weight_of(text: str) -> tuple[str, float | Mapping[str, float | str]]:
    """FILE[:WEIGHT][:lbw=...] -> file and weight, by block if it says so."""
    front, _, blocks = text.partition(":lbw=")
    file, weight = weighted(front)
    if not blocks:
        return file, weight
    return file, {"lbw": blocks, "weight": weight}


def show_errors(errors: Mapping[str, float], ranks: Mapping[str, int], all_: bool, word: str) -> None:
    """Layers with their ranks and errors, the largest first: all of them, or the first few and how many more there are."""
    rows = sorted(errors.items(), key=lambda row: -row[1])
    for layer, error in rows if all_ else rows[:_LISTED]:
        rank = f"rank {ranks[layer]}" if layer in ranks else ""
        click.echo(f"{word} {error:8.2e}  {rank:9} {layer}")
    if not all_ and len(rows) > _LISTED:
        click.echo(f"and {len(rows) - _LISTED} more with at most {rows[_LISTED][1]:.2e} (--all prints them)")
