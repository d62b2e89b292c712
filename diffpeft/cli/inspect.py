"""diffpeft inspect."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

BAR = 30  # characters


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--json", "as_json", is_flag=True, help="Print every field as JSON: one object, or a list for several files."
)
@click.option(
    "--norms", is_flag=True, help="Read the tensors too: norms by block, dead layers, values that are not finite."
)
def inspect(files: tuple[str, ...], as_json: bool, norms: bool) -> None:
    """Say what adapter files are: format, family, methods, ranks, trigger words, and which programs read them.

    Example: diffpeft inspect style.safetensors --norms
    """
    import converters

    found = [converters.inspect(file, norms=norms) for file in files]
    if as_json:
        rows = [_plain(asdict(one)) for one in found]
        click.echo(json.dumps(rows[0] if len(rows) == 1 else rows, indent=2))
        return
    for one in found:
        _show(one)


def _plain(value: Any) -> Any:
    """JSON has no keys but strings, and no NaN."""
    if isinstance(value, dict):
        return {"null" if k is None else str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and value - value != 0 else value


def _show(one: Any) -> None:
    from converters.inspection import by_block, listed_values

    family = one.family or "unknown"
    rows = {
        "format": one.format,
        "family": f"{family} (or {', '.join(one.alternatives)})" if one.alternatives else family,
        "methods": ", ".join(one.methods),
        "layers": f"{one.layers} in {', '.join(one.components)}",
        "ranks": listed_values(one.ranks),
        "alphas": listed_values(one.alphas),
        "size": f"{one.tensors} tensors, {one.bytes / 2**20:.1f} MiB, {', '.join(one.dtypes)}",
        "trigger words": ", ".join(one.trigger_words),
        "read by": ", ".join(one.readable_by),
        "not an adapter's": f"{len(one.carried)} keys, such as {one.carried[0]}" if one.carried else "",
    }
    if one.norms is not None:
        rows["dead layers"] = ", ".join(one.dead[:5]) + (f" and {len(one.dead) - 5} more" if len(one.dead) > 5 else "")
        rows["not finite"] = ", ".join(one.nonfinite[:5])
    click.echo(one.path)
    for name, text in rows.items():
        if text:
            click.echo(f"  {name:17} {text}")
    if one.norms is not None:
        blocks = by_block(one.norms)
        largest = max((n for n in blocks.values() if n == n and n != float("inf")), default=0) or 1
        for block, norm in blocks.items():
            click.echo(
                f"  {block:40} {'█' * round(BAR * min(norm / largest, 1)) if norm == norm else '?':{BAR}} {norm:.3g}"
            )
