"""What a run draws while it trains: the prompts that options, files and captions ask for. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from diffpeft.drawing.prompts import SamplePrompt, of_line, read
from diffpeft.errors import ConfigError
from diffpeft.train.config import TrainConfig
from diffpeft.train.data.account import Example
from diffpeft.train.data.captions import TRIGGER, with_trigger


def typed_prompts(config: TrainConfig) -> list[SamplePrompt]:
    """The prompts that options and their file ask for. Raises ConfigError or UnknownNameError."""
    said = config.sample_prompt
    typed = [said] if isinstance(said, str) else list(said or ())
    prompts = [of_line(line, "--sample-prompt") for line in typed]
    if config.sample_prompts is not None:
        prompts += read(Path(config.sample_prompts))
    return [_triggered(prompt, config.trigger) for prompt in prompts]


def _triggered(prompt: SamplePrompt, trigger: str | None) -> SamplePrompt:
    """A prompt with the trigger in the place of `[trigger]`. Raises ConfigError if there is none."""
    negative = prompt.negative
    if trigger is None and TRIGGER in prompt.prompt + (negative or ""):
        raise ConfigError(
            f"a prompt holds {TRIGGER}, and nothing says what it stands for",
            where=prompt.where,
            remedy="Pass --trigger, the word that the subject is called by.",
        )
    return replace(
        prompt,
        prompt=with_trigger(prompt.prompt, trigger),
        negative=None if negative is None else with_trigger(negative, trigger),
    )


def prompts_of(config: TrainConfig, captions: Sequence[str]) -> list[SamplePrompt]:
    """All that is drawn: the instance prompt, or what a slider changes, then what was typed, or without any of these a caption. None if nothing is drawn."""
    if config.sample_every == 0:
        return []
    prompts = typed_prompts(config)
    if mains := {with_trigger(text, config.trigger): where for text, where in config.main_prompts().items()}:
        alike = [[p for p in prompts if p.prompt == main] or [SamplePrompt(main, where=mains[main])] for main in mains]
        return [*chain.from_iterable(alike), *(prompt for prompt in prompts if prompt.prompt not in mains)]
    caption = next((caption for caption in captions if caption), "")
    return prompts or [SamplePrompt(caption, where="a caption")]


def with_controls(prompts: Sequence[SamplePrompt], examples: Sequence[Example]) -> list[SamplePrompt]:
    """The prompts, each with control images: its own, or else those of the example with its caption, or of the first that has some."""
    beside = [example for example in examples if example.controls]
    if not beside:
        return list(prompts)
    by_caption = {example.caption: example for example in reversed(beside)}

    def files(prompt: SamplePrompt) -> tuple[str, ...]:
        example = by_caption.get(prompt.prompt, beside[0])
        return prompt.controls or tuple(str(control.path) for control in example.controls)

    return [replace(prompt, controls=files(prompt)) for prompt in prompts]


def check_controls(prompts: Iterable[SamplePrompt], fewest: int, most: int) -> None:
    """Raise ConfigError for control images of a prompt that the model does not read, or without those that it must have."""
    for prompt in prompts:
        if not fewest <= len(prompt.controls) <= most:
            count = str(fewest) if fewest == most else f"{fewest} to {most}"
            raise ConfigError(
                f"there are {len(prompt.controls)} control images with a prompt, and this model reads {count}",
                where=prompt.where,
                remedy="They are --ci FILE, which may be repeated." if most else "Leave --ci out.",
            )
