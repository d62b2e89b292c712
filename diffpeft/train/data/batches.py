"""Which examples make the batch of a step, and how each is shown: functions of (seed, step, place). What a run will need is known before it begins.

All pictures of a batch are of one size, and so are their control images. Those of a size are taken in passes, each in an order of its own, and batches are
always full: the next pass goes on where one ends. After e epochs each example has been shown at least e times for each of its repeats; where the batch size
divides the number of pictures of every size, exactly so often.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from diffpeft.train import draw
from diffpeft.train.data.account import Example
from diffpeft.train.data.buckets import Size, Sizing
from diffpeft.train.data.captions import shuffled
from diffpeft.train.data.controls import sizes_with
from diffpeft.train.data.read import View

# of what is shown of an example: the size of its picture, the number of its frames, and the sizes of its control images
Shape = tuple[Size, int, *tuple[Size, ...]]
CROPS = 5  # places along a side at which a random crop may lie: few, so that latents can be kept


@dataclass(frozen=True)
class Showing:
    """What is left to chance in how examples are shown.

    Args:
        flip: mirror half of them.
        crop: center, or random.
        dropout: the probability of an empty caption.
        shuffle: put the parts of captions between commas in another order, after the `keep` first of them.
    """

    flip: bool = False
    crop: str = "center"
    dropout: float = 0.0
    shuffle: bool = False
    keep: int = 0

    def view(self, example: Example, target: Size, *key: int | str) -> View:
        """How the pixels are shown, a function of `key`."""
        flipped = self.flip and draw.uniform(*key, "flip") < 0.5
        if self.crop == "center":
            return replace(View.centred(example.size, target, flipped), frames=example.frames)
        x, y = (int(draw.uniform(*key, "crop", axis) * CROPS) / (CROPS - 1) for axis in "xy")
        return replace(View.at(example.size, target, x, y, flipped), frames=example.frames)

    def caption(self, example: Example, *key: int | str) -> str:
        """What the caption is, a function of `key`."""
        if draw.uniform(*key, "caption") < self.dropout:
            return ""
        return shuffled(example.caption, self.keep, *key, "shuffle") if self.shuffle else example.caption


@dataclass(frozen=True)
class Shown:
    """An example at one place of one batch: which one, how, and the key (seed, step, kind, place) of all that is drawn for it."""

    index: int
    view: View
    caption: str
    key: tuple[int | str, ...]


@dataclass
class Batches:
    """The batches of a kind of examples, by step."""

    examples: Sequence[Example]
    sizing: Sizing
    size: int  # examples of a step
    seed: int
    kind: str = "instance"
    showing: Showing = field(default_factory=Showing)

    def __post_init__(self) -> None:
        common = math.gcd(*(example.repeats for example in self.examples)) or 1
        by_shape: dict[Shape, list[int]] = {}
        for index, example in enumerate(self.examples):
            for target in self.sizing.targets(example.size):
                by_shape.setdefault(self.shape(index, target), []).extend([index] * (example.repeats // common))
        self.buckets = sorted(by_shape.items())
        self.epochs: dict[int, list[int]] = {}  # the one that was asked for last
        self.known: dict[range, tuple[dict[tuple[int, View], None], dict[str, None]]] = {}  # what was needed, likewise

    def shape(self, index: int, target: Size) -> Shape:
        """The sizes of an example where its picture has a size."""
        example = self.examples[index]
        return (target, max(len(example.frames), 1), *sizes_with(example, target, self.sizing.multiple))

    def at(self, step: int) -> list[Shown]:
        """The batch of a step 0, 1, ...: `size` examples, or none if there are no examples at all."""
        if not self.buckets:
            return []
        bucket, number = self._turn(step)
        (target, *_), indices = self.buckets[bucket]
        places = draw.order(len(indices), number * self.size, self.size, self.seed, self.kind)
        return [
            self._shown(indices[at], target, (self.seed, step, self.kind, place)) for place, at in enumerate(places)
        ]

    def _shown(self, index: int, target: Size, key: tuple[int | str, ...]) -> Shown:
        example = self.examples[index]
        return Shown(index, self.showing.view(example, target, *key), self.showing.caption(example, *key), key)

    def _before(self, bucket: int, epoch: int) -> int:
        """How many batches of a bucket lie before an epoch: as many as it takes to show each of its pictures so often."""
        return -(-epoch * len(self.buckets[bucket][1]) // self.size)

    def start(self, epoch: int) -> int:
        """The first step of an epoch."""
        return sum(self._before(bucket, epoch) for bucket in range(len(self.buckets)))

    def _turn(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and how many batches of it lie before."""
        if len(self.buckets) == 1:
            return 0, step
        epoch = step * self.size // sum(len(indices) for _, indices in self.buckets)
        while self.start(epoch) > step:
            epoch -= 1
        turns, place = self._turns(epoch), step - self.start(epoch)
        bucket = turns[place]
        return bucket, self._before(bucket, epoch) + turns[:place].count(bucket)

    def _turns(self, epoch: int) -> list[int]:
        """The buckets of an epoch's batches in their order."""
        if epoch not in self.epochs:
            counts = [self._before(b, epoch + 1) - self._before(b, epoch) for b in range(len(self.buckets))]
            turns = [bucket for bucket, count in enumerate(counts) for _ in range(count)]
            key = draw.generator(self.seed, self.kind, "buckets", epoch)
            self.epochs = {epoch: [turns[i] for i in torch.randperm(len(turns), generator=key).tolist()]}
        return self.epochs[epoch]

    def needed(self, steps: range) -> tuple[dict[tuple[int, View], None], dict[str, None]]:
        """(example, view) and captions of all batches of these steps, each once, in the order in which they are first asked for."""
        if steps not in self.known:
            views, captions = dict[tuple[int, View], None](), dict[str, None]()
            for shown in (place for step in steps for place in self.at(step)):
                views[shown.index, shown.view] = captions[shown.caption] = None
            self.known = {steps: (views, captions)}
        return self.known[steps]
