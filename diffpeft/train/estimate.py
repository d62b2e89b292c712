"""How much memory the parts of a run need, part after part: weights, the adapter, its optimiser, and what is computed, counted on the meta device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from diffpeft.families import Conditions, Family, Frame
from diffpeft.model.placing import held_at_once, quantise
from diffpeft.model.state import trained_parameters
from diffpeft.pipeline import few_bits
from diffpeft.pipeline.open import default_device, default_dtype, dtype_of
from diffpeft.train import dreambooth
from diffpeft.train.check import Checked
from diffpeft.train.config import TrainConfig
from diffpeft.train.data import Account
from diffpeft.train.experts import experts_of
from diffpeft.train.job import checked_dtype
from diffpeft.train.memory import peak, size_of
from diffpeft.train.optimizers import row_of
from diffpeft.train.watch import Quiet

GIB = 2**30


def sized(size: float) -> str:
    """Bytes in words."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


@dataclass(frozen=True)
class Phase:
    """What a part of a run has in memory at its peak, in bytes: weights of models, the adapter, what its optimiser and its average keep, and what is computed.

    The last is None where a model's code asks for numbers, which there are none of.
    """

    what: str
    weights: int
    adapter: int
    optimizer: int
    computed: int | None

    @property
    def total(self) -> int:
        """All of it that is known."""
        return self.weights + self.adapter + self.optimizer + (self.computed or 0)


class Outline:
    """A run as far as it is known without a weight: its model without numbers, with its adapter, and what that needs."""

    def __init__(self, typed: TrainConfig, checked: Checked):
        self.device = default_device()
        self.dtype = checked_dtype(typed.dtype or default_dtype(self.device), self.device)
        self.family = family = _outlined(replace(typed, base_lora=None), self.dtype)
        self.checked = dreambooth.sized(checked, dreambooth.sizing_of(typed, family), Quiet())
        config = dreambooth.settled(typed, self.checked, family, self.dtype)
        self.live = family.adaptable if config.train_text_encoder else ()
        self.held = {share: self._held(share) for share in {*SHARES, config.offload}}  # before the adapter is on it
        self.config = dreambooth.adapt(replace(config, compile=False), family, checked.name)
        trained = trained_parameters(family.pipe, checked.name)
        self.adapter = size_of(trained.values())
        moments = sum(p.numel() for p in trained.values()) * row_of(config.optimizer).state
        self.optimizer = round(moments) + (self.adapter if config.ema is not None else 0)

    def _held(self, share: float) -> dict[str, int]:
        """{component: the most bytes of it that are on the device at once}, without an adapter, where a share of the denoiser's blocks is on the host."""
        family, pipe = self.family, self.family.pipe
        frozen = [name for name in family.text_encoders if name not in self.live]
        denoisers = dict.fromkeys(family.denoisers, share)
        shares = {
            **denoisers,
            **dict.fromkeys((*family.viewers, *family.beside), 0.0),
            **dict.fromkeys(self.live, 0.0),
            **dict.fromkeys(frozen, float(share > 0)),
        }
        return {name: held_at_once(getattr(pipe, name), offload) for name, offload in shares.items()}

    def held_so(self) -> str:
        """What is done to save memory, in words."""
        ways = {"quantize": self.config.quantize, "offload": self.config.offload}
        words = [f"{name} {value}" for name, value in ways.items() if value]
        words += ["gradient checkpointing"] if self.config.gradient_checkpointing else []
        return ", ".join(words) or "nothing is done to save any"

    @cached_property
    def computed(self) -> dict[str, int | None]:
        """What each part of the run computes, in bytes."""
        shown = LargestExample.of(self.config, self.family, self.live, self.checked.account)
        parts = {f"captions ({name})": peak(partial(shown.embedded, name, 1)) for name in self.family.text_encoders}
        with dreambooth.prepared(self.config, self.family):
            return parts | {"images (vae)": peak(lambda: shown.encoded(1)), "training": shown.counted()}

    def phases(self, share: float) -> tuple[Phase, ...]:
        """What is in memory while captions are read, images are encoded, class images are drawn, and while the adapter is trained."""
        weights, family, prior = self.held[share], self.family, self.checked.prior
        resident = sum(weights[name] for name in self.live)
        together = {f"captions ({name})": weights[name] for name in family.text_encoders}
        experts = sum(weights[name] for name in (*experts_of(self.config, family).spans, *family.beside))
        together["images (vae)"] = sum(weights[name] for name in family.viewers) + resident
        if prior and prior.missing:
            together["class images"] = weights["vae"] + experts + resident
        every = self.config.cache == "none"
        together["training"] = sum(weights.values()) if every else experts + resident
        trained = {"training": (self.adapter, self.optimizer)}
        return tuple(
            Phase(part, size, *trained.get(part, (0, 0)), self.computed.get(part, 0)) for part, size in together.items()
        )


SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # of blocks on the host, that are tried


def _outlined(config: TrainConfig, dtype: str) -> Family:
    """The family of a model whose components are all there without numbers, and stay."""
    family = dreambooth.opened(config, dtype, "meta")
    parts = family.parts
    every = (*family.text_encoders, *family.viewers, *family.denoisers, *family.beside)
    for name in every:
        setattr(parts.pipe, name, _cast(parts.outline(name), dtype_of(dtype)).eval())
    parts.pin(*every)
    for denoiser in (getattr(parts.pipe, name) for name in family.denoisers):
        for kind in filter(None, (_kind_in_file(config, denoiser), config.quantize)):
            quantise(denoiser, kind, torch.device("meta"))
    return family


def _cast(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """A model whose weights are in a dtype. What no file has, such as tables of places, stays as it was made."""
    for t in model.state_dict(keep_vars=True).values():
        if t.is_floating_point():
            t.data = t.data.to(dtype)
    return model


def _kind_in_file(config: TrainConfig, denoiser: torch.nn.Module) -> str | None:
    """What is nearest to how a file holds a denoiser, if it does in few bits."""
    file = Path(str(config.model))
    if not file.is_file() or not few_bits.in_few_bits(file):
        return None
    bits = 8 * file.stat().st_size / sum(p.numel() for p in denoiser.parameters())
    return "nf4" if bits < 6 else "fp8"


@dataclass(frozen=True)
class LargestExample:
    """An example like the largest of a run, in size and in caption, and a pass that is taken with it: with tensors that have shapes and no numbers.

    Args:
        live: the text encoders that are trained. Those that are not have read the captions before, unless nothing is cached.
        size: (width, height); frames: of a clip, 0 of a picture; controls: how many control images it has.
    """

    config: TrainConfig
    family: Family
    live: tuple[str, ...]
    size: tuple[int, int]
    frames: int
    caption: str
    controls: int

    @classmethod
    def of(cls, config: TrainConfig, family: Family, live: tuple[str, ...], account: Account) -> LargestExample:
        """The largest of the examples of a run."""
        size = max(account.buckets, key=lambda size: size[0] * size[1])
        caption = max((example.caption for example in account.examples), key=len, default="")
        controls = max((len(example.controls) for example in account.examples), default=0)
        frames = max((len(example.frames) for example in account.examples), default=0)
        return cls(config, family, live, size, frames, caption, controls)

    def pixels(self, number: int, frames: int = 0) -> Tensor:
        """So many pictures [b, 3, h, w], or clips [b, 3, f, h, w]."""
        device = self.family.parts(self.family.denoiser).device
        return torch.empty(number, 3, *([frames] if frames else []), *reversed(self.size), device=device)

    def encoded(self, number: int) -> tuple[Tensor, Conditions]:
        """Latents of so many examples, and what is read of pictures beside them."""
        pixels, stills = self.pixels(number, self.frames), [self.pixels(number)] * self.controls
        return self.family.encode(pixels)[0], self.family.condition(pixels, stills)

    def embedded(self, encoder: str, number: int) -> Conditions:
        """What an encoder makes of so many captions."""
        images = [self.pixels(number)] * self.controls if encoder in self.family.looking else []
        with torch.set_grad_enabled(encoder in self.live):
            return self.family.embed(encoder, [self.caption] * number, *([images] if images else []))

    def read(self, encoders: Iterable[str], number: int) -> Conditions:
        """What some of the encoders make of so many captions."""
        return {n: t for encoder in encoders for n, t in self.embedded(encoder, number).items()}

    def counted(self) -> int | None:
        """The bytes that a step takes: its passes forward and backward, with what is assembled for them; None if they cannot be counted."""
        number = self.config.batch_size * (2 if self.config.prior == "images" else 1)  # class images are in the batch
        frozen = [encoder for encoder in self.family.text_encoders if encoder not in self.live]
        before: list[tuple[Tensor, Conditions]] = []

        def prepare() -> None:
            latents, pictured = self.encoded(number)
            before.append((latents, pictured | self.read(frozen, number)))

        if peak(prepare) is None:
            return None
        ((latents, cached),) = before
        return peak(lambda: self.step(latents, cached, frozen))

    def step(self, latents: Tensor, cached: Conditions, frozen: Sequence[str]) -> None:
        """A step with latents of a batch, and what is cached for it. The base's prior is a pass of its own."""
        encoders = [*self.live, *(frozen if self.config.cache == "none" else ())]
        losses = []
        for _ in range(2 if self.config.prior == "base" else 1):
            x = torch.empty_like(latents, dtype=torch.float32)
            conditions = {name: t.clone() for name, t in cached.items()} | self.read(encoders, len(x))
            frames = [Frame(self.size[::-1], (0, 0), self.size[::-1])] * len(x)
            conditions |= {name: t.to(x.device) for name, t in self.family.framed(frames).items()}
            t = torch.zeros(len(x), device=x.device)
            losses.append((self.family.predict(x, t, conditions) - x).square().mean())
        torch.stack(losses).sum().backward()
