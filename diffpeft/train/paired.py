"""Measuring on held-out pictures: the losses of every picture at fixed levels with fixed noise, whatever the adapter is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from diffpeft.families import Family
from diffpeft.train.assembly import Assembly
from diffpeft.train.cache import Latents, Prompt, Texts
from diffpeft.train.data import Example, Sizing, View
from diffpeft.train.data.batches import Batches, Shape, Shown
from diffpeft.train.heldout import BANDS, Design
from diffpeft.train.levels import Sampling
from diffpeft.train.objective import Batch, Objective, denoising

KIND = "heldout"
FEW, MANY, ROWS = 2, 8, 64  # draws a band: the least, the most, and the rows that few pictures shall come to together
SHARE = 0.2  # of a run's time that measuring may take, where nothing is said
FORWARD = 1 / 3  # of a training step's time


class HeldoutPictures:
    """The held-out pictures as they are measured: each in its sizes, the middle of it, not mirrored, with its whole caption.

    `latents` and what computes texts are shared with training; `learn` computes what is measured with before the denoiser is loaded.
    """

    def __init__(self, examples: Sequence[Example], sizing: Sizing, seed: int, latents: Latents, offset: float = 0.0):
        self.batches = Batches(examples, sizing, 1, seed, KIND)
        self.assembly = Assembly([self.batches], latents, offset)
        self.pictures = [
            (i, replace(View.centred(e.size, t), frames=e.frames))
            for i, e in enumerate(examples)
            for t in sizing.targets(e.size)
        ]
        self.draws = draws_of(len(self.pictures))

    @property
    def prompts(self) -> list[Prompt]:
        """Their captions, with the control images beside each."""
        examples, controls = self.batches.examples, self.assembly.latents.controls
        return [Prompt(examples[index].caption, controls(examples[index], view)) for index, view in self.pictures]

    def learn(self, tick: Callable[[], None]) -> None:
        """Compute their latents."""
        self.assembly.latents.learn(self.batches.examples, self.pictures, tick)

    def shown(self, picture: int, band: int, number: int) -> Shown:
        """A picture for one of its draws in a band."""
        index, view = self.pictures[picture]
        key = (self.batches.seed, KIND, picture, band, number)
        return Shown(index, view, self.batches.examples[index].caption, key)


def draws_of(pictures: int) -> int:
    """How often each of so many pictures is measured in a band: more where there are few."""
    return min(max(math.ceil(ROWS / (BANDS * max(pictures, 1))), FEW), MANY)


def interval(pictures: int, steps: int, size: int) -> int:
    """How many steps lie between two measurements where nothing is said: ten a run, or less, so that they take no more than a share of its time.

    `size`: the examples of a step.
    """
    predictions = pictures * BANDS * draws_of(pictures)
    return max(math.ceil(steps / 10), math.ceil(predictions * FORWARD / size / SHARE), 1)


@dataclass
class Paired:
    """The losses of held-out pictures under a family's denoiser.

    Args:
        batch_size: predictions a pass.
        tick: called after each pass.
    """

    family: Family
    pictures: HeldoutPictures
    texts: Texts
    sampling: Sampling
    objective: Objective
    batch_size: int
    tick: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        low, high = self.sampling.span
        self.edges = torch.linspace(low, high, BANDS + 1, dtype=torch.float64)
        self.known: dict[tuple[int, ...], Tensor] = {}  # {size of latents: the arguments at the edges}

    def arguments(self, shape: Sequence[int]) -> Tensor:
        """The arguments [bands + 1] of the run's quantile function at the edges of the bands, for latents [b, c, *size] of this shape."""
        key = tuple(shape[2:])
        if key not in self.known:
            self.known[key] = self.sampling.arguments(self.edges, shape)
        return self.known[key]

    def design(self) -> Design:
        """Which pictures are whose, and how probable the bands are."""
        examples, latents = self.pictures.batches.examples, self.pictures.assembly.latents
        shapes = [(1, *latents(examples[index], view).mean.shape) for index, view in self.pictures.pictures]
        weights = torch.stack([self.arguments(shape).diff() for shape in shapes])
        weights /= weights.sum(1, keepdim=True)
        images = np.array([index for index, _ in self.pictures.pictures])
        return Design(images, weights.numpy(), self.edges.numpy())

    @torch.no_grad()
    def __call__(self) -> np.ndarray:
        """The losses [p, bands, draws] in float64, with the adapters as they are."""
        losses = np.zeros((len(self.pictures.pictures), BANDS, self.pictures.draws))
        for chunk in self._chunks(np.ndindex(*losses.shape)):
            losses[tuple(np.transpose(chunk))] = self._losses(self._batch(chunk), chunk).double().cpu().numpy()
            self.tick()
        return losses

    def _chunks(self, places: np.ndindex) -> list[list[tuple[int, ...]]]:
        """The places (picture, band, draw) in passes of pictures of one size."""
        by_shape: dict[Shape, list[tuple[int, ...]]] = {}
        for place in places:
            index, view = self.pictures.pictures[place[0]]
            by_shape.setdefault(self.pictures.batches.shape(index, view.target), []).append(place)
        size = self.batch_size
        return [same[at : at + size] for same in by_shape.values() for at in range(0, len(same), size)]

    def _batch(self, places: Sequence[tuple[int, ...]]) -> Batch:
        return self.pictures.assembly.batch([(self.pictures.batches, self.pictures.shown(*place)) for place in places])

    def _losses(self, batch: Batch, places: Sequence[tuple[int, ...]]) -> Tensor:
        """The losses [b] of a batch. Draw j of m in a band lies in the j-th of m parts of it, of equal probability, at a place drawn for it."""
        ends = self.arguments(batch.latents.shape)
        bands, numbers = (torch.tensor(column) for column in list(zip(*places, strict=True))[1:])
        within = (numbers + batch.u.double()) / self.pictures.draws
        arguments = ends[bands] + (ends[bands + 1] - ends[bands]) * within
        u = self.sampling.at(arguments, batch.latents.shape).to(batch.u.dtype)
        u = u.clamp(max=1 - torch.finfo(u.dtype).eps)
        batch = replace(batch.to(self.family.parts(self.family.denoiser).device), u=u)
        return denoising(self.family, batch, self.texts(batch.prompts, batch.controls), self.objective)
