"""The loss of a batch: how far predictions are from their targets, weighted by the signal-to-noise ratio, with prior preservation.

A weight is one of the error of the clean image that a prediction comes to. So it means the same whatever a model predicts: a squared error e of a
prediction is one of the clean image of e / SNR (epsilon), e / (SNR + 1) (v), e / (1 + sqrt(SNR))^2 (the velocity of a flow), or e (sample).

min-SNR: Hang et al. 2023, arXiv:2303.09556. Debiased: Yu et al. 2023, arXiv:2310.08442. Prior preservation: DreamBooth, Ruiz et al. 2023,
arXiv:2208.12242.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from diffpeft.errors import ConfigError, shown
from diffpeft.families import Conditions, Family, Frame, Noised
from diffpeft.families.devices import sent
from diffpeft.families.latents import spread
from diffpeft.train.data.controls import Controls

# what the denoiser reads of prompts, with the control images beside each
Reader = Callable[[Sequence[str], Sequence[Controls]], Conditions]


@dataclass(frozen=True)
class Batch:
    """Latents and noise [b, c, *size], noise levels u [b] in [0, 1), prompts, which of them are class images, and where the pixels are from.

    `mask` [b, 1, h, w] says how much each place counts, `prior_prompts` under which prompts the base's predictions are to be kept, `conditions` what the
    denoiser reads of pictures beside the latents, and `controls` are the control images of each, for text encoders that look at them.
    """

    latents: Tensor
    noise: Tensor
    u: Tensor
    prompts: list[str]
    is_class: Tensor  # [b] bool
    frames: Sequence[Frame]
    mask: Tensor | None = None
    prior_prompts: list[str] | None = None
    conditions: Conditions = field(default_factory=dict)
    controls: Sequence[Controls] = ()

    def read(self, family: Family) -> Conditions:
        """What the denoiser reads beside prompts."""
        return family.framed(self.frames) | self.conditions

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        mask = None if self.mask is None else sent(self.mask, device)
        conditions = {name: sent(t, device) if t.is_floating_point() else t for name, t in self.conditions.items()}
        latents, noise = sent(self.latents, device), sent(self.noise, device)
        return replace(self, latents=latents, noise=noise, mask=mask, conditions=conditions)


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    Args:
        loss: a name in LOSSES.
        huber_c: where the two Huber losses go over from squares to absolute values.
        huber_schedule: constant, or snr: near 1 on clean images, huber_c on noise.
        snr_gamma: min-SNR's gamma; None: no such weight.
        debiased: weight as errors of the noise over sqrt(SNR).
    """

    loss: str = "l2"
    huber_c: float = 0.1
    huber_schedule: str = "constant"
    snr_gamma: float | None = None
    debiased: bool = False

    def distance(self, error: Tensor, snr: Tensor) -> Tensor:
        """The loss [b, c, *size] of errors [b, c, *size] at signal-to-noise ratios [b]."""
        return LOSSES[self.loss](error, spread(self._c(snr), error))

    def _c(self, snr: Tensor) -> Tensor:
        c = self.huber_c
        if self.huber_schedule == "constant":
            return torch.full_like(snr, c)
        noise = snr.clamp(min=LEAST).rsqrt()  # over the signal
        return (1 - c) / (1 + noise).square() + c

    def weighted(self, losses: Tensor, noised: Noised) -> Tensor:
        """The losses [b] of samples, weighted."""
        if self.snr_gamma is not None:
            return losses * min_snr(noised, self.snr_gamma)
        return losses * debiased(noised) if self.debiased else losses


BASE_WEIGHT = (
    10.0  # of predictions that are to be the base's: errors at high noise are small, and are enlarged while drawing
)


@dataclass(frozen=True)
class BaseRange:
    """Shares of noise from `low` to `high`, at which the base's own predictions are the targets, and how much those count.

    `texts` is what the denoiser reads of prompts; the base is the model inside `base()`.
    """

    low: float
    high: float
    weight: float
    texts: Reader
    base: Callable[[], AbstractContextManager[None]]

    def places(self, family: Family, batch: Batch) -> Tensor:
        """Which samples of a batch are noised so, as numbers [n]; on the CPU, so that nobody waits for a device."""
        sigma = family.levels.sigma(batch.u, batch.latents.shape)
        return ((self.low <= sigma) & (sigma <= self.high)).nonzero().flatten()

    @torch.no_grad()
    def targets(self, family: Family, batch: Batch, noised: Noised, places: Tensor) -> Tensor:
        """The targets of a batch [b, c, h, w]: at these places the base's predictions."""
        numbers, rows = places.tolist(), sent(places, noised.x.device)
        read = family.framed([batch.frames[n] for n in numbers]) | {n: t[places] for n, t in batch.conditions.items()}
        with self.base():
            beside = [batch.controls[n] for n in numbers] if batch.controls else ()
            texts = self.texts([batch.prompts[n] for n in numbers], beside)
            predictions = family.predict(noised.x[rows], noised.t[rows], texts | read)
        return noised.target.float().index_copy(0, rows, predictions.float())

    def weighted(self, losses: Tensor, places: Tensor) -> Tensor:
        """The losses [b], those at these places by their weight."""
        weights = torch.ones(len(losses), dtype=losses.dtype).index_fill(0, places, self.weight)
        return losses * sent(weights, losses.device)


def denoising(
    family: Family,
    batch: Batch,
    texts: Conditions,
    objective: Objective | None = None,
    base_range: BaseRange | None = None,
) -> Tensor:
    """The loss of the prediction by sample [b], weighted; without an objective the mean squared error. `texts` is what the denoiser reads of prompts."""
    objective = objective or Objective()
    noised = family.levels.noised(batch.latents, batch.noise, batch.u)
    places = None if base_range is None else base_range.places(family, batch)
    if base_range is not None and places is not None and len(places):
        noised = noised._replace(target=base_range.targets(family, batch, noised, places))
    prediction = family.predict(noised.x, noised.t, texts | batch.read(family))
    losses = objective.distance(prediction - noised.target.float(), noised.snr)
    if batch.mask is not None:  # one for all frames
        losses = losses * batch.mask.unflatten(1, (1,) * (losses.ndim - 3))
    if (counts := batch.conditions.get("counts")) is not None:
        counts = counts.to(losses)
        losses = losses * counts / counts.flatten(1).mean(1).view(-1, *[1] * (losses.ndim - 1))
    losses = objective.weighted(losses.flatten(1).mean(1), noised)
    return losses if base_range is None or places is None else base_range.weighted(losses, places)


def _roots(error: Tensor, c: Tensor) -> Tensor:
    return (error.square() + c.square()).sqrt() - c


# {loss: of an error and of the c of Huber's}; the two Huber losses are smooth everywhere, as sd-scripts has them
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": lambda error, c: error.square(),
    "huber": lambda error, c: 2 * c * _roots(error, c),
    "smooth_l1": lambda error, c: 2 * _roots(error, c),
}
LEAST, MOST = 1e-8, 1e8  # of the signal-to-noise ratio: at pure noise it is 0, on a clean image infinite
DEBIASED = 1000.0  # of the signal-to-noise ratio, above which a debiased weight falls no more
# {what a model predicts: what divides a weight of the clean image's error}
_OVER: dict[str, Callable[[Tensor], Tensor]] = {
    "epsilon": lambda snr: snr,
    "v_prediction": lambda snr: snr + 1,
    "sample": torch.ones_like,
    "flow": lambda snr: (1 + snr.sqrt()).square(),
}


def check_weighted(kind: str) -> None:
    """Raise ConfigError for a kind of prediction that no weight is known for."""
    if kind not in _OVER:
        raise ConfigError(
            f"min-SNR has no weight for {shown(kind)} predictions",
            remedy=f"It is for {', '.join(_OVER)}. Leave --snr-gamma out.",
        )


def min_snr(noised: Noised, gamma: float) -> Tensor:
    """The weight [b] of each sample's error: min(SNR, gamma) for the clean image's. Raises ConfigError for predictions that are not known."""
    check_weighted(noised.kind)
    snr = noised.snr.clamp(LEAST, MOST)
    return snr.clamp(max=gamma) / _OVER[noised.kind](snr)


def debiased(noised: Noised) -> Tensor:
    """The weight [b] of each sample's error: 1 / sqrt(SNR) for the noise's, and so sqrt(SNR) for the clean image's."""
    check_weighted(noised.kind)
    snr = noised.snr.clamp(LEAST, MOST)
    return snr / snr.clamp(max=DEBIASED).sqrt() / _OVER[noised.kind](snr)


def with_prior(losses: Tensor, is_class: Tensor, prior_weight: float) -> Tensor:
    """The loss of a batch from those of its samples [b]: mean over the instance images plus prior_weight x mean over the class images.

    So the prior weighs the same however many class images there are. A batch may have images of one kind only. `is_class` [b] is on the CPU: nobody
    waits for the losses' device.
    """
    if not is_class.any():
        return losses.mean()
    weights = torch.zeros(len(is_class), dtype=losses.dtype)
    for weight, mask in ((1.0, ~is_class), (prior_weight, is_class)):
        weights[mask] = weight / max(int(mask.sum()), 1)
    return (losses * sent(weights, losses.device)).sum()


def preserved(
    family: Family,
    batch: Batch,
    texts: Reader,
    base: Callable[[], AbstractContextManager[None]],
) -> Tensor:
    """|model(x_t, t, p) - base(x_t, t, p)|^2 [b] under the batch's prior prompts p, for its noised latents x_t. The base is the model inside `base()`."""
    noised, read = family.levels.noised(batch.latents, batch.noise, batch.u), batch.read(family)
    assert batch.prior_prompts is not None
    with torch.no_grad(), base():
        target = family.predict(noised.x, noised.t, texts(batch.prior_prompts, batch.controls) | read)
    prediction = family.predict(noised.x, noised.t, texts(batch.prior_prompts, batch.controls) | read)
    return (prediction - target).square().flatten(1).mean(1)
