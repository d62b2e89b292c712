"""Wan 2.1 and 2.2 (Alibaba 2025, arXiv:2503.20314): clips [b, c, f, h, w], and UMT5's hidden states with zeros behind. From an image, which is the first
frame, the transformer reads its latents beside those that are noised, and 2.1 what CLIP sees of it too; that of 5 billion parameters reads it in their place,
at no noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffpeft.families.base import CaptionReading, Conditions, Prompted
from diffpeft.families.dit import ClipTransformer, FirstInPlace, in_blocks
from diffpeft.families.frames import first_of, images_of, started
from diffpeft.families.latents import encoded

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffpeft.families.parts import Component, Parts


EXPERTS = ("transformer", "transformer_2")  # for much noise and for little


class Wan(ClipTransformer):
    """The training side of a WanPipeline, with one denoiser or with two."""

    name = "Wan"
    pipelines: tuple[str, ...] = ("WanPipeline",)
    presets = in_blocks(r"blocks\.\d+", r"attn[12]\.(to_[qkv]|to_out\.0)", r"ffn\.net\.(0\.proj|2)")
    frames_a_second = 16
    side = 640  # about the area of 480 x 832
    architecture = "wan2.1"  # that of 5 billion parameters has a new VAE, and the layers of 2.1
    base_version = "wan"

    def __init__(self, parts: Parts, reading: CaptionReading):
        super().__init__(parts, reading)
        self.boundary = parts.pipe.config.boundary_ratio
        if self.boundary is not None:
            self.denoisers = EXPERTS
            self.architecture, self.base_version = "wan2.2", "wan2.2"

    def read(self, encoder: str, prompt: str, device: torch.device) -> Conditions:
        """UMT5's hidden states [n, width], zeros where they are filling."""
        from diffusers import WanPipeline

        # its own method, for that of the other pipeline does not do without ftfy
        texts = WanPipeline._get_t5_prompt_embeds(
            self.pipe, [prompt], device=device, max_sequence_length=self.max_length
        )
        return {"text": texts[0]}

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """Time is a thousand times the share of noise; some models read it once a token."""
        time = 1000 * t
        if self.pipe.config.expand_timesteps:
            time = time[:, None].expand(-1, math.prod(x.shape[2:]) // self.patch**2)
        return self.answer(model, x, time, read)

    def answer(self, model: Component, x: Tensor, time: Tensor, read: Conditions, **more: Tensor | None) -> Tensor:
        """What the transformer says of what it reads."""
        return model(hidden_states=x, timestep=time, encoder_hidden_states=read["text"], return_dict=False, **more)[0]

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> Prompted:
        """As the pipelines take prompts, for single frames."""
        return {"prompt_embeds": prompts["text"], "negative_prompt_embeds": negative["text"], "num_frames": 1}


class WanImageToVideo(FirstInPlace, Wan):
    """The training side of a WanImageToVideoPipeline: the first frame of a clip is known."""

    pipelines: tuple[str, ...] = ("WanImageToVideoPipeline",)

    def __init__(self, parts: Parts, reading: CaptionReading):
        super().__init__(parts, reading)
        self.sees = parts.configs[self.denoiser].get("image_dim") is not None
        if self.sees:
            self.viewers = ("vae", "image_encoder")
        self.architecture += "-i2v"

    @classmethod
    def channels(cls, latent: int) -> int:
        """Latents, those of the first frame with blank ones behind, and which of four frames are known."""
        return 2 * latent + 4

    def condition(self, pixels: Tensor, controls: Sequence[Tensor]) -> Conditions:
        """The first frame's latents, in their place or beside those of the clip."""
        return super().condition(pixels, controls) if self.pipe.config.expand_timesteps else self.known_beside(pixels)

    def known_beside(self, pixels: Tensor) -> Conditions:
        """The first frame's latents with those of grey frames behind and a mask; and what CLIP sees of it."""
        import torch

        opening, count = first_of(pixels)
        grey = opening.new_zeros(*opening.shape[:2], count - 1, *opening.shape[3:])
        known, _ = encoded(self.parts("vae"), torch.cat([opening, grey], 2))
        mask = known.new_zeros(len(known), self.temporal or 1, *known.shape[2:])
        mask[:, :, 0] = 1
        read = {"known": torch.cat([mask, known], 1)}
        if self.sees:
            self.parts("image_encoder")
            with torch.no_grad():
                read["image"] = torch.cat([self.pipe.encode_image(image) for image in images_of(opening)])
        return read

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """The first frame in its place is at no noise; beside the latents it needs no time."""
        import torch

        if "known" in read:
            beside = torch.cat([x, read["known"]], 1)
            return self.answer(model, beside, 1000 * t, read, encoder_hidden_states_image=read.get("image"))
        if "first" not in read:  # a single image, which nothing is before
            return super().velocity(model, x, t, read)
        return self.answer(model, *started(x, read["first"], 1000 * t, self.patch), read)
