"""report.html: one self-contained file with the pictures, the loss curve, the options and the files written."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffpeft.io import replacing

_WIDTH, _HEIGHT, _MARGIN, _SCALE = 720, 260, 46, 3


def loss_curve(losses: Sequence[float]) -> Image.Image:
    """The losses by step (pale) and their running mean (dark), drawn large and scaled down so that lines are smooth."""
    image = Image.new("RGB", (_WIDTH * _SCALE, _HEIGHT * _SCALE), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12 * _SCALE)
    values, smooth = np.asarray(losses, dtype=float), _running_mean(losses)
    top = float(np.quantile(values, 0.98)) * 1.1 or 1.0

    def at(step: float, value: float) -> tuple[float, float]:
        x = _MARGIN + step / max(len(values) - 1, 1) * (_WIDTH - _MARGIN - 14)
        return x * _SCALE, (_HEIGHT - 30 - min(value / top, 1) * (_HEIGHT - 44)) * _SCALE

    for tick in np.linspace(0, top, 5):
        draw.line([at(0, tick), at(len(values) - 1, tick)], fill="#e4e4e4", width=_SCALE)
        draw.text((at(0, tick)[0] - 6 * _SCALE, at(0, tick)[1]), f"{tick:.3g}", fill="#666", font=font, anchor="rm")
    for step in np.unique(np.linspace(0, len(values) - 1, 6).astype(int)):
        draw.text((at(step, 0)[0], (_HEIGHT - 14) * _SCALE), str(step + 1), fill="#666", font=font, anchor="mm")
    for series, colour, width in ((values, "#c9d8ee", 1), (smooth, "#1f5fb4", 2)):
        draw.line([at(i, v) for i, v in enumerate(series)], fill=colour, width=width * _SCALE, joint="curve")
    return image.resize((_WIDTH, _HEIGHT), Image.Resampling.LANCZOS)


def _running_mean(losses: Sequence[float]) -> list[float]:
    window = max(len(losses) // 20, 1)
    total = np.concatenate([[0.0], np.cumsum(losses)])
    return [float((total[i + 1] - total[max(0, i + 1 - window)]) / min(i + 1, window)) for i in range(len(losses))]


def data_uri(image: Image.Image) -> str:
    """A picture as a PNG data URI."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write(
    path: Path,
    *,
    title: str,
    losses: Sequence[float],
    options: Mapping[str, object],
    files: Sequence[Path],
    pictures: Image.Image | None = None,
    metrics: Mapping[str, Mapping[str, float]] | None = None,
    answers: Sequence[Mapping[str, str]] = (),
    data: Sequence[str] = (),
    readers: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write the report.

    Args:
        metrics: {name: {"before": number, "after": number}}.
        answers: rows of prompt, expected, before and after.
        data: the lines of the account of what was trained on.
        readers: {file: which programs read it}; a file that was not written, with why.
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8"))
    page = template.render(
        title=title,
        options=options,
        files={f.name: readers.get(f.name, "") for f in files},
        missing={name: why for name, why in readers.items() if name not in {f.name for f in files}},
        data=data,
        metrics=metrics or {},
        answers=answers,
        steps=len(losses),
        curve=data_uri(loss_curve(losses)),
        pictures=data_uri(pictures) if pictures else "",
    )
    with replacing(path) as f:
        f.write(page.encode())
    return path
