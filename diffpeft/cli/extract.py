"""diffpeft extract."""

from __future__ import annotations

import click

from diffpeft.cli.completion import completed, dtype_names, family_names
from diffpeft.cli.convert import WRITTEN
from diffpeft.cli.merge import show_errors
from diffpeft.cli.options import Finite, overwriting


@click.command()
@click.option(
    "--base",
    required=True,
    type=click.Path(),
    help="The model that was fine-tuned: a diffusers folder or a .safetensors file.",
)
@click.option(
    "--tuned", required=True, type=click.Path(), help="What it has become: a folder or file, also of the other kind."
)
@click.option(
    "-o", "--out", required=True, type=click.Path(), help="The file to write, or the folder of a format that is one."
)
@click.option(
    "--method",
    type=click.Choice(["lora", "lokr", "full"]),
    default="lora",
    show_default=True,
    help="lora: the best of a rank. lokr: the nearest Kronecker product. full: the whole difference, norms and biases too.",
)
@click.option("-r", "--rank", type=int, help="Of each layer's LoRA. Default: 16.")
@click.option(
    "--energy",
    type=Finite(),
    help="Instead of a rank: the share of each difference's squared norm to keep, such as 0.95.",
)
@click.option("--factor", default=8, show_default=True, help="Of a LoKr: the size of its first factor.")
@click.option(
    "--format",
    "format_",
    shell_complete=completed(WRITTEN),
    help="Of OUT. Default: kohya for single files, else diffusers.",
)
@click.option(
    "--dtype",
    shell_complete=dtype_names,
    help="Of the factors. Default: that of the tuned weights.",
)
@click.option("--variant", help="Use the files *.VARIANT.safetensors of folders, for example fp16.")
@click.option("--family", shell_complete=family_names, help="What the models are, if nothing tells it.")
@click.option("--seed", default=0, show_default=True, help="Of the random vectors of the SVD.")
@click.option("--all", "all_", is_flag=True, help="Print every layer, not those with the largest residuals only.")
@overwriting
def extract(
    base: str,
    tuned: str,
    out: str,
    method: str,
    rank: int | None,
    energy: float | None,
    factor: int,
    format_: str | None,
    dtype: str | None,
    variant: str | None,
    family: str | None,
    seed: int,
    all_: bool,
    overwrite: bool,
) -> None:
    """Write what a fine-tuned model has learnt, the difference to its base, as an adapter.

    Memory holds one layer and the adapter. The residual is the share of a difference's norm that the adapter leaves out.

    \b
    Example: diffpeft extract --base stable-diffusion-v1-5 --tuned my-model.safetensors -o mine.safetensors --rank 32
             diffpeft extract --base v1-5.safetensors --tuned my-model.safetensors -o mine.safetensors --energy 0.95
    """
    from diffpeft.cli.errors import naming
    from diffpeft.errors import joined
    from diffpeft.tools import extracting

    with naming(out), click.progressbar(length=1, label="extracting") as bar:

        def told(done: int, total: int) -> None:
            bar.length = total
            bar.update(1)

        report = extracting.extract(
            base,
            tuned,
            out,
            method=method,
            rank=rank,
            energy=energy,
            factor=factor,
            format=format_,
            dtype=dtype,
            variant=variant,
            family=family,
            seed=seed,
            overwrite=overwrite,
            told=told,
        )
    show_errors(report.residuals, report.ranks, all_, "residual")
    if report.not_held:
        click.echo(
            f"warning: {len(report.not_held)} parameters differ and are not held: {joined(report.not_held, 5)}",
            err=True,
        )
    click.echo(
        f"{report.family}, {len(report.residuals)} layers as {method} ({report.format}), {report.equal} are equal, residual {report.residual:.2e}"
    )
    click.echo(report.path)
