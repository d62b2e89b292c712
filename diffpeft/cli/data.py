"""diffpeft data: what a data set holds, without training."""

from __future__ import annotations

import json
from typing import Any

import click

from diffpeft.cli.options import options_of
from diffpeft.train.config import TrainConfig

# the options of `train` that the account depends on
_READ = (
    "model",
    "base",
    "vae",
    "text_encoder",
    "instance_prompt",
    "trigger",
    "mask",
    "control",
    "heldout",
    "resolution",
    "buckets",
    "max_length",
    "batch_size",
    "steps",
    "seed",
    "epochs",
    "frames",
    "fps",
    "extract",
)


@click.group()
def data() -> None:
    """Look at images before training on them."""


@data.command()
@click.argument("folders", nargs=-1, required=True, metavar="DATA...", type=click.Path())
@options_of(TrainConfig, only=_READ)
@click.option("--json", "as_json", is_flag=True, help="Print the counts as JSON.")
def check(folders: tuple[str, ...], as_json: bool, **typed: Any) -> None:
    """Say what training would take from DATA, and what it would pass over.

    DATA are folders and tables as for `train -d`. Files that cannot be read are named all at once. With --model the sizes of pictures are known without
    --resolution, and captions that its tokenizer would cut.

    Example: diffpeft data check photos --resolution 512
    """
    from diffpeft.train.check import account_of

    values = {name: value for name, value in typed.items() if value not in (None, ())}
    account = account_of(TrainConfig(data=folders, **values), steps=not values.keys().isdisjoint(("steps", "epochs")))
    click.echo(json.dumps(account.table(), indent=2) if as_json else account)
