"""The options of a slider: an adapter that is learnt from prompts alone, and what it is told of them. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from diffpeft.errors import ConfigError, WrongBaseError, shown
from diffpeft.train.concept import Concept
from diffpeft.train.config import TrainConfig, option
from diffpeft.train.groups import entries_of

if TYPE_CHECKING:
    from diffpeft.train.data.buckets import Sizing
    from diffpeft.train.prompt_account import PromptAccount

SIGNS = (1.0, -1.0)  # the strengths that are trained, in this order
DRAW_STEPS = 10


def refused_with_controls(where: str) -> WrongBaseError:
    """The error of a slider of a model that draws nothing without a control image."""
    return WrongBaseError(
        "the model draws with control images alone, and a slider has none",
        where=where,
        remedy="Train it on the model that draws from prompts.",
    )


@dataclass(repr=False)
class SliderConfig(TrainConfig):
    """A slider's training run: a TrainConfig without data."""

    COMMAND: ClassVar[str] = "slider"
    EVERY: ClassVar[tuple[float, ...]] = (-2.0, -1.0, 1.0, 2.0)
    FIRST: ClassVar[tuple[float, ...]] = ()
    HAS_DATA: ClassVar[bool] = False

    data: str | Sequence[str] | None = option(None, "None: prompts alone say what is learnt.", data_only=True)
    target: str | None = option(None, "What is changed: a person.")
    positive: str | None = option(None, "What it becomes at strength 1: a smiling person.", needs="target")
    negative: str | None = option(
        None,
        "What it becomes at strength -1: a sad person; default: the opposite of --positive, seen from --target. With --erase, what is there in its "
        "place; default: the blank prompt.",
    )
    erase: str | None = option(
        None, "In the place of --target and --positive: a concept that strength 1 takes away, such as van gogh style."
    )
    preserve: str | Sequence[str] | None = option(
        None,
        "Attributes that shall not change along with it, with commas: man, woman. Each step is one of something with one of them. May be repeated.",
        several="repeated",
    )
    guidance: float = option(
        1.0, "How far strength 1 goes: so many times what tells the positive from the negative prompt.", above=0
    )
    draw_steps: int = option(
        DRAW_STEPS,
        "Denoising steps in which a whole picture would be drawn; a training step draws the part of it down to its level of noise.",
        at_least=1,
    )
    batch_size: int = option(1, "Pictures a pass.", at_least=1)

    def check_values(self) -> None:
        """Beside what all runs check: prompts that say nothing, or the same twice."""
        super().check_values()
        if self.erase is not None and self.target is not None:
            raise ConfigError(
                "erase with target: both say what is changed", remedy="Leave --target and --positive out, or --erase."
            )
        if self.negative is not None and self.erase is None and self.target is None:
            raise ConfigError(
                "negative without target or erase, and so it would do nothing", remedy="Pass --target and --positive."
            )
        if self.preserve is not None and not self.attributes():
            raise ConfigError(
                f"preserve is {shown(self.preserve)}, and so it would do nothing",
                remedy='Pass attributes with commas, "young, old", or leave --preserve out.',
            )
        said = (self.erase, self.negative) if self.erase is not None else (self.positive, self.negative or self.target)
        if None not in said and said[0] == said[1]:
            raise ConfigError(f"both prompts are {shown(str(said[0]))}: nothing tells one from the other")

    def validate(self) -> None:
        """Raise ConfigError also where nothing is said to be learnt."""
        super().validate()
        if self.erase is None and (self.target is None or self.positive is None):
            missing = "target" if self.target is None else "positive"
            raise ConfigError(
                f"--{missing} is missing",
                remedy='Pass --target person --positive "smiling person", or --erase and a concept.',
            )

    def parts(self) -> int:
        """The passes of a step: each picture is learnt at both signs, one after the other."""
        return len(SIGNS) * super().parts()

    def places(self) -> int:
        """The batches of pictures of a step, over all processes."""
        return super().parts()

    def examples(self) -> int:
        """The pictures of a step."""
        return self.batch_size * self.places()

    def concepts(self) -> tuple[Concept, ...]:
        """What is learnt, once for each attribute that is preserved."""
        if self.erase is not None:
            concept = Concept(self.erase, self.negative or "", self.erase)
        else:
            concept = Concept(self.target or "", self.positive or "", self.negative or self.target or "")
        return tuple(map(concept.under, self.attributes())) or (concept,)

    def attributes(self) -> list[str]:
        """What is preserved, each once."""
        said = [self.preserve] if isinstance(self.preserve, str) else self.preserve or ()
        return [*dict.fromkeys(attribute for text in said for attribute in entries_of(text) if attribute)]

    def main_prompts(self) -> dict[str, str]:
        """What is changed, of each concept."""
        return {concept.target: "--erase" if self.erase else "--target" for concept in self.concepts()}

    def account(self, sizing: Sizing | None) -> PromptAccount:
        """The account of its prompts."""
        from diffpeft.train.prompt_account import PromptAccount

        return PromptAccount(Path(), (), {}, sizing=sizing, concepts=self.concepts())
