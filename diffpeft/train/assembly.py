"""The batches of a run as tensors: examples of both kinds with their latents, noise, levels and captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffpeft.families.latents import spread
from diffpeft.families.prompts import stacked
from diffpeft.train import draw
from diffpeft.train.cache import Latents, Prompt
from diffpeft.train.data.batches import Batches, Shape, Shown
from diffpeft.train.objective import Batch
from diffpeft.train.prior_prompts import PriorPrompts


@dataclass
class Assembly:
    """What makes the batches of a run. `kinds` are the instance images, and the class images if there are any.

    `offset`: the noise of each channel has a mean, of this standard deviation. `prior`: what the base is asked, if it is.
    """

    kinds: Sequence[Batches]
    latents: Latents
    offset: float = 0.0
    prior: PriorPrompts | None = None

    def captions(self, steps: range) -> list[str]:
        """The captions of these steps, each once, and the prompts of the prior."""
        captions = [caption for batches in self.kinds for caption in batches.needed(steps)[1]]
        examples = [example for batches in self.kinds for example in batches.examples]
        return list(dict.fromkeys([*captions, *(self.prior.all(examples) if self.prior else ())]))

    def prompts(self, steps: range) -> list[Prompt]:
        """The same, each with the control images beside it where a text encoder looks at them."""
        if not self.latents.family.looking:
            return [Prompt(caption) for caption in self.captions(steps)]
        places = ((batches, shown) for batches in self.kinds for step in steps for shown in batches.at(step))
        return list(dict.fromkeys(prompt for batches, shown in places for prompt in self._prompts(batches, shown)))

    def _prompts(self, batches: Batches, shown: Shown) -> list[Prompt]:
        """What the text encoders are asked for an example at one place."""
        example = batches.examples[shown.index]
        texts = [shown.caption, *(self.prior.all([example]) if self.prior else ())]
        return [Prompt(text, self.latents.controls(example, shown.view)) for text in texts]

    def learn(self, steps: range, tick: Callable[[], None] = lambda: None) -> None:
        """Compute the latents of all that these steps show, and give up the VAE."""
        for batches in self.kinds:
            self.latents.learn(batches.examples, batches.needed(steps)[0], tick)
        self.latents.done()

    def at(self, step: int, part: int = 0, parts: int = 1) -> list[Batch]:
        """The batches of a part of a step: one with instance and class images, or if these are of other sizes one of each."""
        by_shape: dict[Shape, list[tuple[Batches, Shown]]] = {}
        for batches in self.kinds:
            share = batches.size // parts
            for shown in batches.at(step)[part * share : (part + 1) * share]:
                by_shape.setdefault(batches.shape(shown.index, shown.view.target), []).append((batches, shown))
        return [self.batch(places) for places in by_shape.values()]

    def batch(self, places: Sequence[tuple[Batches, Shown]]) -> Batch:
        """What is shown at these places, pictures of one size with control images of the same sizes, as tensors."""
        examples = [batches.examples[shown.index] for batches, shown in places]
        keys = [shown.key for _, shown in places]
        moments = [self.latents(example, shown.view) for example, (_, shown) in zip(examples, places, strict=True)]
        latents = torch.stack([m.draw(*key) for m, key in zip(moments, keys, strict=True)])
        return Batch(
            latents,
            torch.stack([self._noise(latents.shape[1:], key) for key in keys]),
            torch.tensor([draw.uniform(*key, "level") for key in keys]),
            [shown.caption for _, shown in places],
            torch.tensor([batches.kind == "class" for batches, _ in places]),
            [shown.view.frame(example.size) for example, (_, shown) in zip(examples, places, strict=True)],
            _stacked([m.mask for m in moments], latents),
            [self.prior.at(e, *key) for e, key in zip(examples, keys, strict=True)] if self.prior else None,
            stacked([m.conditions for m in moments]),
            [self.latents.controls(example, shown.view) for example, (_, shown) in zip(examples, places, strict=True)],
        )

    def _noise(self, shape: Sequence[int], key: Sequence[int | str]) -> Tensor:
        """The noise [c, *size] of an example."""
        noise = torch.randn(tuple(shape), generator=draw.generator(*key, "noise"))
        if not self.offset:
            return noise
        return noise + self.offset * spread(torch.randn(shape[0], generator=draw.generator(*key, "offset")), noise)


def _stacked(masks: Sequence[Tensor | None], latents: Tensor) -> Tensor | None:
    """The masks of a batch [b, 1, h, w], with ones for those that have none; None if none has."""
    if all(mask is None for mask in masks):
        return None
    whole = latents.new_ones(1, *latents.shape[-2:])
    return torch.stack([whole if mask is None else mask for mask in masks])
