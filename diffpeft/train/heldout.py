"""The paired held-out loss: what adapter off and on come to on pictures that are not trained on, with the same noise at the same levels.

It is the loss that a run minimises, without its prior, on other pictures. The shares of noise that are trained are cut into four bands of one width. Each
picture is measured several times in each band, at levels that have the run's own density in it; the whole is the sum of the bands' means, each weighted
with the band's probability: what the run's own draws would come to, with less chance in it.

Losses of one image are no independent numbers: they share the picture and its caption, and go up and down together. So an image counts as one number, the
mean over its pictures (one a resolution), bands and draws, and the standard error of a difference is that of a mean over images. It says what other images
would change, and the chance in noise and levels is in it too. With one image there is only this chance: the spread of the draws within each band.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

BANDS = 4
ENOUGH = 5  # images, from which on a standard error is no rough guess
# of Student's t, both tails 5 %: {degrees of freedom: how many standard errors are more than noise}
_STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 10: 2.23}


@dataclass(frozen=True)
class Band:
    """The losses at shares of noise from `low` to `high`, means over pictures and levels, and the standard error of their difference."""

    low: float
    high: float
    before: float
    after: float
    standard_error: float


@dataclass(frozen=True)
class HeldoutLoss:
    """The loss on held-out pictures with the adapter off and on, after so many steps, and the standard error of the difference over the pictures."""

    step: int
    before: float
    after: float
    standard_error: float
    bands: tuple[Band, ...]
    images: int = 0

    def table(self) -> dict[str, float]:
        """The numbers, for a file of measurements."""
        return {"before": self.before, "after": self.after, "standard_error": self.standard_error}

    def __str__(self) -> str:
        return f"{self.after:.4g}, {compared(self.before - self.after, self.standard_error, self.images, 'that of the base')}"


@dataclass(frozen=True)
class Best:
    """The step whose adapter a run ends with, and why, in a sentence."""

    step: int
    reason: str


@dataclass(frozen=True)
class Design:
    """What is measured.

    Args:
        images: of which image each picture is [p], numbered from 0.
        weights: the probability of each band [p, bands], which depends on a picture's size where a model's levels do.
        edges: the shares of noise between which the bands lie [bands + 1].
    """

    images: np.ndarray
    weights: np.ndarray
    edges: np.ndarray

    @property
    def count(self) -> int:
        """How many images there are."""
        return int(self.images.max()) + 1

    def whole(self, losses: np.ndarray) -> np.ndarray:
        """Losses [p, bands, draws] by image [n], the bands weighted."""
        return self._by_image((losses.mean(2) * self.weights).sum(1))

    def in_bands(self, losses: np.ndarray) -> np.ndarray:
        """Losses [p, bands, draws] by image and band [n, bands]."""
        return self._by_image(losses.mean(2))

    def _by_image(self, values: np.ndarray) -> np.ndarray:
        sums = np.zeros((self.count, *values.shape[1:]))
        np.add.at(sums, self.images, values)
        pictures = np.bincount(self.images).reshape(-1, *[1] * (values.ndim - 1))
        return sums / pictures

    def difference(self, losses: np.ndarray, others: np.ndarray) -> tuple[float, float]:
        """The mean over images of losses minus others [p, bands, draws], and its standard error."""
        gap = losses - others
        by_image = self.whole(gap)
        error = _error(by_image) if self.count > 1 else self._error_of_draws(gap, self.weights)
        return float(by_image.mean()), float(error)

    def _error_of_draws(self, gap: np.ndarray, weights: np.ndarray) -> float:
        """The standard error of one image's mean, from the spread of its draws in each band. gap [p, bands, draws], weights [p, bands]."""
        variance = gap.var(2, ddof=1) / gap.shape[2]
        return float(np.sqrt((variance * weights**2).sum()) / len(gap))

    def summary(self, step: int, before: np.ndarray, after: np.ndarray) -> HeldoutLoss:
        """The held-out loss after so many steps, from the losses [p, bands, draws] with the adapter off and on."""
        off, on, gap = self.in_bands(before), self.in_bands(after), before - after
        bands = []
        for band in range(off.shape[1]):
            alone = np.zeros_like(self.weights)
            alone[:, band] = 1
            error = _error((off - on)[:, band]) if self.count > 1 else self._error_of_draws(gap, alone)
            low, high = self.edges[band : band + 2]
            bands.append(Band(float(low), float(high), _mean(off[:, band]), _mean(on[:, band]), error))
        _, error = self.difference(before, after)
        return HeldoutLoss(step, _mean(self.whole(before)), _mean(self.whole(after)), error, tuple(bands), self.count)


def _mean(values: np.ndarray) -> float:
    return float(values.mean())


def _error(values: np.ndarray) -> float:
    """The standard error of the mean of independent numbers [n], of at least two."""
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def ratio_error(differences: np.ndarray, sizes: np.ndarray) -> float:
    """The standard error of sum(differences) / sum(sizes) over independent examples [n], to first order: texts have unlike numbers of tokens; 0 for one."""
    n, ratio = len(differences), differences.sum() / sizes.sum()
    scatter = np.square(differences - ratio * sizes).sum()
    return float(math.sqrt(scatter * n / (n - 1)) / sizes.sum()) if n > 1 else 0.0


def is_noise(difference: float, error: float, images: int) -> bool:
    """Whether a difference may well be chance: one that is beyond Student's t for so many images is so once in twenty times without any reason."""
    freedom = max(images - 1, 0)
    limit = _STUDENT.get(freedom, 1.96 + 2.5 / freedom if freedom else 1.96)
    return not abs(difference) > limit * error


def compared(gain: float, error: float, images: int, other: str) -> str:
    """How far a loss is below another, in a sentence: `gain` is the other minus it, `error` its standard error."""
    words = f"{abs(gain):.4g} {'below' if gain >= 0 else 'above'} {other}"
    if gain == 0:
        return f"as {other}"
    noise = ", which is not more than noise" if is_noise(gain, error, images) else ""
    return f"{words}{noise} (standard error {error:.2g})"


def chosen(design: Design, before: np.ndarray, after: Mapping[int, np.ndarray], last: int, choice: int) -> Best:
    """What there is to be said of ending with the adapter of step `choice`, {step: losses with the adapter on} being what was measured."""
    steps = [step for step in after if step > 0]
    means = {step: _mean(design.whole(after[step])) for step in steps}
    lowest = min(steps, key=lambda step: (not math.isfinite(means[step]), means[step], step))
    among = f"has the lowest held-out loss of the {len(steps)} that were measured"
    reason = f"step {choice} {among if len(steps) > 1 else 'is the only one that was measured'}"
    if choice != lowest:
        why = "was asked for" if choice == last else f"is taken, for the state of step {lowest} is gone"
        gap = compared(*design.difference(after[lowest], after[choice]), design.count, f"that of step {lowest}")
        reason = f"step {choice} {why}; its held-out loss is {gap}"
    elif choice != last:
        reason += ": " + compared(
            *design.difference(after[last], after[choice]), design.count, f"that of the last, {last}"
        )
    base = compared(*design.difference(before, after[choice]), design.count, "that of the base")
    return Best(choice, f"{reason}; it is {base}{_few(design.count)}")


def _few(images: int) -> str:
    """What is to be known of a standard error over few images."""
    if images == 1:
        return ". One held-out image says nothing of others: the error is that of its noise alone"
    return f". With {images} held-out images the error is a rough guess" if images < ENOUGH else ""
