"""The prompts of prior preservation without class images: under them the adapter must predict what the frozen base predicts.

They are the class prompt, the blank prompt, and each image's own caption without the trigger; of these one is drawn for each image, by weight.
Imports no torch before one is drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from diffpeft.errors import ConfigError, UnknownNameError, shown
from diffpeft.train.config import TrainConfig
from diffpeft.train.data import Example
from diffpeft.train.data.captions import has_trigger, without_trigger

KINDS = ("class", "blank", "caption")


@dataclass(frozen=True)
class PriorPrompts:
    """The prompts that are asked of the base, {kind: how often}."""

    weights: Mapping[str, float]
    class_prompt: str = ""

    def at(self, example: Example, *key: int | str) -> str:
        """The prompt for a showing of an example, a function of `key`."""
        from diffpeft.train import draw

        place = draw.uniform(*key, "prior") * sum(self.weights.values())
        for kind, weight in self.weights.items():
            place -= weight
            if place < 0:
                return self.prompt(kind, example)
        return self.prompt(kind, example)

    def prompt(self, kind: str, example: Example) -> str:
        """The prompt of a kind. A caption that does not name the subject is what is trained on, and so the blank one stands for it."""
        if kind != "caption":
            return self.class_prompt if kind == "class" else ""
        named = example.trigger is not None and has_trigger(example.caption, example.trigger)
        return without_trigger(example.caption, example.trigger) if named else ""

    def all(self, examples: Iterable[Example]) -> list[str]:
        """Every prompt that may be asked, once."""
        return list(dict.fromkeys(self.prompt(kind, example) for example in examples for kind in self.weights))


def prior_prompts(config: TrainConfig) -> PriorPrompts | None:
    """What a run's prior asks of the base, None if it does not. Raises ConfigError or UnknownNameError."""
    if config.prior != "base":
        return None
    there = {"class": config.class_prompt is not None, "blank": True, "caption": config.trigger is not None}
    said = config.prior_prompts or ",".join(kind for kind in KINDS if there[kind])
    weights = dict(_weight(entry.strip()) for entry in said.split(","))
    for kind in weights:
        if not there[kind]:
            missing = {"class": "class_prompt", "caption": "trigger"}[kind]
            raise ConfigError(
                f"prior_prompts has {kind}, and there is no {missing}", remedy=f"Pass --{missing.replace('_', '-')}."
            )
    return PriorPrompts(weights, config.class_prompt or "")


def _weight(entry: str) -> tuple[str, float]:
    kind, _, text = entry.partition(":")
    UnknownNameError.check("kind of prompt", kind, KINDS)
    try:
        weight = float(text or 1)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise ConfigError(
            f"prior_prompts has {shown(entry)}", remedy="It is KIND:WEIGHT with a weight above 0: class:2,blank:1."
        )
    return kind, weight
