"""The pictures of a run on the disk, and what each says of itself.

OUT/samples/step00000500/p0_s42.png is prompt 0 with the noise of seed 42 after 500 steps, at strength 1; p0_s42_w0.5.png is the same at strength 0.5.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffpeft.files import Json
from diffpeft.io import replacing
from diffpeft.train.outputs import SAMPLES
from diffpeft.train.sample_prompts import SamplePrompt

_STEP, _PICTURE = re.compile(r"step(\d{8,})"), re.compile(r"p(\d+)_s(\d+)(?:_w(-?[\d.]+))?\.(?:png|webp)")
_RECORD = "diffpeft"  # the text in a picture that says what it was drawn with; clips have it as EXIF's description
_DESCRIPTION = 0x010E


class Spot(NamedTuple):
    """Which picture one is: the number of its prompt, and the adapter's strength."""

    number: int
    strength: float


def folder_of(out: Path, step: int) -> Path:
    """Where the samples after so many steps are."""
    return out / SAMPLES / f"step{step:08d}"


def _name(spot: Spot, seed: int | None, moves: bool) -> str:
    weight = "" if spot.strength == 1 else f"_w{spot.strength:g}"
    return f"p{spot.number}_s{seed}{weight}.{'webp' if moves else 'png'}"


def _folders(out: Path) -> dict[int, Path]:
    """{step: the folder of its samples}, the earliest first."""
    home = out / SAMPLES
    named = ((_STEP.fullmatch(path.name), path) for path in (home.iterdir() if home.is_dir() else ()))
    return dict(sorted((int(match[1]), path) for match, path in named if match and path.is_dir()))


def newest_samples(out: Path, until: int = sys.maxsize) -> dict[int, Path]:
    """{prompt: its newest picture at strength 1}, of so many steps at most."""
    newest: dict[int, Path] = {}
    for step, folder in reversed(_folders(out).items()):
        for path in sorted(folder.iterdir()) if step <= until else ():
            match = _PICTURE.fullmatch(path.name)
            if match and match[3] is None:
                newest.setdefault(int(match[1]), path)
    return dict(sorted(newest.items()))


def newest_sample(out: Path, until: int = sys.maxsize) -> Path | None:
    """The newest picture at strength 1 of the first prompt, of so many steps at most; None if there is none."""
    return newest_samples(out, until).get(0)


def forget(out: Path, after: int) -> None:
    """Remove the samples of more steps than `after`: they are of a run that did not go on so."""
    for step, folder in _folders(out).items():
        if step > after:
            shutil.rmtree(folder)


def record_of(path: Path) -> Json:
    """The step that a picture was drawn after, and the `facts` that it was drawn with; empty if nobody knows."""
    try:
        with Image.open(path) as image:
            said = image.getexif().get(_DESCRIPTION) if image.format == "WEBP" else image.info.get(_RECORD)
            table = json.loads(said or "{}")  # it stands before the pixels, which are not read
    except (OSError, ValueError, SyntaxError):  # Pillow's word for a PNG that is cut off
        return {}
    return table if isinstance(table, dict) else {}


@dataclass(frozen=True)
class Gallery:
    """The samples of a run on the disk: those of its prompts as they are now.

    Args:
        model: what the pictures are drawn with, for people.
        start: the share of the denoising steps that are the base's alone.
        every: the strengths that each prompt is drawn at beside the base's, and `first` those that the first one is drawn at besides.
        rate: frames a second of clips.
    """

    out: Path
    prompts: tuple[SamplePrompt, ...]
    model: str
    start: float = 0.0
    every: tuple[float, ...] = (1.0,)
    first: tuple[float, ...] = (0.5,)
    rate: float = 16.0

    @property
    def strengths(self) -> list[float]:
        """All strengths, the lowest first."""
        return sorted({0.0, *self.every, *self.first})

    def spots(self) -> list[Spot]:
        """What is drawn with the adapter on."""
        numbers = range(len(self.prompts))
        return [*(Spot(n, strength) for n in numbers for strength in self.every), *(Spot(0, s) for s in self.first)]

    def facts(self, spot: Spot) -> Json:
        """What a picture is drawn with, whatever the step."""
        said = asdict(self.prompts[spot.number])
        said["controls"] = [*said["controls"]]  # as JSON has it
        settings = {name: v for name, v in said.items() if name != "where" and (v or name not in _LATER)}
        start = {"start": self.start} if self.start else {}
        return {**settings, "strength": spot.strength, "model": self.model, **start}

    def path(self, step: int, spot: Spot) -> Path:
        """Where a picture is, or would be."""
        prompt = self.prompts[spot.number]
        return folder_of(self.out, step) / _name(spot, prompt.seed, (prompt.frames or 1) > 1)

    def has(self, step: int, spot: Spot) -> bool:
        """Whether a picture is there, drawn as it would be now."""
        path = self.path(step, spot)
        return path.is_file() and record_of(path).get("facts") == self.facts(spot)

    def pictures(self) -> dict[int, dict[Spot, Path]]:
        """{step: {spot: file}} of all that are there, the earliest step first."""
        spots = [*(Spot(number, 0.0) for number in range(len(self.prompts))), *self.spots()]
        steps = {step: {s: self.path(step, s) for s in spots if self.has(step, s)} for step in _folders(self.out)}
        return {step: pictures for step, pictures in steps.items() if pictures}

    def write(self, step: int, spot: Spot, images: Sequence[Image.Image]) -> Path:
        """Write a picture, or the frames of a clip, as a whole file, which is returned, with what it was drawn with: for us, and as A1111 has it."""
        record = json.dumps({"step": step, "facts": self.facts(spot)})
        with replacing(self.path(step, spot)) as f:
            if len(images) > 1:
                said_of_clip = Image.Exif()
                said_of_clip[_DESCRIPTION] = record
                times = {"duration": round(1000 / self.rate), "loop": 0, "quality": 90}
                images[0].save(f, "WEBP", save_all=True, append_images=images[1:], exif=said_of_clip.tobytes(), **times)
            else:
                said = PngInfo()
                said.add_itxt("parameters", _parameters(self.facts(spot)))
                said.add_itxt(_RECORD, record)
                images[0].save(f, "PNG", pnginfo=said)
        return self.path(step, spot)


def _parameters(facts: Mapping[str, object]) -> str:
    """What a picture was drawn with in the words of A1111, which many programs show."""
    negative = f"\nNegative prompt: {facts['negative']}" if facts["negative"] else ""
    named = {
        "Steps": facts["steps"],
        "CFG scale": facts["cfg"],
        "Distilled CFG Scale": facts["guidance"],
        "Seed": facts["seed"],
        "Size": f"{facts['width']}x{facts['height']}",
        "Model": facts["model"],
        "Adapter strength": facts["strength"],
        "Adapter start": facts.get("start"),
    }
    return f"{facts['prompt']}{negative}\n" + ", ".join(f"{k}: {v}" for k, v in named.items() if v is not None)


_LATER = ("frames", "image", "controls")  # settings that pictures do not say which have none
