"""Class images for prior preservation: what the base draws for the class prompt, kept from run to run with what they were drawn with.

Image i of a folder is class-i.png, drawn from seed + i: which ones are missing does not change the others. class.json beside them says with what;
images of another prompt or model have a folder of their own. Nothing that is there is overwritten, but for an image of ours that is damaged.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from diffpeft.errors import ConfigError, DataError, shown
from diffpeft.io import replacing
from diffpeft.train import data
from diffpeft.train.config import TrainConfig
from diffpeft.train.data.layout import RECORD
from diffpeft.train.data.read import looked_at

if TYPE_CHECKING:
    from diffpeft.families import Family
    from diffpeft.train.cache import Texts

IMAGES, WEIGHT = 100, 1.0  # how many, and how much they count, where nothing is said
STEPS, GUIDANCE = 25, 4.0
CHUNK = {
    "cpu": 1
}  # images drawn at a time; alone each has the same bytes whatever else is missing, and a CPU is hardly slower
_NAME = re.compile(r"class-(\d+)\.png")
_FREE = ("seed", "sampler", "first")  # what the folder's own record says, whatever a run would choose


@dataclass(frozen=True)
class Provenance:
    """What class images are drawn with. `first` is the number of the first one, where a folder had such names before."""

    prompt: str
    model: str
    negative: str | None = None
    steps: int = field(default_factory=lambda: STEPS)
    guidance: float = field(default_factory=lambda: GUIDANCE)
    seed: int | None = None
    sampler: str | None = None
    first: int = 0

    def differences(self, other: Provenance) -> list[str]:
        """What they do not have in common, with both values."""
        mine, theirs = asdict(self), asdict(other)
        return [
            f"{name} {shown(mine[name])} and not {shown(theirs[name])}"
            for name in mine
            if name not in _FREE and mine[name] != theirs[name]
        ]


@dataclass(frozen=True)
class ClassImages:
    """The class images of a run: those that are there, `by_user` the user's own and `drawn` ours by number, and those that are missing."""

    folder: Path
    provenance: Provenance
    by_user: tuple[Path, ...] = ()
    drawn: dict[int, Path] = field(default_factory=dict)
    missing: tuple[int, ...] = ()
    damaged: tuple[Path, ...] = ()

    def paths(self) -> list[Path]:
        """All of them, once those missing have been drawn."""
        return [*self.by_user, *(self.path(i) for i in sorted({*self.drawn, *self.missing}))]

    def path(self, number: int) -> Path:
        """Where image `number` is."""
        return self.folder / _name(number)


def planned(config: TrainConfig) -> ClassImages | None:
    """Which class images a run uses, and which of them are to be drawn; None without a class prompt, or where the base
    itself is asked. Writes nothing, loads nothing.

    Raises ConfigError if the folder's images were drawn for something else, DataError for images of the user's that cannot be read.
    """
    if config.class_prompt is None or config.prior == "base":
        return None
    wanted = Provenance(config.class_prompt, _base(config))
    total = config.num_class_images or IMAGES
    if not config.class_data:
        folders = _numbered(Path(config.out or "") / "class")
        folder = next(f for f in folders if not _others(f, wanted))
        return _in_folder(folder, wanted, total)
    folder = Path(config.class_data)
    if folder.is_file():
        raise DataError(
            "the folder of class images is a file", where=folder, remedy="Pass a folder, which may be empty."
        )
    record = _record(folder)
    if record and (differences := record.differences(wanted)):
        raise ConfigError(
            f"the class images there were drawn with {', '.join(differences)}",
            where=folder,
            remedy="Pass another --class-data, which may be empty, or what they were drawn with.",
        )
    return _in_folder(folder, wanted, total)


def _base(config: TrainConfig) -> str:
    """The model that draws them, with the adapters that are put into it."""
    loras = [config.base_lora] if isinstance(config.base_lora, str) else config.base_lora or ()
    return " with ".join([_identity(str(config.model)), *loras])


def _identity(model: str) -> str:
    path = Path(model)
    return str(path.resolve()) if path.exists() else model


def _numbered(folder: Path) -> Iterator[Path]:
    """class, class-2, class-3 ..."""
    yield folder
    yield from (folder.with_name(f"{folder.name}-{n}") for n in count(2))


def _others(folder: Path, wanted: Provenance) -> bool:
    """Whether a folder's images were drawn for something else, or nobody knows for what."""
    record = _record(folder)
    if record:
        return bool(record.differences(wanted))
    return folder.exists() and (not folder.is_dir() or any(_number(path) is not None for path in folder.iterdir()))


def _record(folder: Path) -> Provenance | None:
    """What the images of a folder were drawn with, if ours are there. Raises DataError if that cannot be read."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        return Provenance(**json.loads(path.read_text(encoding="utf-8-sig")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"cannot read what the class images were drawn with ({error})",
            where=path,
            remedy="Pass another folder with --class-data.",
        ) from error


def _name(number: int) -> str:
    return f"class-{number:04d}.png"


def _number(path: Path) -> int | None:
    """The number of an image that is named as ours are."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match and path.name == _name(int(match[1])) else None


def _in_folder(folder: Path, wanted: Provenance, total: int) -> ClassImages:
    """What of `total` class images a folder has, and what is missing. Raises DataError for images of the user's that cannot be read."""
    record, images = _record(folder), data.images_in(folder) if folder.is_dir() else []
    numbers = {path: number for path in images if (number := _number(path)) is not None}
    provenance = record or replace(wanted, first=max(numbers.values(), default=-1) + 1)
    ours = {number: path for path, number in numbers.items() if record and number >= record.first}
    by_user = tuple(path for path in images if path not in ours.values())[:total]
    data.captioned(by_user, wanted.prompt)
    used = range(provenance.first, provenance.first + total - len(by_user))
    drawn, damaged = _drawn(ours, used)
    missing = tuple(number for number in used if number not in drawn)
    return ClassImages(folder, provenance, by_user, drawn, missing, damaged)


def _drawn(images: Mapping[int, Path], used: Iterable[int]) -> tuple[dict[int, Path], tuple[Path, ...]]:
    """Those of the images with these numbers that can be read, by number, and those that cannot."""
    drawn = {number: images[number] for number in used if number in images}
    damaged = {number: path for number, path in drawn.items() if looked_at(path).error}
    return {number: path for number, path in drawn.items() if number not in damaged}, tuple(damaged.values())


def draw_missing(
    plan: ClassImages, family: Family, seed: int, tick: Callable[[], None], texts: Texts | None = None
) -> ClassImages:
    """Draw and write the images that are missing, each as a whole file; the plan with the seed and the sampler that its folder has.

    `texts` may know the prompt already.
    """
    from PIL import Image

    from diffpeft.train.cache import Texts
    from diffpeft.train.sample import pictures, prompted
    from diffpeft.train.team import team

    known = plan.provenance
    provenance = known if known.seed is not None else replace(known, seed=seed, sampler=_sampler(family))
    plan = replace(plan, provenance=provenance)
    if not plan.missing:
        return plan
    _record_them(plan)  # first: images without it are taken for the user's
    texts = texts or Texts(family)
    family.parts("vae")
    missing = plan.missing[team().rank :: team().size]  # each process draws its share
    devices = [family.parts(name).device.type for name in family.denoisers]
    chunk = CHUNK.get(devices[0], 8)
    for at in range(0, len(missing), chunk):
        numbers = missing[at : at + chunk]
        images = pictures(
            family.pipe,
            [provenance.prompt] * len(numbers),
            [(provenance.seed or 0) + number for number in numbers],
            steps=provenance.steps,
            guidance=provenance.guidance,
            tick=tick,
            asked=functools.partial(prompted, family, texts),
        )
        for number, image in zip(numbers, images, strict=True):
            with replacing(plan.path(number)) as f:
                Image.fromarray(image).save(f, "PNG")
    team().wait()
    return plan


def _record_them(plan: ClassImages) -> None:
    """Write what the images of a folder are drawn with, and wait until it is there."""
    from diffpeft.train.team import team

    if team().main:
        with replacing(plan.folder / RECORD) as f:
            f.write(json.dumps(asdict(plan.provenance), indent=1, ensure_ascii=False).encode())
    team().wait()


def _sampler(family: Family) -> str:
    return type(family.pipe.scheduler).__name__
