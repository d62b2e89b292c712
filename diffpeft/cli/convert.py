"""diffpeft convert."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import click

from diffpeft.cli.completion import completed, dtype_names, family_names
from diffpeft.cli.options import overwriting, place_options

if TYPE_CHECKING:
    from diffpeft.converters.locating import Where

WRITTEN = ("kohya", "kohya-diffusers", "diffusers", "peft", "comfyui", "lycoris", "xlabs", "onetrainer")


@click.command()
@click.argument("source", metavar="IN", type=click.Path())
@click.argument("out", metavar="OUT", type=click.Path())
@click.option(
    "--to",
    required=True,
    shell_complete=completed(WRITTEN),
    help=f"The format: {', '.join(WRITTEN)} (peft is a folder; lycoris holds one component, or in a folder a file for each).",
)
@click.option(
    "--family", shell_complete=family_names, help="What the adapter is for, if that is not what the file looks like."
)
@click.option(
    "--format",
    "format_",
    shell_complete=completed(WRITTEN),
    help="The format of IN, if that is not what it looks like.",
)
@click.option(
    "--dtype",
    shell_complete=dtype_names,
    help="Of the factors: fp64, fp32, fp16 or bf16. Default: as they are stored.",
)
@click.option("--allow", type=click.Choice(["approximate"]), help="Admit a conversion that loses more than rounding.")
@click.option(
    "--embeddings",
    metavar="DIR",
    type=click.Path(file_okay=False),
    help="Write embeddings that IN has along as files of their own, too.",
)
@overwriting
@place_options
def convert(
    source: str,
    out: str,
    to: str,
    family: str | None,
    format_: str | None,
    dtype: str | None,
    allow: str | None,
    embeddings: str | None,
    overwrite: bool,
    **where: Unpack[Where],
) -> None:
    """Write an adapter file in another format.

    Example: diffpeft convert style.safetensors style-comfyui.safetensors --to comfyui
    """
    from diffpeft import converters
    from diffpeft.cli.errors import naming

    path = converters.located(source, **where)
    with naming(out):
        report = converters.convert(
            path, out, to=to, family=family, format=format_, dtype=dtype, allow=allow, overwrite=overwrite
        )
    for warning in report.warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo(
        f"{report.format} to {to}, {report.family}: {len(report.mapped)} keys mapped, {len(report.carried)} carried, {report.level}"
    )
    click.echo(out)
    for file in converters.write_embeddings(path, embeddings) if embeddings else ():
        click.echo(file)
