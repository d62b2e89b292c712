"""diffpeft convert."""

from __future__ import annotations

import click

WRITTEN = ("kohya", "kohya-diffusers", "diffusers", "peft", "comfyui", "lycoris", "xlabs", "onetrainer")


@click.command()
@click.argument("source", metavar="IN")
@click.argument("out", metavar="OUT")
@click.option(
    "--to",
    required=True,
    help=f"The format: {', '.join(WRITTEN)} (peft is a folder; lycoris holds one component, or in a folder a file for each).",
)
@click.option("--family", help="What the adapter is for, if that is not what the file looks like.")
@click.option("--format", "format_", help="The format of IN, if that is not what it looks like.")
@click.option("--dtype", help="Of the factors: fp64, fp32, fp16 or bf16. Default: as they are stored.")
@click.option("--allow", type=click.Choice(["approximate"]), help="Admit a conversion that loses more than rounding.")
@click.option("--embeddings", metavar="DIR", help="Write embeddings that IN has along as files of their own, too.")
def convert(
    source: str,
    out: str,
    to: str,
    family: str | None,
    format_: str | None,
    dtype: str | None,
    allow: str | None,
    embeddings: str | None,
) -> None:
    """Write an adapter file in another format.

    Example: diffpeft convert style.safetensors style-comfyui.safetensors --to comfyui
    """
    import converters

    report = converters.convert(source, out, to=to, family=family, format=format_, dtype=dtype, allow=allow)
    for warning in report.warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo(
        f"{report.format} to {to}, {report.family}: {len(report.mapped)} keys mapped, {len(report.carried)} carried, {report.level}"
    )
    click.echo(out)
    for path in converters.write_embeddings(source, embeddings) if embeddings else ():
        click.echo(path)
