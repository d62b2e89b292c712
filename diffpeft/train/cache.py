"""What does not change while an adapter trains is computed once: latents, and text embeddings if the text encoder is frozen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import Tensor

from diffpeft.families import Conditions, Family
from diffpeft.train.data import Example, framed, stacked
from diffpeft.train.draw import generator

_CHUNK = 8  # images encoded at a time


class Latents:
    """The latents of a data set in memory, kept by example and flip; a draw from the posterior costs two small operations."""

    def __init__(
        self,
        family: Family,
        examples: Sequence[Example],
        size: int,
        flip: bool,
        tick: Callable[[], None] = lambda: None,
    ):
        self.moments: list[list[tuple[Tensor, Tensor]]] = []
        self.frames = [framed(e.path, size) for e in examples]
        for start in range(0, len(examples), _CHUNK):
            images = stacked([e.path for e in examples[start : start + _CHUNK]], size)
            means_stds = [
                family.encode(images.flip(-1) if flipped else images)
                for flipped in ((False, True) if flip else (False,))
            ]
            self.moments += [[(mean[i].cpu(), std[i].cpu()) for mean, std in means_stds] for i in range(len(images))]
            tick()

    def draw(self, index: int, flipped: bool, *key: int | str) -> Tensor:
        """A sample [c, h, w] of an example's posterior, a function of `key`."""
        mean, std = self.moments[index][flipped]
        return mean + std * torch.randn(mean.shape, generator=generator(*key, "posterior"))


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
