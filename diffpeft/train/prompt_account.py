"""The account of a run that learns from prompts alone."""

from __future__ import annotations

from dataclasses import dataclass

from diffpeft.errors import shown
from diffpeft.train.concept import Concept
from diffpeft.train.data.account import Account, counted
from diffpeft.train.data.buckets import Size


@dataclass(frozen=True)
class PromptAccount(Account):
    """What a run without images learns from. Its pictures are drawn on the way."""

    concepts: tuple[Concept, ...] = ()

    @property
    def buckets(self) -> dict[Size, int]:
        """{size of pictures: 1}."""
        return {(side, side): 1 for side in self.sizing.resolutions} if self.sizing else {}

    @property
    def pictures(self) -> int:
        """A pass is one picture of each concept."""
        return len(self.concepts)

    @property
    def texts(self) -> dict[str, str]:
        """{prompt: prompt} of all that are read."""
        return {prompt: prompt for concept in self.concepts for prompt in concept}

    def summary(self) -> str:
        """What is learnt."""
        return f"no images, {counted(len(self.concepts), 'concept')}"

    def plan(self) -> list[str]:
        """A line for each concept."""
        return [
            f"{shown(concept.target)} at strength 1 goes from {shown(concept.negative)} to {shown(concept.positive)}"
            for concept in self.concepts
        ]

    def notes(self) -> list[str]:
        """Prompts that are cut."""
        cut = [shown(prompt) for prompt in self.cut or ()]
        return [f"longer than {self.tokens} tokens, and cut there (see --max-length): {', '.join(cut)}"] if cut else []

    def table(self) -> dict[str, object]:
        """The prompts, for a file of measurements."""
        return {
            "concepts": [concept._asdict() for concept in self.concepts],
            "passes": self.steps and self.steps[0] * self.steps[1] / self.pictures,
            "cut": None if self.cut is None else list(self.cut),
        }
