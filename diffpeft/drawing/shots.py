"""What a picture is drawn with. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffpeft.pipeline.prompt import Tag

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Shot:
    """A picture to draw. What is None is the pipeline's own.

    Args:
        cfg: how far it is led away from the negative prompt, where a pipeline has a keyword for that beside `guidance`, else the same.
        scheduler: a name in SAMPLERS.
        images: what a model of edits is to change, what a clip begins with, or else the one picture that is drawn over.
        files: where `images` are read from.
        mask: where that is drawn over: where it is white.
        strength: how much of it is drawn anew, from 0 to 1.
        adapters: those that are on, and how strong, by name; None: those that are.
        where: which line or option says all this.
    """

    prompt: str
    seed: int = 0
    negative: str | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    cfg: float | None = None
    scheduler: str | None = None
    images: tuple[Image, ...] = ()
    files: tuple[str, ...] = ()
    mask: Image | None = None
    strength: float | None = None
    adapters: tuple[tuple[str, float | Tag], ...] | None = None
    where: str = ""

    @property
    def text(self) -> str:
        """The prompt with a tag for each adapter, as A1111 has it."""
        tags = [
            str(strength if isinstance(strength, Tag) else Tag(name, strength, strength))
            for name, strength in self.adapters or ()
        ]
        return " ".join([self.prompt, *tags]).strip()

    def title(self, among: Sequence[Shot]) -> str:
        """What tells it from others: its prompt, its seed."""
        prompt = self.prompt if len({shot.prompt for shot in among}) > 1 else ""
        seed = f"seed {self.seed}" if len({shot.seed for shot in among}) > 1 else ""
        return ", ".join(filter(None, (prompt, seed)))
