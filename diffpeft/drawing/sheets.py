"""Pictures side by side with labels: columns above, rows on the left. What would be too large for one file is taken apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_LARGEST = 8192  # pixels a side: what viewers and video cards show
_GAP, _MARGIN = 8, 10
_FONT = (10, 24)  # the smallest and the largest that labels are written in; between them an eighth of a picture is
_WIDEST = 240  # of the labels on the left


@dataclass(frozen=True)
class Sheet:
    """Pictures in rows, all of one size, and what stands beside them. A label may be empty."""

    columns: Sequence[str]
    rows: Sequence[str]
    cells: Sequence[Sequence[Image.Image]]
    title: str = ""


def pieces(sheet: Sheet, largest: int = _LARGEST) -> Iterator[Image.Image]:
    """The pictures of a sheet: one, or several of at most `largest` pixels a side, each with its labels; row by row."""
    width, height = _cell(sheet)
    across = max(1, (largest - _WIDEST) // (width + _GAP))
    down = max(1, (largest - _WIDEST) // (height + _GAP))
    for top in range(0, len(sheet.rows), down):
        for left in range(0, len(sheet.columns), across):
            rows, columns = slice(top, top + down), slice(left, left + across)
            cells = [row[columns] for row in sheet.cells[rows]]
            yield drawn(Sheet(sheet.columns[columns], sheet.rows[rows], cells, sheet.title))


def drawn(sheet: Sheet) -> Image.Image:
    """A sheet as one picture."""
    width, height = _cell(sheet)
    font = ImageFont.load_default(min(max(width // 8, _FONT[0]), _FONT[1]))
    rows = [_wrapped(label, _WIDEST, font) for label in sheet.rows]
    columns = [_wrapped(label, width, font) for label in sheet.columns]
    title = _wrapped(sheet.title, len(columns) * (width + _GAP), font)
    left = max((_size(label, font)[0] + 2 * _MARGIN for label in rows if label), default=0)
    above = max((_size(label, font)[1] + 2 * _MARGIN for label in columns if label), default=0)
    head = _size(title, font)[1] + _MARGIN if title else 0
    size = (left + len(columns) * (width + _GAP) - _GAP, head + above + len(rows) * (height + _GAP) - _GAP)
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)

    def say(x: float, y: float, text: str, anchor: str = "mm") -> None:
        pen.multiline_text((x, y), text, fill="#222", font=font, align="center", anchor=anchor)

    say(left + (size[0] - left) / 2, _MARGIN, title, "ma")
    for c, label in enumerate(columns):
        say(left + c * (width + _GAP) + width / 2, head + above / 2, label)
    for r, label in enumerate(rows):
        y = head + above + r * (height + _GAP)
        say(left / 2, y + height / 2, label)
        for c, cell in enumerate(sheet.cells[r]):
            canvas.paste(cell, (left + c * (width + _GAP), y))
    return canvas


def _cell(sheet: Sheet) -> tuple[int, int]:
    """Width and height that every cell has room in."""
    cells = [cell for row in sheet.cells for cell in row]
    return max(cell.width for cell in cells), max(cell.height for cell in cells)


def _size(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> tuple[int, int]:
    """How much room a text of several lines takes."""
    left, top, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font=font)
    return int(right - left + 1), int(bottom - top + 1)


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """A text in lines of at most a width, where words allow it; a word that is wider is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        while font.getlength(word) > width and len(word) > 1:
            cut = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            lines, word = [*lines, word[:cut]], word[cut:]
        lines.append(word)
    return "\n".join(line for line in lines if line)
