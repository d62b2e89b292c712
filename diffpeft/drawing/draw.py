"""Many pictures of a pipeline: those that differ in prompt and seed alone are one batch, and each is what it would be alone."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from diffpeft.drawing.calls import images_of, led
from diffpeft.drawing.samplers import scheduler_for
from diffpeft.drawing.shots import Shot
from diffpeft.errors import ConfigError, DiffpeftError
from diffpeft.model.mix import Given
from diffpeft.pipeline.adapters import adapters

if TYPE_CHECKING:
    from PIL.Image import Image

    from diffpeft.families.parts import Component, Pipeline

BATCH = 4
_FRAMES = ("num_frames", "frames")
_LEADING = ("guidance_scale", "true_cfg_scale")
_SHOWN = ("control_image", "image")  # the keywords of pictures
_SIDES = 16  # of a picture that is drawn over, for who packs latents by two


def generate(
    pipe: Pipeline,
    prompts: str | Sequence[str],
    *,
    negative: str | None = None,
    seeds: Sequence[int] = (0,),
    steps: int = 25,
    guidance: float | None = None,
    width: int | None = None,
    height: int | None = None,
    scheduler: str | None = None,
    image: Image | None = None,
    mask: Image | None = None,
    strength: float | None = None,
    batch: int = BATCH,
) -> list[Image]:
    """Draw each prompt with each seed, with the adapters that are on: a list of pictures, prompt by prompt.

    Args:
        seeds: of the starting noise: a picture is what `pipe(prompt, generator=torch.Generator("cpu").manual_seed(seed))` draws.
        scheduler: a sampler for these pictures, by a name such as "euler_a" or "dpm++_2m_karras".
        image: what is drawn over, or changed by a model of edits; `mask` is white where.
        strength: how much of `image` is drawn anew, from 0 to 1.
        batch: how many pictures are drawn at once.

    Raises ConfigError for what the pipeline does not take, and UnknownNameError for a sampler that there is not.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    common = Shot("", 0, negative, width, height, steps, guidance, None, scheduler, mask=mask, strength=strength)
    common = replace(common, images=() if image is None else (image,))
    shots = [replace(common, prompt=text, seed=seed) for text in texts for seed in seeds]
    stage = stage_for(pipe, shots)
    pictures = dict(drawn(stage, shots, batch))
    return [pictures[i] for i in range(len(shots))]


def stage_for(pipe: Pipeline, shots: Sequence[Shot]) -> Pipeline:
    """The pipeline that draws these: `pipe`, or with its models the one that draws over pictures. `pipe` needs no weights.

    Raises ConfigError for what it does not take, and UnknownNameError.
    """
    stage = _for_pictures(pipe, shots)
    for scheduler in dict.fromkeys(shot.scheduler for shot in shots if shot.scheduler):
        scheduler_for(stage, scheduler)
    for shot in shots:
        _check(stage, shot)
    return stage


def _for_pictures(pipe: Pipeline, shots: Sequence[Shot]) -> Pipeline:
    """A pipeline that takes the pictures of shots, and a mask if there is one."""
    if not any(shot.images for shot in shots):
        return pipe
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

    masked = any(shot.mask for shot in shots)
    takes = _takes(pipe)
    if "mask_image" in takes if masked else not takes.isdisjoint(_SHOWN):
        return pipe
    auto = AutoPipelineForInpainting if masked else AutoPipelineForImage2Image
    with contextlib.suppress(ValueError):
        return auto.from_pipe(pipe)
    what, option = ("picture with a mask", "--mask") if masked else ("picture", "--image")
    raise ConfigError(f"a {type(pipe).__name__} takes no {what}", remedy=f"Leave {option} out.")


def steps_of(pipe: Pipeline, shot: Shot) -> int:
    """How many denoising steps a picture takes: of one that is drawn over, those that are left."""
    steps = shot.steps or 1
    keyword = inspect.signature(type(pipe).__call__).parameters.get("strength")
    share = (shot.strength or keyword.default) if keyword is not None and shot.images else 1.0
    return max(1, min(int(steps * share), steps))


def _takes(pipe: Pipeline) -> set[str]:
    """The keywords of a pipeline's call."""
    return set(inspect.signature(type(pipe).__call__).parameters)


def _draws_over(pipe: Pipeline) -> bool:
    """Whether a pipeline begins with the noised latents of a picture, one for each picture that it draws."""
    return "strength" in _takes(pipe) and not _takes(pipe).isdisjoint(_SHOWN)


def _check(pipe: Pipeline, shot: Shot) -> None:
    """Raise ConfigError for what a pipeline would not read, and for sizes that it cannot draw."""
    takes, name = _takes(pipe), type(pipe).__name__
    over = _draws_over(pipe)
    leads = not takes.isdisjoint(_LEADING) or getattr(pipe, "guider", None) is not None
    lacks = {
        "negative prompt": shot.negative is not None and "negative_prompt" not in takes,
        "guidance": (shot.guidance, shot.cfg) != (None, None) and not leads,
        "strength of drawing over a picture": shot.strength is not None and not (over and shot.images),
        "mask without a picture": shot.mask is not None and not shot.images,
    }
    if lacking := next((what for what, missing in lacks.items() if missing), None):
        raise ConfigError(f"a {name} takes no {lacking}", where=shot.where, remedy="Leave it out: it would do nothing.")
    if over and len(shot.images) != 1:
        raise ConfigError(f"a {name} draws over one picture, and has {len(shot.images)}", remedy="Pass --image once.")
    _check_numbers(shot)
    _check_sides(pipe, shot)


def _check_numbers(shot: Shot) -> None:
    """Raise ConfigError for a strength of drawing over that is no share, or a guidance that is not finite."""
    if shot.strength is not None and not 0 < shot.strength <= 1:
        raise ConfigError(
            f"strength is {shot.strength:g}",
            where=shot.where,
            remedy="It is above 0, and at most 1: all is drawn anew.",
        )
    if not all(math.isfinite(number) for number in (shot.guidance or 0, shot.cfg or 0)):
        raise ConfigError("the guidance is no finite number", where=shot.where, remedy="Give a number, such as 4.")


def _check_sides(pipe: Pipeline, shot: Shot) -> None:
    """Raise ConfigError for a width or height that latents cannot have."""
    multiple = getattr(pipe, "vae_scale_factor", None) or getattr(pipe, "vae_scale_factor_spatial", None)
    for name, side in (("width", shot.width), ("height", shot.height)):
        if side is not None and isinstance(multiple, int) and side % multiple:
            below = side // multiple * multiple
            near = " or ".join(str(n) for n in (below, below + multiple) if n)
            raise ConfigError(
                f"{name} is {side}", where=shot.where, remedy=f"For this model it is a multiple of {multiple}: {near}."
            )


def drawn(
    pipe: Pipeline,
    shots: Sequence[Shot],
    batch: int = BATCH,
    mix_of: Callable[[Shot], Given | None] = lambda shot: None,
) -> Iterator[tuple[int, Image]]:
    """(number of a shot, its picture) in the order in which they are drawn. Those that differ in prompt, negative prompt and seed alone are batches.

    `mix_of`: how strong the adapters of a shot are, as `set_adapters` takes it; None: as they are.

    Raises ConfigError for what the pipeline refuses to draw, and for what has no room in memory.
    """
    for numbers in _batches(pipe, shots, batch):
        chunk = [shots[i] for i in numbers]
        with _sampled(pipe, chunk[0].scheduler), _mixed(pipe, mix_of(chunk[0])), _told(chunk[0]):
            images = _drawn(pipe, chunk)
        yield from zip(numbers, images, strict=True)


def _batches(pipe: Pipeline, shots: Sequence[Shot], size: int) -> Iterator[list[int]]:
    """The numbers of shots that are drawn at once."""
    groups: list[tuple[Shot, list[int]]] = []
    for i, shot in enumerate(shots):
        key = replace(shot, prompt="", seed=0, negative=None if shot.negative is None else "", where="")
        if not _pads_alike(pipe):
            key = replace(key, prompt=shot.prompt, negative=shot.negative)
        members = next((members for other, members in groups if other == key), None)
        if members is None:
            groups.append((key, [i]))
        else:
            members.append(i)
    for shot, members in groups:
        step = 1 if shot.images and not _draws_over(pipe) else size
        yield from (members[start : start + step] for start in range(0, len(members), step))


def _pads_alike(pipe: Pipeline) -> bool:
    """Whether what a pipeline makes of a prompt does not depend on the others of a batch, as far as is known. Some fill up short ones, and look at that."""
    return any(cls.__name__.startswith(_PADDED) for cls in type(pipe).__mro__)


_PADDED = ("StableDiffusion", "Flux", "Chroma", "HunyuanDiT", "Lumina", "Mochi", "Sana", "Wan", "ZImage")


@contextlib.contextmanager
def _sampled(pipe: Pipeline, scheduler: str | None) -> Iterator[None]:
    """In this block a pipeline has another scheduler."""
    before = pipe.scheduler
    try:
        if scheduler is not None:
            pipe.scheduler = scheduler_for(pipe, scheduler)
        yield
    finally:
        pipe.scheduler = before


def _mixed(pipe: Pipeline, mix: Given | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if mix is None else adapters(pipe, mix)


@contextlib.contextmanager
def _told(shot: Shot) -> Iterator[None]:
    """What a pipeline refuses to draw is a ConfigError, and so is what has no room."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            "the pictures do not fit into the memory of the device",
            where=shot.where,
            remedy="Pass --batch 1, --offload 1, --quantize, or a smaller size.",
        ) from error
    except NameError as error:  # diffusers imports what it may do without, and some pipelines may not
        package = find_spec(error.name) is None if error.name else False
        if not package:
            raise
        raise ConfigError(f"the pipeline needs the package {error.name}", remedy=f"pip install {error.name}") from error
    except ValueError as error:
        if isinstance(error, DiffpeftError):
            raise
        raise ConfigError(
            f"the pipeline refuses: {error}", where=shot.where, remedy="Give this prompt other settings."
        ) from error


def _drawn(pipe: Pipeline, shots: Sequence[Shot]) -> list[Image]:
    """The pictures of a batch; of a model of clips each is one frame."""
    scales, texts = _scales(pipe, shots[0]), _texts(shots)
    generators = [torch.Generator("cpu").manual_seed(shot.seed) for shot in shots]
    steps = {} if shots[0].steps is None else {"num_inference_steps": shots[0].steps}
    with led(pipe, scales) as keywords:
        answer: Component = pipe(
            **texts,
            **steps,
            **_shown(pipe, shots),
            **keywords,
            **{name: 1 for name in _FRAMES if name in _takes(pipe)},
            generator=generators if len(shots) > 1 else generators[0],
            output_type="pil",
        )
    return list(images_of(answer))


def _texts(shots: Sequence[Shot]) -> dict[str, object]:
    """The prompts, and the negative ones: texts for one picture, lists for several."""
    texts: dict[str, object] = {"prompt": [shot.prompt for shot in shots]}
    if shots[0].negative is not None:
        texts["negative_prompt"] = [shot.negative for shot in shots]
    return texts if len(shots) > 1 else {name: text[0] for name, text in texts.items() if isinstance(text, list)}


def _scales(pipe: Pipeline, shot: Shot) -> Mapping[str, object]:
    """How much a picture is led, in keywords."""
    keyword = "true_cfg_scale" if "true_cfg_scale" in _takes(pipe) else "guidance_scale"
    said = {keyword: shot.cfg} if shot.cfg is not None else {}
    return said | ({} if shot.guidance is None else {"guidance_scale": shot.guidance})


def _shown(pipe: Pipeline, shots: Sequence[Shot]) -> dict[str, object]:
    """Pictures and sizes in the keywords of a pipeline."""
    shot, takes = shots[0], _takes(pipe)
    if shot.images and _draws_over(pipe):
        return _drawn_over(takes, shot, len(shots))
    sides = {name: side for name, side in (("width", shot.width), ("height", shot.height)) if side is not None}
    if not shot.images:
        return dict(sides)
    pictures = list(shot.images) if len(shot.images) > 1 else shot.images[0]
    return {_keyword(takes): pictures, **{name: side for name, side in sides.items() if name in takes}}


def _keyword(takes: set[str]) -> str:
    """What a pipeline calls the pictures that it is shown."""
    return next(name for name in _SHOWN if name in takes)


def _drawn_over(takes: set[str], shot: Shot, count: int) -> dict[str, object]:
    """A picture that is drawn over: it has the size that is drawn, and is there for each that is made of it."""
    from PIL import ImageOps

    image = shot.images[0]
    width, height = (max(side // _SIDES * _SIDES, _SIDES) for side in image.size)
    size = (shot.width or width, shot.height or height)
    over: dict[str, object] = {_keyword(takes): [ImageOps.fit(image, size)] * count}
    if shot.mask is not None:
        over["mask_image"] = [ImageOps.fit(shot.mask, size)] * count
    if shot.strength is not None:
        over["strength"] = shot.strength
    return over | {name: side for name, side in zip(("width", "height"), size, strict=True) if name in takes}
