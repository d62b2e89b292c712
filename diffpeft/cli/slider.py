"""diffpeft slider: its options are those of SliderConfig."""

from __future__ import annotations

import click

from diffpeft.cli.groups import Grouped
from diffpeft.cli.options import options_from, options_of
from diffpeft.cli.train import before_a_run, perform
from diffpeft.train.slider_config import SliderConfig


@click.command(cls=Grouped)
@click.argument("config", required=False, type=click.Path(exists=True, dir_okay=False))
@options_of(SliderConfig)
@before_a_run
def slider(config: str | None, print_config: bool, dry_run: bool, as_json: bool, **typed: object) -> int | None:
    """Learn a slider, or erase a concept, from prompts alone.

    CONFIG is a TOML file with the same options by name; what is typed wins. At strength 1 the target becomes what --positive says, at -1 what
    --negative says, and beyond and between more and less so. Writes what diffpeft train writes; the report shows strengths from -2 to 2.

    \b
    Example: diffpeft slider -m MODEL --target person --positive "smiling person" --negative "sad person" -o out
             diffpeft slider -m MODEL --erase "van gogh style" -o out
    """
    chosen = options_from(SliderConfig, config, typed, complete=not print_config)
    return perform(chosen, print_config, dry_run, as_json)
