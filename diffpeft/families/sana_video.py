"""Sana-Video (Chen et al. 2025, arXiv:2509.24695), to video from a text: Sana's texts and blocks with a convolution over frames, on clips [b, c, f, h, w];
or from an image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffpeft.families.base import CaptionReading, Conditions, Prompted, Sizes
from diffpeft.families.dit import ClipTransformer, FirstInPlace
from diffpeft.families.frames import started
from diffpeft.families.latents import factor
from diffpeft.families.sana import Sana

if TYPE_CHECKING:
    from torch import Tensor

    from diffpeft.families.parts import Component, Configs, Parts


class SanaVideo(ClipTransformer, Sana):
    """The training side of a SanaVideoPipeline, whatever VAE the model has."""

    name = "Sana-Video"
    pipelines: tuple[str, ...] = ("SanaVideoPipeline",)
    frames_a_second = 16
    side = 640  # about the area of 480 x 832
    architecture = "sana-video"
    base_version = "sana_video"

    def __init__(self, parts: Parts, reading: CaptionReading):
        self.patch = parts.configs[self.denoiser]["patch_size"][-1]
        super().__init__(parts, reading)

    @classmethod
    def sizes(cls, configs: Configs) -> Sizes:
        """Whole tokens, whose size the transformer tells."""
        pixels, patch = factor(configs.get("vae", {})), configs.get(cls.denoiser, {}).get("patch_size")
        return super().sizes(configs)._replace(multiple=pixels * patch[-1] if pixels and patch else None)

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> Prompted:
        """As a SanaVideoPipeline takes prompts, for single frames of the sizes that are asked for."""
        return super().prompted(prompts, negative, blank) | {"frames": 1}


class SanaImageToVideo(FirstInPlace, SanaVideo):
    """The training side of a SanaImageToVideoPipeline."""

    pipelines: tuple[str, ...] = ("SanaImageToVideoPipeline",)
    architecture = "sana-video-i2v"

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """Time is by token, and 0 for the first frame."""
        if "first" not in read:
            return super().velocity(model, x, t, read)
        clip, times = started(x, read["first"], 1000 * t, self.patch)
        sides = (side // self.patch for side in x.shape[3:])
        return self.answer(model, clip, times.view(len(x), 1, x.shape[2], *sides), read)
