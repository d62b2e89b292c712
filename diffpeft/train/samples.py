"""Samples: what the adapter makes of the run's prompts, drawn at the beginning, every so many steps, and at the end.

Each picture is what the model's own pipeline draws with the adapter loaded, and says in itself what it was drawn with. Strength 0 is the base: it does not
change, and is drawn once.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

import diffpeft
from diffpeft.drawing.calls import images_of, led, watched
from diffpeft.drawing.prompts import SamplePrompt, check_sizes
from diffpeft.errors import ConfigError
from diffpeft.files import Json
from diffpeft.model import schedule
from diffpeft.model.schedule import Schedule
from diffpeft.train.cache import Prompt
from diffpeft.train.data import Example, View
from diffpeft.train.data.account import Control
from diffpeft.train.data.controls import Controls, shown_with
from diffpeft.train.data.footage import pictures_of
from diffpeft.train.data.read import picture
from diffpeft.train.gallery import Gallery, Spot
from diffpeft.train.sample import prompted
from diffpeft.train.signals import asked
from diffpeft.train.team import team

if TYPE_CHECKING:
    from diffpeft.families import Family
    from diffpeft.families.base import Prompted
    from diffpeft.train.cache import Texts
    from diffpeft.train.config import TrainConfig


def settled(
    config: TrainConfig, family: Family, prompts: Sequence[SamplePrompt], side: int
) -> tuple[SamplePrompt, ...]:
    """The prompts with all that is not said of them: sizes of the training resolution, the run's seed and steps, the pipeline's guidance.

    `family` is the model that draws. Raises ConfigError for sizes that it cannot draw, and for settings that it would not read.
    """
    check_sizes(prompts, family.multiple)
    return tuple(_settled(config, family, prompt, side) for prompt in prompts)


def _settled(config: TrainConfig, family: Family, prompt: SamplePrompt, side: int) -> SamplePrompt:
    cfg, guidance = _scales(config, family, prompt)
    return replace(
        prompt,
        negative=_negative(family, prompt, cfg),
        cfg=cfg,
        guidance=guidance,
        width=prompt.width or side,
        height=prompt.height or side,
        seed=config.sample_seed if prompt.seed is None else prompt.seed,
        steps=prompt.steps or config.sample_steps or family.drawing_steps,
        frames=_frames(config, family, prompt),
        image=_image(family, prompt),
    )


def _image(family: Family, prompt: SamplePrompt) -> str | None:
    """The file that a sample begins with. Raises ConfigError where there is none, and for a model that is shown none."""
    if prompt.image is not None and not family.first_frame:
        raise ConfigError(
            "--i, and this model is shown no first frame, and so it would do nothing",
            where=prompt.where,
            remedy="Leave --i out.",
        )
    if prompt.image is not None and not Path(prompt.image).exists():
        raise ConfigError(f"--i is {prompt.image}: there is no such image", where=prompt.where)
    return prompt.image


def _frames(config: TrainConfig, family: Family, prompt: SamplePrompt) -> int | None:
    """How many frames are drawn, as the model can have them: as many as the longest clips that are trained on; None of a model of images.

    Raises ConfigError for frames of such a one.
    """
    if family.temporal is None:
        if prompt.frames is not None:
            raise ConfigError(
                "--f, and this model draws images, and so it would do nothing",
                where=prompt.where,
                remedy="Leave --f out.",
            )
        return None
    count = prompt.frames or max(config.counts(), default=1)
    return (count - 1) // family.temporal * family.temporal + 1


def _negative(family: Family, prompt: SamplePrompt, cfg: float | None) -> str | None:
    """The negative prompt; a blank one where a pipeline that does without, unless it is told otherwise, shall be led away from something.

    Raises ConfigError for one that nothing leads away from.
    """
    takes_one = any(name.startswith("negative_prompt") for name in _keywords(family))
    led_away = cfg is not None and cfg > 1 and takes_one
    if prompt.negative is not None and not led_away:
        raise ConfigError(
            "a negative prompt that nothing leads away from, and so it would do nothing",
            where=prompt.where,
            remedy="Pass --l above 1 with it, or leave it out." if takes_one and cfg is not None else "Leave it out.",
        )
    return "" if led_away and prompt.negative is None and usual(family, "cfg") <= 1 else prompt.negative


_CFG = 7.0  # of a pipeline that has no guidance of its own for every number of steps


def _main(family: Family) -> str:
    """What people mean by the guidance of a model."""
    return "guidance" if "guidance" in family.guidance else "cfg"


def _scales(config: TrainConfig, family: Family, prompt: SamplePrompt) -> tuple[float | None, float | None]:
    """cfg and guidance of a prompt; None for what the model does not read. Raises ConfigError if that was asked for."""
    said = {"cfg": prompt.cfg, "guidance": prompt.guidance}
    if said[_main(family)] is None:
        said[_main(family)] = config.sample_guidance
    for field, flag, lack in _LACKS:
        if said[field] is not None and field not in family.guidance:
            raise ConfigError(
                f"{flag}, and this model {lack}, and so it would do nothing",
                where=prompt.where,
                remedy=f"Leave {flag} out.",
            )
    for field in family.guidance:
        said[field] = usual(family, field) if said[field] is None else said[field]
    return said["cfg"], said["guidance"]


_LACKS = (("cfg", "--l", "is led away from no negative prompt"), ("guidance", "--g", "is told no guidance"))


def usual(family: Family, field: str) -> float:
    """What a family's pipeline, or its guider, has for cfg or guidance where nothing is said."""
    keyword, keywords = family.guidance[field], _keywords(family)
    default = keywords[keyword].default if keyword in keywords else getattr(family.pipe.guider, keyword)
    return _CFG if default is None else float(default)


def _keywords(family: Family) -> Mapping[str, inspect.Parameter]:
    """What a family's pipeline may be asked with."""
    return inspect.signature(type(family.pipe).__call__).parameters


def beside(family: Family, prompt: SamplePrompt) -> Controls:
    """The control images of a settled prompt as a model is shown them: as in training, beside a picture of the size that is drawn."""
    size = (prompt.width or 0, prompt.height or 0)
    controls = tuple(Control(Path(file), picture(Path(file)).size) for file in prompt.controls)
    if family.aligned:
        return Controls(tuple(c.path for c in controls), tuple(View.centred(c.size, size) for c in controls))
    return shown_with(Example(Path(), "", size, controls=controls), View.centred(size, size), family.multiple)


def texts_of(family: Family, prompts: Sequence[SamplePrompt]) -> list[Prompt]:
    """All texts that drawing settled prompts reads: prompts, negative ones, and the blank one, with the control images beside them."""
    texts = [(text, beside(family, p)) for p in prompts for text in (p.prompt, p.negative or "")]
    return list(dict.fromkeys(Prompt(*pair) for pair in texts))


def keywords_of(family: Family, prompt: SamplePrompt) -> Json:
    """A settled prompt in the keywords of the family's pipeline, but for its texts and the noise."""
    scales = {keyword: getattr(prompt, field) for field, keyword in family.guidance.items()}
    keyword = next((name for name in ("num_frames", "frames") if name in _keywords(family)), None)
    frames = {keyword: prompt.frames} if keyword and prompt.frames is not None else {}
    sides = {"width": prompt.width, "height": prompt.height}  # some draw in the size of the image that they are shown
    sides = {name: side for name, side in sides.items() if name in _keywords(family)}
    return {**sides, "num_inference_steps": prompt.steps, **scales, **frames}


def _shown(family: Family, prompt: SamplePrompt, controls: Controls) -> Prompted:
    """What a sample begins with, or its control images, in the keywords of the pipeline."""
    if prompt.image is None:
        return family.pictured(controls.images(), (prompt.width or 0, prompt.height or 0))
    image = pictures_of(Path(prompt.image), [0])[0]
    size = (prompt.width or image.width, prompt.height or image.height)
    return family.pictured([View.centred(image.size, size).of(image)], size)


class Unfinished(Exception):
    """The run was asked to stop in the middle of a picture."""


def drawn(family: Family, texts: Texts, prompt: SamplePrompt, tick: Callable[[], None]) -> list[Image.Image]:
    """The picture of a settled prompt with the adapters that are on, or the frames of a clip. Raises Unfinished."""

    def told(*_: object) -> dict[str, object]:
        tick()
        if team().any(asked()):
            raise Unfinished
        return {}

    controls = beside(family, prompt)
    with torch.no_grad(), led(family.pipe, keywords_of(family, prompt)) as keywords:
        answer = family.pipe(
            **{**prompted(family, texts, [prompt.prompt], prompt.negative, [controls]), **keywords},
            **_shown(family, prompt, controls),
            generator=torch.Generator().manual_seed(prompt.seed or 0),
            output_type="pil",
            **watched(family.pipe, told),
        )
    return [*answer.frames[0]] if prompt.frames else [images_of(answer)[0]]


# -- where it is drawn -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stage(family: Family, name: str) -> Iterator[Family]:
    """The model that is trained as one that draws: its VAE is there, and nothing is dropped or compiled. Afterwards it is as it was."""
    from diffpeft.model.state import slots_of

    absent = [name for name in (*family.viewers, *family.denoisers) if getattr(family.pipe, name) is None]
    denoisers, slots = [family.parts(name) for name in family.denoisers], slots_of(family.pipe, name).values()
    training, compiled = [slot.training for slot in slots], [model._compiled_call_impl for model in denoisers]
    for slot in slots:
        slot.eval()
    for model in denoisers:
        model._compiled_call_impl = None
    try:
        for name in absent:
            family.parts(name)
        yield family
    finally:
        for model, call in zip(denoisers, compiled, strict=True):
            model._compiled_call_impl = call
        for slot, mode in zip(slots, training, strict=True):
            slot.train(mode)
        family.parts.free(*absent)


def begun(strength: float, start: float) -> float | Schedule:
    """A strength that begins after a share of the denoising steps."""
    return schedule.steps({0.0: 0.0, start: strength}) if start else strength


# -- when it is drawn ------------------------------------------------------------------------------------------------------


@dataclass
class Sampler:
    """Draws what is due after so many steps, and writes it. Where the base is sharded, all processes draw and the main one writes.

    Args:
        name: the adapter's.
        texts: what the text encoders of the model that draws made of the prompts.
        stage: makes that model ready, with the adapter on it.
        changes: whether the adapter changes something before the first step, as one that is gone on with does.
    """

    gallery: Gallery
    name: str
    texts: Texts
    stage: Callable[[], contextlib.AbstractContextManager[Family]]
    changes: bool
    from_first: bool
    tick: Callable[[], None] = lambda: None

    def __call__(self, step: int) -> list[Path]:
        """Draw what is due and not there; the files. A run that is asked to stop leaves the pictures that it has not begun."""
        due, files = team().as_said_by_main(self._due(step)), list[Path]()
        if not due:
            return files
        with self.stage() as family, contextlib.suppress(Unfinished):
            for spot in due:
                with diffpeft.adapters(family.pipe, {self.name: begun(spot.strength, self.gallery.start)}):
                    images = drawn(family, self.texts, self.gallery.prompts[spot.number], self.tick)
                if not team().main:
                    continue
                files.append(self.gallery.write(step, spot, images))
                if step == 0 and spot.strength == 0 and not self.changes:
                    files.append(
                        self.gallery.write(step, spot._replace(strength=1.0), images)
                    )  # it changes nothing yet
        return files

    def _due(self, step: int) -> list[Spot]:
        """The base's pictures, once; and each prompt at its strengths."""
        if step == 0 and not self.from_first:
            return []
        numbers, there = range(len(self.gallery.prompts)), self.gallery.pictures().values()
        spots = [Spot(n, 0.0) for n in numbers if not any(Spot(n, 0.0) in pictures for pictures in there)]
        if step or self.changes:
            spots += self.gallery.spots()
        return [spot for spot in spots if not self.gallery.has(step, spot)]
