"""What does not change while an adapter trains is computed once: latents, and text embeddings if the text encoder is frozen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from diffpeft.families import Conditions, Family
from diffpeft.train.data import Example, View
from diffpeft.train.data.masks import masked
from diffpeft.train.data.read import numbers, picture
from diffpeft.train.draw import generator


class Moments(NamedTuple):
    """Mean and standard deviation of a view's latents [c, h, w], and how much each place counts [1, h, w], if there is a mask."""

    mean: Tensor
    std: Tensor
    mask: Tensor | None = None

    def draw(self, *key: int | str) -> Tensor:
        """A sample [c, h, w] of the posterior, a function of `key`."""
        return self.mean + self.std * torch.randn(self.mean.shape, generator=generator(*key, "posterior"))


class Latents:
    """The latents of views of images. A draw from the posterior costs two small operations, where they are kept.

    Every view is encoded by itself: what it comes to does not depend on what else a run shows.
    """

    def __init__(self, family: Family, keep: bool = True):
        self.family, self.keep = family, keep
        self.known: dict[tuple[Path, View], Moments] = {}

    def learn(self, examples: Sequence[Example], views: Iterable[tuple[int, View]], tick: Callable[[], None]) -> None:
        """Compute the latents of views (example, view), each image read once."""
        by_example: dict[int, list[View]] = {}
        for index, view in views if self.keep else ():
            if (examples[index].path, view) not in self.known:
                by_example.setdefault(index, []).append(view)
        for index, missing in by_example.items():
            image = picture(examples[index].path)
            for view in missing:
                self.known[examples[index].path, view] = self._encoded(examples[index], view, image)
            tick()

    def _encoded(self, example: Example, view: View, image: Image.Image) -> Moments:
        mean, std = (t[0].cpu() for t in self.family.encode(numbers(view.of(image))[None]))
        return Moments(mean, std, masked(example, view, (mean.shape[-2], mean.shape[-1])))

    def __call__(self, example: Example, view: View) -> Moments:
        """The latents of a view, which are computed if they are not kept."""
        moments = self.known.get((example.path, view))
        return self._encoded(example, view, picture(example.path)) if moments is None else moments


class Texts:
    """What text encoders make of prompts, computed when first asked for; of `live` ones (they are being trained) anew each time."""

    def __init__(self, family: Family, live: Collection[str] = ()):
        self.family, self.live = family, tuple(live)
        self.known: dict[tuple[str, str], Conditions] = {}  # {(encoder, prompt): without the batch's axis}

    def learn(self, prompts: Iterable[str]) -> None:
        """Compute what these prompts need, an encoder after the other, and give up those that are not trained."""
        for encoder in self._frozen():
            self._compute(encoder, prompts)
            self.family.parts.free(encoder)

    def __call__(self, prompts: Sequence[str]) -> Conditions:
        """What the denoiser reads of these prompts, each [b, ...]."""
        conditions: Conditions = {}
        for encoder in self.live:
            conditions |= self.family.embed(encoder, prompts)
        for encoder in self._frozen():
            self._compute(encoder, prompts)
            rows = [self.known[encoder, prompt] for prompt in prompts]
            conditions |= {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return conditions

    def _frozen(self) -> list[str]:
        return [encoder for encoder in self.family.text_encoders if encoder not in self.live]

    @torch.no_grad()
    def _compute(self, encoder: str, prompts: Iterable[str]) -> None:
        for prompt in dict.fromkeys(prompts):
            if (encoder, prompt) not in self.known:
                row = self.family.embed(encoder, [prompt])
                self.known[encoder, prompt] = {name: t[0] for name, t in row.items()}
