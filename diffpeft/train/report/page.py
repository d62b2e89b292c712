"""What report.html shows, as plain values, and the page that is made of them: one file, with nothing that is fetched and nothing that runs."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from diffpeft.io import replacing
from diffpeft.train.heldout import Best, HeldoutLoss
from diffpeft.train.report import charts, words
from diffpeft.train.report.thumbnails import data_uri, file_uri

if TYPE_CHECKING:
    import jinja2

REFRESH = 15  # seconds after which an open page looks again, while the run is under way
COLUMNS = 8  # steps whose samples are in the page, at most; all are in the folder
USUAL = "default"  # the origin of an option of which nothing is said


class Status(NamedTuple):
    """How a run is: under way, finished, or ended before its time, with what there is to say of it and the command that goes on."""

    kind: str  # running, finished, stopped or failed
    text: str = ""
    command: str = ""


FINISHED = Status("finished")


class PictureRow(NamedTuple):
    """A row of pictures: what they show, and files, pictures or numbers [h, w, 3]; None for one that is not there."""

    label: str
    pictures: Sequence[Path | Image.Image | np.ndarray | None]


class Pictures(NamedTuple):
    """A table of pictures."""

    heads: Sequence[str]
    rows: Sequence[PictureRow]


class Use(NamedTuple):
    """How a program uses what was written."""

    program: str
    command: str


@dataclass(frozen=True)
class Page:
    """What a page shows. What is empty is left out.

    Args:
        title: of the page.
        total: how many steps the run takes.
        before_after: the same prompts and noise at several strengths.
        samples: the prompts (rows) after so many steps (columns).
        drawn_on: the model that samples are drawn with, where it is another than the one that is trained.
        heldout: the paired losses on held-out pictures, in order.
        measures: {name: {"before", "after"}}, and "standard_error" where there is one.
        answers: rows of prompt, expected, before and after.
        data: the lines of the account of what is trained on.
        options: {name: value} as they came to be.
        origins: {option: where its value is from}.
        defaults: {option: what it is where nothing is said}.
        files: what was written.
        readers: {file: which programs read it}, and for one that was not written, why.
        uses: the commands that use the result.
        rates: the learning rate by step.
        seconds: how long it took until now; per_second: training steps per second; memory: the most bytes that it had.
    """

    title: str
    status: Status = FINISHED
    total: int = 0
    losses: Sequence[float] = ()
    rates: Sequence[float] = ()
    before_after: Pictures | None = None
    samples: Pictures | None = None
    drawn_on: str = ""
    heldout: Sequence[HeldoutLoss] = ()
    best: Best | None = None
    measures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    answers: Sequence[Mapping[str, str]] = ()
    data: Sequence[str] = ()
    options: Mapping[str, object] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, object] = field(default_factory=dict)
    files: Sequence[Path] = ()
    readers: Mapping[str, str] = field(default_factory=dict)
    uses: Sequence[Use] = ()
    seconds: float = 0.0
    per_second: float = 0.0
    memory: int = 0

    def write(self, path: Path) -> Path:
        """Write the page as a whole file."""
        with replacing(path) as f:
            f.write(render(self, path.parent).encode(errors="replace"))
        return path


@functools.cache
def _template() -> jinja2.Template:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
    )
    environment.globals |= {"words": words, "charts": charts}
    return environment.get_template("page.html.j2")


def render(page: Page, folder: Path) -> str:
    """The page as text. Links are relative to `folder`, where it will be."""
    chosen, usual = _options(page)
    html: str = _template().render(
        page=page,
        refresh=REFRESH if page.status.kind == "running" else 0,
        renewed=time.strftime("%Y-%m-%d %H:%M:%S"),
        loss=float(charts.smoothed(page.losses)[-1]) if page.losses else None,
        constant_rate=page.rates[0] if len(set(page.rates)) == 1 else None,
        before_after=_shown(page.before_after, folder),
        samples=_shown(_thinned(page.samples), folder),
        left_out=0 if page.samples is None else max(len(page.samples.heads) - COLUMNS, 0),
        said_options=chosen,
        usual=usual,
        files=[(link(file, folder), file.name, page.readers.get(file.name, "")) for file in page.files],
        missing={n: why for n, why in page.readers.items() if n not in {file.name for file in page.files}},
    )
    return html


def _options(page: Page) -> tuple[list[tuple[str, object, str]], list[tuple[str, object]]]:
    """(name, value, origin) of the options that somebody said or that came to something, and (name, value) of all others."""
    said = [
        name
        for name, value in page.options.items()
        if page.origins.get(name, USUAL) != USUAL
        or (value is not None and value is not False and value != page.defaults.get(name))
    ]
    others = [(name, value) for name, value in page.options.items() if name not in said]
    return [(name, page.options[name], page.origins.get(name, "")) for name in said], others


def _thinned(samples: Pictures | None) -> Pictures | None:
    """At most so many columns, the first and the last among them."""
    if samples is None or len(samples.heads) <= COLUMNS:
        return samples
    places = np.linspace(0, len(samples.heads) - 1, COLUMNS).round().astype(int).tolist()
    rows = [PictureRow(row.label, [row.pictures[place] for place in places]) for row in samples.rows]
    return Pictures([samples.heads[place] for place in places], rows)


class Cell(NamedTuple):
    """A picture in the page, and the file that it is of, if it is."""

    uri: str
    link: str


def _shown(pictures: Pictures | None, folder: Path) -> tuple[Sequence[str], list[tuple[str, list[Cell | None]]]] | None:
    """The heads, and each row's label and cells."""
    if pictures is None or not pictures.rows:
        return None
    return pictures.heads, [(row.label, [_cell(source, folder) for source in row.pictures]) for row in pictures.rows]


def _cell(source: Path | Image.Image | np.ndarray | None, folder: Path) -> Cell | None:
    if isinstance(source, Path):
        return Cell(file_uri(source), link(source, folder)) if source.is_file() else None
    return None if source is None else Cell(data_uri(source), "")


def link(file: Path, folder: Path) -> str:
    """A file as the page in `folder` may link to it; nothing for one that is elsewhere."""
    from urllib.parse import quote

    file, folder = file.resolve(), folder.resolve()
    return quote(file.relative_to(folder).as_posix()) if file.is_relative_to(folder) else ""
