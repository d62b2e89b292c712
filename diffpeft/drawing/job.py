"""All that `diffpeft generate` does: what is asked for becomes pictures, which are drawn in batches and written.

What can be wrong is told as early as it can be seen: before torch is imported, before weights are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from diffpeft.drawing import axes, outputs
from diffpeft.drawing.axes import Axis
from diffpeft.drawing.grids import GridPage, on_grid
from diffpeft.drawing.opening import check_device, opened, there
from diffpeft.drawing.plan import Shelf, shots_of, weighted
from diffpeft.drawing.prompts import SamplePrompt, read
from diffpeft.drawing.ranges import whole_numbers
from diffpeft.drawing.samplers import chosen
from diffpeft.drawing.shots import Shot
from diffpeft.errors import ConfigError
from diffpeft.files import refuse_existing, replacing
from diffpeft.pipeline.prompt import Tag, strengths

if TYPE_CHECKING:
    from PIL.Image import Image

    from diffpeft.drawing.account import PictureAccount
    from diffpeft.families.parts import Parts, Pipeline
    from diffpeft.model.mix import Given, Strength

_GUIDANCE = 4.0  # of the embedded base; other pipelines bring theirs


class Asked(TypedDict):
    """What `diffpeft generate` is asked for, by the names of its options."""

    model: str | None
    base: str | None
    prompt: tuple[str, ...]
    prompts: str | None
    negative: str | None
    images: tuple[str, ...]
    mask: str | None
    strength: float | None
    loras: tuple[str, ...]
    lora_dir: str
    out: str
    overwrite: bool
    seed: str
    num: int | None
    batch: int
    steps: int
    guidance: float | None
    width: int | None
    height: int | None
    scheduler: str | None
    grid: str
    singles: str | None
    device: str | None
    dtype: str | None
    quantize: str | None
    offload: float


@dataclass(frozen=True)
class DrawingJob:
    """What is drawn, and where it is written.

    Args:
        adapters: {name: file}; `shots` say which are on.
        pages: grids of them.
        out: a file for each grid if there are such, else for each picture.
        singles: a file for each picture of grids, if these are written too.
    """

    shots: Sequence[Shot]
    adapters: Mapping[str, Path]
    pages: Sequence[GridPage]
    out: Sequence[Path]
    singles: Sequence[Path]


def planned(asked: Asked, picture: Callable[[Path], Image]) -> DrawingJob:
    """What is to be drawn. Adapters' headers and pictures are read, by `picture`, and nothing heavy is imported.

    Raises ConfigError, UnknownNameError, DataError, and what reading adapters and looking for the model raise.
    """
    from diffpeft import converters
    from diffpeft.pipeline.open import check_model

    _check(asked)
    shelf = Shelf([weighted(text) for text in asked["loras"]], Path(asked["lora_dir"]))
    shots, pages = _shots(asked, shelf)
    firsts = [shots[page.numbers[0][0]] for page in pages]
    out = outputs.names_for(asked["out"], firsts or shots)
    singles = outputs.names_for(f"{asked['singles']}/", shots) if asked["singles"] else []
    refuse_existing([*out, *singles], asked["overwrite"])
    check_model(asked["model"], asked["base"])
    adapters = {name: Path(converters.located(file)) for name, file in shelf.files.items()}
    for file in adapters.values():
        converters.read(file, names={})  # the model tells the family where names do not
    images = {file: picture(Path(file)) for file in dict.fromkeys(file for shot in shots for file in shot.files)}
    mask = picture(Path(asked["mask"])).convert("L") if asked["mask"] else None
    shots = [replace(shot, images=tuple(images[file] for file in shot.files), mask=mask) for shot in shots]
    return DrawingJob(shots, adapters, pages, out, singles)


def _check(asked: Asked) -> None:
    """Raise ConfigError or UnknownNameError for options that say nothing, or do nothing as they are."""
    check_device(asked["device"], asked["quantize"])
    if asked["scheduler"] is not None:
        chosen(asked["scheduler"])
    if asked["singles"] and not asked["grid"]:
        raise ConfigError("--singles is for the pictures of a grid", remedy="Leave it out, or pass --grid.")
    if asked["mask"] and not asked["images"]:
        raise ConfigError("--mask is for a picture that is drawn over", remedy="Pass it as --image.")
    if asked["strength"] is not None and not 0 < asked["strength"] <= 1:
        raise ConfigError(
            f"strength is {asked['strength']:g}", remedy="It is above 0, and at most 1: all is drawn anew."
        )


def _shots(asked: Asked, shelf: Shelf) -> tuple[list[Shot], list[GridPage]]:
    """The pictures, and the grids that they are in."""
    common, seeds = _common(asked), _seeds(asked)
    prompts = [SamplePrompt(text, where="--prompt") for text in asked["prompt"]]
    prompts += read(Path(asked["prompts"])) if asked["prompts"] else []
    shots = shots_of(prompts, seeds, shelf, common)
    standing: dict[str, Sequence[object]] = {"prompt": [prompt.prompt for prompt in prompts], "seed": seeds}
    grid = axes.parsed(asked["grid"], standing, shelf.files) if asked["grid"] else []
    texts = [str(value) for axis in grid if axis.kind == "prompt" for value in axis.values]
    if texts and texts != standing["prompt"]:
        if prompts:
            raise ConfigError("the grid has prompts, and so has --prompt", remedy="Write `prompt` alone into the grid.")
        prompts = [SamplePrompt(text, where="--grid prompt") for text in texts]
        shots = shots_of(prompts, seeds, shelf, common)
    if not shots:
        raise ConfigError("nothing says what to draw", remedy='Pass -p "a prompt", or --prompts FILE.')
    if not grid:
        return shots, []
    _check_strengths(grid, shelf)
    by_text = {prompt.prompt: shots_of([prompt], seeds, shelf, common)[0] for prompt in prompts}
    return on_grid(shots, grid, by_text, shelf)


def _common(asked: Asked) -> Shot:
    """What is said of all pictures."""
    embedded = asked["guidance"] is None and asked["model"] is None
    return Shot(
        "",
        negative=asked["negative"],
        width=asked["width"],
        height=asked["height"],
        steps=asked["steps"],
        guidance=_GUIDANCE if embedded else asked["guidance"],
        scheduler=asked["scheduler"],
        files=asked["images"],
        strength=asked["strength"],
    )


def _seeds(asked: Asked) -> list[int]:
    """The seeds that each prompt is drawn with. Raises ConfigError."""
    seeds = whole_numbers(asked["seed"], "--seed")
    if asked["num"] is None:
        return seeds
    if len(seeds) > 1:
        raise ConfigError("--num and several seeds", remedy="Pass one of both.")
    return [*range(seeds[0], seeds[0] + asked["num"])]


def _check_strengths(grid: Sequence[Axis], shelf: Shelf) -> None:
    """Raise ConfigError for a grid of strengths of nothing."""
    kinds = {axis.kind for axis in grid}
    if "strength" in kinds and "lora" not in kinds and not shelf.files:
        raise ConfigError(
            "the grid has strengths, and there is no adapter", remedy="Pass --lora FILE, or add x lora=a,b."
        )


@dataclass(frozen=True)
class ReadyModel:
    """A model that is ready to draw: its pipeline, and its adapters.

    Args:
        loaded: {name of an adapter: what it is called on the model, and its layers}.
    """

    pipe: Pipeline
    family: str | None
    loaded: Mapping[str, tuple[str, Sequence[str]]]

    def mix(self, shot: Shot) -> Given | None:
        """How strong the adapters of a picture are, as `set_adapters` takes it; None if there are none at all."""
        if not self.loaded:
            return None
        rows = ((*self.loaded[name], strength) for name, strength in shot.adapters or ())
        return {name: self._strength(strength, layers, shot) for name, layers, strength in rows}

    def _strength(self, strength: float | Tag, layers: Sequence[str], shot: Shot) -> Strength:
        from diffpeft.drawing.draw import steps_of

        if isinstance(strength, Tag):
            return strengths(strength, self.family, layers, steps_of(self.pipe, shot))
        return strength


def staged(asked: Asked, job: DrawingJob) -> ReadyModel:
    """The model with the adapters of a job. What it cannot draw is told before its weights are loaded.

    Raises ConfigError, UnknownNameError, CheckpointError and its kin, and what `load_lora` raises.
    """
    import diffpeft
    from diffpeft.drawing.draw import stage_for
    from diffpeft.families import family_of
    from diffpeft.model.mix import NAME
    from diffpeft.pipeline.open import default_device, default_dtype

    device = there(asked["device"] or default_device())
    parts = opened(
        asked["model"],
        asked["base"],
        dtype=asked["dtype"] or default_dtype(device),
        device=device,
        quantize=asked["quantize"],
        offload=asked["offload"],
    )
    stage_for(parts.pipe, job.shots)
    _check_tags(parts, job)
    pipe = stage_for(parts.whole(), job.shots)
    pipe.set_progress_bar_config(disable=True)
    loaded = {}
    for i, (name, file) in enumerate(job.adapters.items()):
        report = diffpeft.load_lora(pipe, file, name=name if NAME.fullmatch(name) else f"lora-{i}")
        loaded[name] = (report.name, report.matched)
    return ReadyModel(pipe, family_of(pipe), loaded)


def _check_tags(parts: Parts, job: DrawingJob) -> None:
    """Raise ConfigError or UnknownNameError for weights by block that the model has not."""
    from diffpeft.families import family_of

    for strength in {strength for shot in job.shots for _, strength in shot.adapters or ()}:
        if isinstance(strength, Tag):
            strengths(strength, family_of(parts.pipe))


def written(job: DrawingJob, stage: ReadyModel, account: PictureAccount, batch: int, overwrite: bool) -> Iterator[Path]:
    """Draw the pictures of a job and write them: each file when it is written, grids as soon as they are complete."""
    from diffpeft.drawing.draw import drawn

    waiting: dict[int, Image] = {}
    pages = dict(enumerate(job.pages))
    alone = job.singles if job.pages else job.out
    for i, image in drawn(stage.pipe, job.shots, batch, stage.mix):
        if alone:
            yield _save(alone[i], image, account.text(job.shots[i], image))
        if pages:
            waiting[i] = image
        for n in [n for n, page in pages.items() if all(k in waiting for row in page.numbers for k in row)]:
            yield from _save_page(pages.pop(n), job, n, waiting, account, overwrite)


def _save_page(
    page: GridPage, job: DrawingJob, n: int, waiting: dict[int, Image], account: PictureAccount, overwrite: bool
) -> Iterator[Path]:
    """Write a grid, in pieces if it is too large for one file, and let go of its pictures."""
    from diffpeft.drawing.sheets import Sheet, pieces

    number = page.numbers[0][0]
    text = account.text(job.shots[number], waiting[number], Grid=" x ".join(filter(None, (page.title, *_ends(page)))))
    sheet = Sheet(page.columns, page.rows, [[waiting.pop(i) for i in row] for row in page.numbers], page.title)
    images, path = list(pieces(sheet)), job.out[n]
    files = [path.with_name(f"{path.stem}-{k}{path.suffix}") for k in range(1, len(images) + 1)]
    files = [path] if len(images) == 1 else files
    refuse_existing(files, overwrite or files == [path])
    for file, image in zip(files, images, strict=True):
        yield _save(file, image, text)


def _ends(page: GridPage) -> Iterator[str]:
    """What the columns and the rows of a grid are, from the first to the last."""
    for labels in (page.columns, page.rows):
        if labels[0]:
            yield labels[0] if len(labels) == 1 else f"{labels[0]} ... {labels[-1]}"


def _save(path: Path, image: Image, text: str) -> Path:
    """Write a picture with what it was drawn with."""
    from diffpeft.drawing.infotext import write

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as f:
        write(image, f, path.suffix, text)
    return path
