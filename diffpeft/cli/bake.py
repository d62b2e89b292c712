"""diffpeft bake."""

from __future__ import annotations

import click

from diffpeft.cli.options import rewriting
from diffpeft.errors import ConfigError


@click.command()
@click.option(
    "--blocks",
    multiple=True,
    required=True,
    metavar="lbw=...|PATTERN=WEIGHT",
    help="A preset or numbers of A1111's block weights (lbw=OUTALL, lbw=1,0,0.5,...), or a weight for the layers whose names begin so; may be repeated.",
)
@rewriting
def bake(source: str, out: str, blocks: tuple[str, ...], family: str | None, overwrite: bool) -> None:
    """Write an adapter with weights by block in it, so that strength 1 is what it was with them.

    LoRA, LoHa, LoKr and GLoRA keep their factors' bytes: the weight goes into alpha. A layer of weight 0 is left out. DoRA and
    rotations at another strength are no such adapters, so they are refused.

    \b
    Example: diffpeft bake style.safetensors style-out.safetensors --blocks lbw=OUTALL
             diffpeft bake style.safetensors softer.safetensors --blocks unet.mid_block=0.5 --blocks text_encoder=0
    """
    from diffpeft.cli.errors import naming
    from diffpeft.tools import baking

    pairs = [_pair(text) for text in blocks]
    presets = [text for name, text in pairs if name == "lbw"]
    if len(presets) > 1:
        raise ConfigError("lbw is given twice", remedy="Give one preset, or patterns beside it.")
    weights = {name: _weight(name, text) for name, text in pairs if name != "lbw"}
    with naming(out):
        report = baking.bake(
            source, out, weights, lbw=presets[0] if presets else None, family=family, overwrite=overwrite
        )
    by_weight: dict[float, int] = {}
    for weight in report.weights.values():
        by_weight[weight] = by_weight.get(weight, 0) + 1
    click.echo(", ".join(f"{n} layers of weight {weight:g}" for weight, n in sorted(by_weight.items())))
    if report.dropped:
        click.echo(f"left out {len(report.dropped)} layers of weight 0")
    click.echo(report.path)


def _pair(text: str) -> tuple[str, str]:
    name, equals, weight = text.partition("=")
    if not equals or not name or not weight:
        raise ConfigError(f"--blocks {text!r} has no weight", remedy="For example --blocks unet.mid_block=0.5.")
    return name, weight


def _weight(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"the weight of {name!r} is {text!r}", remedy="It is a number, such as 0.5.") from None
