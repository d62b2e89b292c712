"""What does not change while an adapter trains is computed once: latents, and text embeddings if the text encoder is frozen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffpeft.families import Family
from diffpeft.train.data import Example, stacked
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
    """Embeddings by prompt, computed when first asked for; `live` ones (the text encoder is being trained) are computed anew each time."""

    def __init__(self, family: Family, live: bool):
        self.family, self.live, self.known = family, live, dict[str, Tensor]()

    def __call__(self, prompts: list[str]) -> Tensor:
        """What the denoiser reads of these prompts, [b, tokens, width]."""
        if self.live:
            return self.family.embed(prompts)
        with torch.no_grad():
            for prompt in dict.fromkeys(prompts):
                if prompt not in self.known:
                    self.known[prompt] = self.family.embed([prompt])[0]
        return torch.stack([self.known[prompt] for prompt in prompts])
