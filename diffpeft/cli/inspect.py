"""diffpeft inspect."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Unpack

import click

from diffpeft.cli.columns import printed
from diffpeft.cli.options import place_options
from diffpeft.errors import DiffpeftError, UnreadableFileError, joined
from diffpeft.files import parsed

if TYPE_CHECKING:
    from diffpeft.converters import Inspection
    from diffpeft.converters.locating import Where

BAR = 30  # characters
TAGS = 12  # shown


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path())
@click.option(
    "--json", "as_json", is_flag=True, help="Print every field as JSON: one object, or a list for several files."
)
@click.option(
    "--norms", is_flag=True, help="Read the tensors too: norms by block, dead layers, values that are not finite."
)
@place_options
@click.pass_context
def inspect(ctx: click.Context, files: tuple[str, ...], as_json: bool, norms: bool, **where: Unpack[Where]) -> None:
    """Say what adapter files are: format, family, methods, ranks, trigger words, and which programs read them.

    A FILE may be a folder, whose files are shown, a PEFT folder, or a link to the Hub. One that cannot be read does not hide the others.

    Example: diffpeft inspect style.safetensors --norms
    """
    from diffpeft.cli.errors import show

    tables: list[object] = []
    codes: list[int] = []
    for seen in _each(files, norms, where):
        if isinstance(seen, DiffpeftError):
            show(seen)
            codes.append(seen.exit_code)
        elif as_json:
            tables.append(_plain(asdict(seen)))
        else:
            _show(seen)
    if as_json and (tables or not codes):
        click.echo(json.dumps(tables[0] if len(tables) == 1 and not codes else tables, indent=2))
    if codes:
        ctx.exit(codes[0])


def _each(files: Iterable[str], norms: bool, where: Where) -> Iterator[Inspection | DiffpeftError]:
    """What each file is, or the error that it gives; those of folders one by one."""
    from diffpeft import converters
    from diffpeft.tools.listing import of_argument

    for file in files:
        try:
            paths = [converters.located(file, **where)] if any(where.values()) else of_argument(file)
        except DiffpeftError as error:
            yield error
            continue
        for path in paths:
            try:
                yield converters.inspect(path, norms=norms)
            except DiffpeftError as error:
                yield error
            except OSError as error:
                yield UnreadableFileError(f"cannot read it: {error.strerror or error}", where=path)


def _plain(value: object) -> object:
    """JSON has no keys but strings, and no NaN."""
    if isinstance(value, dict):
        return {"null" if k is None else str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _show(seen: Inspection) -> None:
    """What a file is, a line for each field that says something; norms as bars."""
    click.echo(seen.path)
    for name, text in _rows(seen).items():
        if text:
            click.echo(f"  {name:17} {text}")
    if seen.norms is not None:
        from diffpeft.converters.inspection import by_block

        blocks = by_block(seen.norms)
        largest = max(filter(math.isfinite, blocks.values()), default=0) or 1
        for block, norm in blocks.items():
            bar = "?" if math.isnan(norm) else "█" * round(BAR * min(norm / largest, 1))
            click.echo(f"  {block:40} {bar:{BAR}} {norm:.3g}")


def _rows(seen: Inspection) -> dict[str, str]:
    """{what is said of a file: in words, empty where there is nothing to say}."""
    from diffpeft.converters.inspection import listed_values

    family = seen.family or "unknown"
    rows = {
        "format": seen.format,
        "family": f"{family} (or {', '.join(seen.alternatives)})" if seen.alternatives else family,
        "methods": ", ".join(seen.methods),
        "layers": f"{seen.layers} in {', '.join(seen.components)}",
        "ranks": listed_values(seen.ranks),
        "alphas": listed_values(seen.alphas),
        "size": f"{seen.tensors} tensors, {seen.bytes / 2**20:.1f} MiB, {', '.join(seen.dtypes)}",
        "trigger words": ", ".join(seen.trigger_words),
        "tags": _tags(seen.metadata.get("ss_tag_frequency", "{}")),
        "read by": ", ".join(seen.readable_by),
        "not an adapter's": f"{len(seen.carried)} keys, such as {seen.carried[0]}" if seen.carried else "",
    }
    if seen.dead is not None and seen.nonfinite is not None:
        rows["dead layers"] = joined(seen.dead, 5)
        rows["not finite"] = joined(seen.nonfinite, 5)
    return rows


def _tags(text: str) -> str:
    """The most frequent parts of the captions that an adapter was trained on, of all folders together; empty where the file tells none."""
    try:
        folders = parsed(text)
    except ValueError:
        return ""
    counts: Counter[str] = Counter()
    for tags in folders.values():
        for tag, n in tags.items() if isinstance(tags, dict) else ():
            counts[tag] += n if type(n) is int else 0
    most = [f"{printed(tag)} {n}" for tag, n in counts.most_common(TAGS) if n > 0]
    return ", ".join(most) + (f" and {len(counts) - TAGS} more" if len(counts) > TAGS else "")
