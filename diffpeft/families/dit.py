"""Diffusion transformers of one kind: the pipeline turns a prompt into conditions through text encoders that stay as they are, and the transformer
predicts a velocity. A family of this kind says what is its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from diffpeft.families.base import CaptionReading, Conditions, Frame, Levels, Prompted, Sizes
from diffpeft.families.controls import drawn
from diffpeft.families.defaults import Defaults
from diffpeft.families.devices import sent
from diffpeft.families.flow import Flow
from diffpeft.families.frames import first_of, uncounted
from diffpeft.families.latents import encoded, factor, precise, temporal_factor
from diffpeft.families.prompts import length_within, stacked

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from diffpeft.families.parts import Component, Configs, Parts


def in_blocks(blocks: str, attention: str, mlp: str) -> Mapping[str, str]:
    """The presets of a transformer by regular expressions: of its blocks, and in these of the layers of attention and of those that follow it."""
    return MappingProxyType(
        {"attn": rf"{blocks}\.({attention})", "attn-mlp": rf"{blocks}\.({attention}|{mlp})"},
    )


def in_last_block(config: Mapping[str, int], layers: str) -> str:
    """The regular expression for layers of the last block: of the stream of texts, which ends there, nothing is read."""
    return rf"transformer_blocks\.{config['num_layers'] - 1}\.({layers})"


class Transformer(Defaults):
    """The training side of a pipeline of this kind. It asks the pipeline itself for its conditions: templates, masks and lengths are the pipeline's."""

    name = ""  # in messages
    pipelines: tuple[str, ...] = ()
    denoiser = "transformer"
    denoisers: tuple[str, ...] = ("transformer",)
    boundary: float | None = None
    text_encoders: tuple[str, ...] = ("text_encoder",)
    adaptable: tuple[str, ...] = ()
    presets: Mapping[str, str] = MappingProxyType({})
    unread: Mapping[str, str] = MappingProxyType({})
    guidance: Mapping[str, str] = MappingProxyType({"cfg": "guidance_scale"})
    drawing_steps = 25
    packing = 1
    patch = 2  # latent pixels, the side of a token
    side = 1024  # pixels that published models were made for
    tokens = 512  # of a caption that are usually read
    most_tokens = 512
    architecture = ""
    base_version = ""

    def __init__(self, parts: Parts, reading: CaptionReading):
        self.max_length = length_within(reading, self.tokens, self.most_tokens, self.name)
        self.parts, self.pipe = parts, parts.pipe
        self.levels: Levels = self.levels_of(parts.pipe.scheduler)
        self.resolution, self.multiple = self.sizes(parts.configs).known()

    def levels_of(self, scheduler: Component) -> Levels:
        """The levels of noise that the pipeline draws at."""
        return Flow.of(scheduler, self.patch)

    @classmethod
    def sizes(cls, configs: Configs) -> Sizes:
        """Whole tokens."""
        pixels = factor(configs.get("vae", {}))
        return Sizes(cls.side, pixels * cls.patch if pixels else None)

    @classmethod
    def channels(cls, latent: int) -> int:
        """How many channels the transformer reads of latents with so many."""
        return latent * cls.packing**2

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [b, 3, h, w] in [-1, 1] -> mean and standard deviation of the latents [b, c, h / f, w / f]."""
        return encoded(self.parts("vae"), pixels)

    def embed(self, encoder: str, prompts: Sequence[str], images: Sequence[Tensor] = ()) -> Conditions:
        """The conditions of prompts, each of which is read by itself."""
        import torch

        model = self.parts(encoder)
        with torch.no_grad():
            return stacked([self.read(encoder, prompt, model.device) for prompt in prompts])

    def read(self, encoder: str, prompt: str, device: torch.device) -> Conditions:
        """What a text encoder makes of one prompt, without the batch's axis."""
        raise NotImplementedError

    def framed(self, frames: Sequence[Frame]) -> Conditions:
        """Nothing: the transformer reads no sizes but that of its latents."""
        return {}

    def predict(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The velocity [b, c, *size]."""
        import torch

        rows_of = self._rows(t)
        if len(rows_of) == 1:
            return self._predicted(next(iter(rows_of)), x, t, conditions)
        answers = [
            self._predicted(name, x[rows], t[rows], {key: value[rows] for key, value in conditions.items()})
            for name, rows in rows_of.items()
        ]
        return torch.cat(answers)[torch.cat([*rows_of.values()]).argsort()]

    def _rows(self, t: Tensor) -> dict[str, Tensor]:
        """{denoiser: the rows of times [b] that it is asked for}, on the host. Of several, if it is not `only` one, this waits for the times; without numbers
        it is the first.
        """
        import torch

        every = torch.arange(len(t))
        if self.only is not None:
            return {self.only: every}
        if self.boundary is None or t.is_meta:
            return {self.denoiser: every}
        noisy = (t >= self.boundary).cpu()
        rows_of = dict(zip(self.denoisers, (every[noisy], every[~noisy]), strict=True))
        return {name: rows for name, rows in rows_of.items() if len(rows)}

    def _predicted(self, denoiser: str, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The velocity [b, c, *size] that one denoiser says."""
        model = self.parts(denoiser)
        read = {
            name: sent(value, model.device).to(model.dtype) if value.is_floating_point() else value
            for name, value in conditions.items()
        }
        return precise(self.velocity(model, x.to(model.dtype), t, read))

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """What the transformer says of latents x [b, c, *size] at shares of noise t [b], as a velocity towards the noise."""
        raise NotImplementedError

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> Prompted:
        """As the pipeline takes prompts."""
        raise NotImplementedError


class Looking(Transformer):
    """One whose first text encoder looks at the control images beside a prompt."""

    looking: tuple[str, ...] = ("text_encoder",)

    def embed(self, encoder: str, prompts: Sequence[str], images: Sequence[Tensor] = ()) -> Conditions:
        """The conditions of prompts, each of which is read by itself with its control images; without any beside a black one."""
        import torch
        from PIL import Image as pictures

        model, black = self.parts(encoder), [pictures.new("RGB", (self.resolution, self.resolution))]
        with torch.no_grad():
            rows = [
                self.seen(encoder, prompt, [drawn(image[row]) for image in images] or black, model.device)
                for row, prompt in enumerate(prompts)
            ]
        return stacked(rows)

    def seen(self, encoder: str, prompt: str, images: Sequence[Image], device: torch.device) -> Conditions:
        """What a text encoder makes of one prompt beside its control images, without the batch's axis."""
        raise NotImplementedError


class ClipTransformer(Transformer):
    """One of a model of clips, which sees an image as a clip of one frame."""

    frames_a_second: float = 24

    def __init__(self, parts: Parts, reading: CaptionReading):
        super().__init__(parts, reading)
        _, _, self.temporal, self.rate = self.sizes(parts.configs)

    @classmethod
    def sizes(cls, configs: Configs) -> Sizes:
        """With those of clips."""
        taken = temporal_factor(configs.get("vae", {}))
        return super().sizes(configs)._replace(temporal=taken, rate=cls.frames_a_second)

    def frames_of(self, count: int) -> int:
        """The frames of the latents of so many frames."""
        return (count - 1) // (self.temporal or 1) + 1

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [b, 3, (f,) h, w] in [-1, 1] -> mean and standard deviation of the latents [b, c, (f - 1) / t + 1, h / s, w / s]."""
        return encoded(self.parts("vae"), pixels.unsqueeze(2) if pixels.ndim == 4 else pixels)


class FirstInPlace(ClipTransformer):
    """One that is shown the first frame of a clip in its place, where nothing is predicted. Of a single image nothing is known, which nothing is before."""

    first_frame = True

    def condition(self, pixels: Tensor, controls: Sequence[Tensor]) -> Conditions:
        """The mean of the first frame's latents."""
        opening, count = first_of(pixels)
        if count == 1:
            return {}
        known, _ = encoded(self.parts("vae"), opening)
        return {"first": known, "counts": uncounted(self.frames_of(count), known)}


def unfilled(conditions: Conditions, name: str = "text") -> list[Tensor]:
    """Texts [b, n, w] without what fills them up: a list of [n, w]."""
    pairs = zip(conditions[name], conditions["length"].tolist(), strict=True)
    return [text[:length] for text, length in pairs]


def mask_of(conditions: Conditions, name: str = "text") -> Tensor | None:
    """Which tokens of texts [b, n, w] are no filling [b, n], on the host; None if all are."""
    length, n = conditions["length"], conditions[name].shape[1]
    return None if bool((length == n).all()) else counted(length, n)


def counted(length: Tensor, n: int) -> Tensor:
    """The first tokens of n, as many as each length [b] says: [b, n], on the host."""
    import torch

    return torch.arange(n) < length[:, None]


def masked_prompts(prompts: Conditions, negative: Conditions) -> Prompted:
    """As pipelines take prompts whose conditions are a text and a mask."""
    return {
        "prompt_embeds": prompts["text"],
        "prompt_attention_mask": prompts["mask"],
        "negative_prompt_embeds": negative["text"],
        "negative_prompt_attention_mask": negative["mask"],
    }
