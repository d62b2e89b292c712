"""Pictures: the same prompts and seeds at several strengths, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffpeft.drawing.calls import images_of, led, watched
from diffpeft.families import Conditions, Family
from diffpeft.families.base import Prompted
from diffpeft.families.parts import Pipeline
from diffpeft.train.data.controls import Controls

STRENGTHS = (0.0, 0.5, 1.0)
_CELL, _GAP, _LABEL, _HEAD = 128, 6, 130, 26


def pictures(
    pipe: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    batch: int = 16,
    tick: Callable[[], None] = lambda: None,
    asked: Callable[[list[str]], Mapping[str, object]] = lambda prompts: {"prompt": prompts},
) -> np.ndarray:
    """One image a prompt, [n, h, w, 3] uint8. Each starts from the noise of its seed, whatever the batch size.

    `asked` says prompts in the pipeline's keywords: as texts, or as what its text encoders made of them (`prompted`).
    """

    def told(*_: object) -> dict[str, object]:
        tick()
        return {}

    out = []
    for start in range(0, len(prompts), batch):
        chunk = list(prompts[start : start + batch])
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch]]
        with led(pipe, {"guidance_scale": guidance}) as scales:
            drawn = pipe(
                **asked(chunk),
                num_inference_steps=steps,
                **scales,
                generator=generators,
                output_type="np",
                **watched(pipe, told),
            )
        colours = np.asarray(images_of(drawn))[..., :3]  # some say how opaque they are beside
        out.append((colours * 255).round().astype(np.uint8))
    return np.concatenate(out)


def prompted(
    family: Family,
    texts: Callable[[Sequence[str], Sequence[Controls]], Conditions],
    prompts: Sequence[str],
    negative: str | None = None,
    controls: Sequence[Controls] = (),
) -> Prompted:
    """Prompts, and the negative one of all, as a family's pipeline takes them when its text encoders are not there.

    `controls`: the control images beside each prompt, for text encoders that look at them.
    """
    model = family.parts(family.denoiser)

    def placed(value: object) -> object:
        if isinstance(value, list) and isinstance(value[0], Tensor):
            return [placed(tensor) for tensor in value]
        if not isinstance(value, Tensor):
            return value
        return value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)

    read, away = texts(prompts, controls), texts([negative or ""] * len(prompts), controls)
    keywords = family.prompted(read, away, blank=negative is None)
    return {name: placed(value) for name, value in keywords.items()}


@dataclass(frozen=True)
class Grid:
    """A picture and where in it the cells are: boxes[row][column] = [left, top, right, bottom]."""

    image: Image.Image
    boxes: list[list[list[int]]]


def grid(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[np.ndarray],
    truth: np.ndarray | None = None,
    abreast: int = 2,
) -> Grid:
    """A labelled grid, `abreast` blocks of rows side by side. cells[column][row] are [h, w, 3]; `truth` [row] is one more column without a box."""
    shown = [*cells, truth] if truth is not None else list(cells)
    heads = [*columns, "true target"] if truth is not None else list(columns)
    per = -(-len(rows) // abreast)
    block = _LABEL + len(shown) * (_CELL + _GAP)
    canvas = Image.new("RGB", (min(abreast, len(rows)) * block + _GAP, _HEAD + per * (_CELL + _GAP) + _GAP), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    boxes: list[list[list[int]]] = []
    for r, label in enumerate(rows):
        left, top = (r // per) * block, _HEAD + (r % per) * (_CELL + _GAP)
        draw.multiline_text((left + 8, top + _CELL // 2 - 16), _wrapped(label), fill="#222", font=font)
        boxes.append([])
        for c, column in enumerate(shown):
            x = left + _LABEL + c * (_CELL + _GAP)
            if r % per == 0:
                draw.text((x + _CELL // 2, _HEAD // 2), heads[c], fill="#222", font=font, anchor="mm")
            canvas.paste(Image.fromarray(column[r]).resize((_CELL, _CELL), Image.Resampling.LANCZOS), (x, top))
            if c < len(cells):
                boxes[-1].append([x, top, x + _CELL, top + _CELL])
    return Grid(canvas, boxes)


def _wrapped(text: str, width: int = 17) -> str:
    """A label in at most five lines."""
    lines = [""]
    for word in text.split():
        lines = (
            [*lines[:-1], f"{lines[-1]} {word}".strip()]
            if len(lines[-1]) + len(word) < width
            else [*lines, word[:width]]
        )
    return "\n".join(line for line in lines[:5] if line)
