"""diffpeft sft: its options are the fields of SftConfig."""

from __future__ import annotations

import click

from diffpeft.cli.groups import Grouped
from diffpeft.cli.options import options_from, options_of
from diffpeft.llm.sft_config import SftConfig


@click.command(cls=Grouped)
@click.argument("config", required=False, type=click.Path(exists=True, dir_okay=False))
@options_of(SftConfig)
def sft(config: str | None, **typed: object) -> None:
    """Fine-tune a language model on texts, prompts with answers, or chats.

    CONFIG is a TOML file with the same options by name (rank = 16); what is typed wins. Writes the adapter as a PEFT
    folder, metrics.json and report.html.

    \b
    Example: diffpeft sft -m MODEL -d train.jsonl --heldout test.jsonl -o out
             diffpeft sft examples/llm_sft.toml --quantize nf4
    """
    options = options_from(SftConfig, config, typed).options

    from diffpeft.cli.progress import Progress
    from diffpeft.llm.sft_check import check
    from diffpeft.train.lock import occupied
    from diffpeft.train.signals import ending

    with ending(), Progress() as progress, occupied(options.output()):
        progress.phase("looking at the data")
        checked = check(options)

        from diffpeft.cli.errors import quiet_bars
        from diffpeft.llm import sft as job

        quiet_bars()
        run = job.train(options, progress, checked)
        progress.phase("writing")
        files = job.save(run)
    for file in files:
        click.echo(file)
