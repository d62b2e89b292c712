"""diffpeft sft: its options are the fields of SftConfig."""

from __future__ import annotations

import click

from diffpeft.cli.groups import Grouped
from diffpeft.cli.launch import launched
from diffpeft.cli.options import options_from, options_of
from diffpeft.llm.sft_config import SftConfig
from diffpeft.train import machines


@click.command(cls=Grouped)
@click.argument("config", required=False, type=click.Path(exists=True, dir_okay=False))
@options_of(SftConfig)
def sft(config: str | None, **typed: object) -> int | None:
    """Fine-tune a language model on texts, prompts with answers, or chats.

    CONFIG is a TOML file with the same options by name (rank = 16); what is typed wins. Writes the adapter as a PEFT
    folder, metrics.json and report.html.

    \b
    Example: diffpeft sft -m MODEL -d train.jsonl --heldout test.jsonl -o out
             diffpeft sft examples/llm_sft.toml --quantize nf4
    """
    chosen = options_from(SftConfig, config, typed)
    options = chosen.options

    if (code := launched(options)) is not None:
        return code

    from diffpeft.cli.progress import running
    from diffpeft.llm.sft_check import check

    with running(options) as progress:
        progress.phase("looking at the data")
        checked = check(options, chosen.origins)

        from diffpeft.llm import sft as job
        from diffpeft.train.progress import quiet_bars

        quiet_bars()
        run = job.train(options, progress, checked)
        if not machines.world().main:
            job.save(run)
            return None
        progress.phase("writing")
        files = job.save(run)
    for file in files:
        click.echo(file)
    if options.push_to_hub:
        click.echo(job.push(run))
    return None
