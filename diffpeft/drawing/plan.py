"""From what a user asks for to the pictures that are drawn: each prompt with each seed, and the adapters that they name. Imports no torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from diffpeft.drawing import axes
from diffpeft.drawing.prompts import SamplePrompt
from diffpeft.drawing.shots import Shot
from diffpeft.errors import ConfigError, UnknownNameError
from diffpeft.pipeline.prompt import Tag, parsed, resolved

Active = tuple[tuple[str, "float | Tag"], ...]  # adapters that are on, and how strong
_END = ".safetensors"


@dataclass
class Shelf:
    """The adapters of all pictures, by the names that prompts, grids and labels call them.

    Args:
        given: the files that are on in each picture, and how strong.
        folder: where the others are that prompts and grids name.
    """

    given: Sequence[tuple[str, float]]
    folder: Path
    files: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for file, _ in self.given:
            self.name_of(file)

    def name_of(self, file: str | Path) -> str:
        """The name of a file, which is put on the shelf: its own without `.safetensors`, and a number if another is called so."""
        stem = Path(file).name.removesuffix(_END) or str(file)
        for name in itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2))):
            if self.files.setdefault(name, str(file)) == str(file):
                return name
        raise AssertionError

    def mix(self, tags: Iterable[Tag]) -> Active:
        """The adapters of a prompt with tags. Raises ConfigError or UnknownNameError."""
        rows = resolved(self.given, tags, self.folder)
        return tuple((self.name_of(file), strength) for file, strength in rows)

    def named(self, text: str) -> tuple[tuple[str, float], ...]:
        """An adapter on an axis: one on the shelf, one in the folder, or a file; none at all for `none`. Raises UnknownNameError."""
        if text == axes.NONE:
            return ()
        file, strength = weighted(text)
        name = file.removesuffix(_END)
        in_folder = {path.name.removesuffix(_END): path for path in sorted(self.folder.glob(f"*{_END}"))}
        if name in self.files:
            return ((name, strength),)
        if name in in_folder or Path(file).exists():
            return ((self.name_of(in_folder.get(name, file)), strength),)
        known = {*self.files, *in_folder, axes.NONE}
        raise UnknownNameError.of("adapter", file, known, f"--grid lora (looked in {self.folder})")


def weighted(text: str) -> tuple[str, float]:
    """FILE[:WEIGHT] -> file and weight."""
    file, colon, weight = text.rpartition(":")
    try:
        return (file, float(weight)) if colon and file else (text, 1.0)
    except ValueError:
        return text, 1.0


def shots_of(prompts: Sequence[SamplePrompt], seeds: Sequence[int], shelf: Shelf, common: Shot) -> list[Shot]:
    """Each prompt with each seed, or with the one that it says itself. What a prompt does not say is as in `common`."""
    shots = []
    for prompt in prompts:
        text, tags = parsed(prompt.prompt)
        if prompt.frames not in (None, 1):
            raise ConfigError(
                f"--f is {prompt.frames}", where=prompt.where, remedy="One frame is drawn: leave --f out."
            )
        shot = replace(
            common,
            prompt=text,
            negative=common.negative if prompt.negative is None else prompt.negative,
            width=prompt.width or common.width,
            height=prompt.height or common.height,
            steps=prompt.steps or common.steps,
            guidance=prompt.guidance if prompt.guidance is not None or prompt.cfg is not None else common.guidance,
            cfg=prompt.cfg,
            files=prompt.controls or ((prompt.image,) if prompt.image else common.files),
            adapters=shelf.mix(tags),
            where=prompt.where,
        )
        shots += [replace(shot, seed=seed) for seed in (seeds if prompt.seed is None else [prompt.seed])]
    return shots
