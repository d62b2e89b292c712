"""diffpeft doctor."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from diffpeft.cli.columns import columns


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print every field as JSON.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Say what is installed here, what it runs on, and what is in the way.

    The exit code is 1 if something that is needed is missing, too old or in the way.

    Example: diffpeft doctor
    """
    from diffpeft.tools import diagnosis

    seen = diagnosis.doctor()
    if as_json:
        click.echo(json.dumps(asdict(seen), indent=2))
    else:
        rows = [*seen.versions.items(), *seen.device.items()]
        for line in columns([(name, value or "not installed") for name, value in rows]):
            click.echo(line)
        for extra, missing in seen.extras.items():
            lack = f"lacks {', '.join(missing)}: pip install 'diffpeft[{extra}]'" if missing else "all there"
            click.echo(f"extra {extra}: {lack}")
        for label, texts in (("note", seen.notes), ("problem", seen.problems)):
            for text in texts:
                click.echo(f"{label}: {text}")
    if seen.problems:
        ctx.exit(1)
