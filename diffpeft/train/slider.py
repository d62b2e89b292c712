"""The loss of a slider, which needs no images: the frozen base under other prompts is what is learnt.

With e(x, p) the base's prediction for noised latents x under a prompt p, the adapter at strength s = 1 and s = -1 learns

    e(x, target) + s guidance (e(x, positive) - e(x, negative))

for the target's prompt (Concept Sliders, Gandikota et al. 2023, arXiv:2311.12092; erasing: the same authors, arXiv:2303.07345). All predictions are linear
in the noise and the clean image, and so this means the same for epsilon, v, the clean image and the velocity of a flow. The latents x are what the model
itself comes to with the target's prompt, from pure noise down to the level that is trained, with the adapter at a strength between both signs: there it
will be used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from diffpeft.families import Conditions, Family, Frame, Noised
from diffpeft.families.devices import sent
from diffpeft.families.latents import spread
from diffpeft.pipeline.adapters import set_adapters
from diffpeft.train import draw
from diffpeft.train.concept import Concept
from diffpeft.train.levels import Sampling
from diffpeft.train.objective import Objective
from diffpeft.train.samples import usual
from diffpeft.train.slider_config import SIGNS, SliderConfig, refused_with_controls
from diffpeft.train.start import without
from diffpeft.train.watching import alone

NOISIEST = 1 - 1e-4  # the level that drawing begins at
LEAST_SIGNAL = 1e-3  # that a clean image is read from
CFG = 3.0  # how far drawing is led away from the blank prompt, where a pipeline does that at all


class Canvas(NamedTuple):
    """What pictures of a side are drawn on: (height, width) in pixels, and the shape [c, *size] of their latents."""

    size: tuple[int, int]
    shape: tuple[int, ...]

    def frames(self, count: int) -> list[Frame]:
        """Pictures that were never cropped."""
        return [Frame(self.size, (0, 0), self.size)] * count


class Point(NamedTuple):
    """Where a step learns: noised latents, what the denoiser reads with them, what the base predicts [b, c, *size], and where strength 1 leads from there."""

    noised: Noised
    concepts: list[Concept]
    frames: Conditions
    neutral: Tensor
    direction: Tensor


def canvases(family: Family, sides: Sequence[int]) -> list[Canvas]:
    """What pictures of these sides are drawn on. Uses the VAE, which is given up. Raises WrongBaseError for a model that draws none from prompts alone."""
    if family.controls[0]:
        raise refused_with_controls(type(family.pipe).__name__)
    shapes = [family.encode(torch.zeros(1, 3, side, side))[0].shape[1:] for side in sides]
    family.parts.free("vae")
    return [Canvas((side, side), tuple(shape)) for side, shape in zip(sides, shapes, strict=True)]


def ends(noised: Noised, prediction: Tensor) -> tuple[Tensor, Tensor]:
    """The clean latents and the noise, both [b, c, *size], that a prediction for noised latents comes to."""
    x, sigma = noised.x, spread(noised.sigma.to(noised.x), noised.x)
    if noised.kind == "flow":
        return x - sigma * prediction, x + (1 - sigma) * prediction
    signal = (1 - sigma.square()).sqrt().clamp(min=LEAST_SIGNAL)
    if noised.kind == "v_prediction":
        return signal * x - sigma * prediction, sigma * x + signal * prediction
    if noised.kind == "epsilon":
        return (x - sigma * prediction) / signal, prediction
    return prediction, (x - signal * prediction) / sigma


@dataclass
class SliderLoss:
    """The loss [] of a run by step and part. Each place of a step has two parts, one for each sign, of the same latents; `samplings` says by step how
    its levels are drawn.

    Afterwards the adapter is on at the strength of the last part, since gradients may be computed from layers that are run again; `settle` puts that right.
    """

    config: SliderConfig
    family: Family
    texts: Callable[[Sequence[str]], Conditions]
    canvases: Sequence[Canvas]
    samplings: Callable[[int], Sampling]
    objective: Objective
    device: torch.device
    point: tuple[tuple[int, int], Point] | None = field(default=None, init=False)  # of the last place

    def __post_init__(self) -> None:
        self.name, self.off = self.config.name or "", without(self.config.name or "", self.config.training_adapter)
        away = self.family.guidance.get("cfg") and usual(self.family, "cfg") > 1
        self.cfg = CFG if away else 1.0

    def __call__(self, step: int, part: int) -> Tensor:
        """The share of a part in the loss of a step, which is the mean over its pictures and both signs."""
        place, number = divmod(part, len(SIGNS))
        if self.point is None or self.point[0] != (step, place):
            self.point = (step, place), self.learnt_at(step, place)
        set_adapters(self.family.pipe, self.at(SIGNS[number]))
        return self.loss(self.point[1], SIGNS[number]) / self.config.parts()

    def settle(self) -> None:
        """The adapter is on as everywhere."""
        set_adapters(self.family.pipe, self.at(1.0))

    def at(self, strength: float) -> dict[str, float]:
        """The strengths of what is on."""
        return {**self.off, self.name: strength}

    def loss(self, point: Point, sign: float) -> Tensor:
        """How far the adapter is from what it shall predict at the strength `sign`, which it has. The mean over the pictures []."""
        noised, prompts = point.noised, [concept.target for concept in point.concepts]
        prediction = self.family.predict(noised.x, noised.t, self.texts(prompts) | point.frames)
        error = prediction - (point.neutral + sign * point.direction)
        losses = self.objective.distance(error, noised.snr).flatten(1).mean(1)
        return self.objective.weighted(losses, noised).mean()

    @torch.no_grad()
    def learnt_at(self, step: int, place: int) -> Point:
        """Where a place of a step learns, all draws being functions of the seed, the step and the numbers of its pictures in it."""
        config, count, seed = self.config, self.config.examples(), self.config.seed
        numbers = range(place * config.batch_size, (place + 1) * config.batch_size)
        keys = [(seed, step, "slider", number) for number in numbers]
        concepts = config.concepts()
        order = draw.order(len(concepts), step * count + numbers.start, len(numbers), seed, "concepts")
        canvas = self.canvases[int(draw.uniform(seed, step, "side") * len(self.canvases))]
        noise = torch.stack([torch.randn(canvas.shape, generator=draw.generator(*key, "noise")) for key in keys])
        u = self.samplings(step)(torch.tensor([draw.uniform(*key, "level") for key in keys]), noise.shape)
        strength = 2 * draw.uniform(seed, step, place, "strength") - 1
        shown, frames = [concepts[number] for number in order], self.family.framed(canvas.frames(len(keys)))
        with self._only(strength):
            noised = self.drawn(sent(noise, self.device), u, [concept.target for concept in shown], frames)
        return Point(noised, shown, frames, *self.targets(noised, shown, frames))

    def drawn(self, noise: Tensor, u: Tensor, prompts: Sequence[str], frames: Conditions) -> Noised:
        """The latents that the model comes to at levels u [b], from noise [b, c, *size] and with these prompts, by DDIM's or Euler's steps."""
        levels, start = self.family.levels, torch.full_like(u, NOISIEST)
        end, texts, blank = u.minimum(start), self.texts(prompts), self.texts([""] * len(prompts))
        noised = levels.noised(torch.zeros_like(noise), noise, start)
        count = max(math.ceil(self.config.draw_steps * float(1 - end.min())), 1)
        for number in range(1, count + 1):
            prediction = self.family.predict(noised.x, noised.t, texts | frames)
            if self.cfg != 1:
                away = self.family.predict(noised.x, noised.t, blank | frames)
                prediction = away + self.cfg * (prediction - away)
            noised = levels.noised(*ends(noised, prediction), start + (end - start) * number / count)
        return noised

    def targets(self, noised: Noised, concepts: Sequence[Concept], frames: Conditions) -> tuple[Tensor, Tensor]:
        """What the base predicts under the targets' prompts, and what is added to it at strength 1."""
        columns = [tuple(prompts) for prompts in zip(*concepts, strict=True)]
        with self._only(0.0):
            predicted = {
                prompts: self.family.predict(noised.x, noised.t, self.texts(prompts) | frames)
                for prompts in dict.fromkeys(columns)
            }
        target, positive, negative = (predicted[prompts] for prompts in columns)
        return target, self.config.guidance * (positive - negative)

    def _only(self, strength: float) -> AbstractContextManager[None]:
        """A block in which the adapter is on at a strength, and drops no features."""
        return alone(self.family.pipe, self.name, strength, self.off)
