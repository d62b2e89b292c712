"""A page with the adapters of a folder and their pictures: one file, which loads nothing."""

from __future__ import annotations

import base64
import html
import io as streams
import os
from collections.abc import Iterable
from pathlib import Path

from diffpeft.files import refuse_existing, replacing
from diffpeft.readable import bytes_in_words, ranks_in_words
from diffpeft.tools.listing import THUMBNAIL, AdapterRow, embedded

SIDE = 320  # pixels of a picture, at most
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Adapters</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2rem; background: Canvas; color: CanvasText; color-scheme: light dark }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 1.2rem }}
article {{ border: 1px solid #8884; border-radius: 8px; overflow: hidden; padding-bottom: .6rem }}
article > * {{ margin: .4rem .8rem; overflow-wrap: anywhere }}
img, .none {{ display: block; width: 100%; height: 220px; object-fit: cover; margin: 0; background: #8882 }}
h2 {{ font-size: 1rem }} p {{ font-size: .85rem }} .error {{ color: #c33 }}
</style>
<h1>{count} adapters</h1>
<main>
{cards}
</main>
</html>
"""


def catalogue(rows: Iterable[AdapterRow], out: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a page with a card an adapter: its picture, what it is, its trigger words. Pictures are in the page, made smaller.

    Raises ConfigError if the page is there already, unless it may be overwritten.
    """
    refuse_existing([out], overwrite)
    cards = [_card(row) for row in rows]
    with replacing(out) as f:
        f.write(_PAGE.format(count=len(cards), cards="\n".join(cards)).encode())


def _card(row: AdapterRow) -> str:
    picture = _picture(row)
    shown = f'<img src="{picture}" alt="" loading="lazy">' if picture else '<div class="none"></div>'
    name = html.escape(row.title or Path(row.path).name.removesuffix(".safetensors"))
    facts = [row.family or "unknown family", "+".join(row.methods), ranks_in_words(row.ranks), bytes_in_words(row.size)]
    lines = [
        ", ".join(filter(None, facts)),
        "Trigger words: " + ", ".join(row.trigger_words) if row.trigger_words else "",
        row.path,
    ]
    if row.error:
        lines = [row.error, row.path]
    kind = ' class="error"' if row.error else ""
    return "\n".join(
        ["<article>", shown, f"<h2>{name}</h2>", *(f"<p{kind}>{html.escape(line)}</p>" for line in lines if line)]
        + ["</article>"]
    )


def _picture(row: AdapterRow) -> str:
    """An adapter's picture as a data URL; empty if there is none that can be read."""
    if row.thumbnail == THUMBNAIL:
        return embedded(row.path)
    return smaller(Path(row.thumbnail)) if row.thumbnail else ""


def smaller(path: Path, side: int = SIDE) -> str:
    """A picture as a data URL of a JPEG whose sides are at most `side`; empty for a file that is none."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.thumbnail((side, side))
            memory = streams.BytesIO()
            image.convert("RGB").save(memory, "JPEG", quality=85)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(memory.getvalue()).decode()
