"""Kandinsky 5 Image Editing (Kandinsky Lab 2025, arXiv:2511.14993): Kandinsky 5's blocks on a picture, with its control image, which lies over it, in channels
of its own; Qwen2.5-VL looks at it, smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffpeft.families.base import CaptionReading, Conditions, Prompted
from diffpeft.families.controls import numbered
from diffpeft.families.dit import Looking
from diffpeft.families.followed import Everything
from diffpeft.families.kandinsky5_video import Kandinsky5Video, asked_of
from diffpeft.families.latents import moments

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from diffpeft.families.parts import Component, Parts


class Kandinsky5Edit(Looking):
    """The training side of a Kandinsky5I2IPipeline."""

    name = "Kandinsky 5"
    pipelines: tuple[str, ...] = ("Kandinsky5I2IPipeline",)
    text_encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2")
    controls: tuple[int, int] = (1, 1)
    aligned = True
    presets = Kandinsky5Video.presets
    tokens = most_tokens = 1024
    architecture = "kandinsky-5-image-edit"
    base_version = "kandinsky5_edit"

    def __init__(self, parts: Parts, reading: CaptionReading):
        super().__init__(parts, reading)
        parts.pipe.resolutions = Everything()

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [b, 3, h, w] in [-1, 1] -> mean and standard deviation of the latents [b, c, h / f, w / f], which are scaled and not shifted."""
        vae = self.parts("vae")
        mean, std = moments(vae, pixels)
        return mean * vae.config.scaling_factor, std * vae.config.scaling_factor

    def condition(self, pixels: Tensor, controls: Sequence[Tensor]) -> Conditions:
        """The mean of the control image's latents."""
        return numbered([self.encode(control)[0] for control in controls])

    def seen(self, encoder: str, prompt: str, images: Sequence[Image], device: torch.device) -> Conditions:
        """Qwen's hidden states [n, width] of as many tokens as a prompt and the image have, or what CLIP pools [width]."""
        import torch
        from diffusers.pipelines.kandinsky5.pipeline_kandinsky_i2i import prompt_clean

        cleaned = [prompt_clean(prompt)]
        if encoder == "text_encoder_2":
            return {"pooled": self.pipe._encode_prompt_clip(cleaned, device)[0]}
        texts, _ = self.pipe._encode_prompt_qwen(cleaned, list(images), device, self.max_length)
        return {"text": texts[0], "length": torch.tensor(texts.shape[1])}

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """Ones beside the control image say that it is known."""
        import torch

        clip = torch.stack([torch.cat([x, read["control_1"], torch.ones_like(x[:, :1])], dim=1)], dim=2)
        return asked_of(model, clip.movedim(1, -1), t, read, self.patch, scale=[1.0] * 3).squeeze(2)

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> Prompted:
        """As a Kandinsky5I2IPipeline takes prompts."""
        read = Kandinsky5Video.prompted(self, prompts, negative, blank)  # type: ignore[arg-type]
        return {name: value for name, value in read.items() if name != "num_frames"}

    def pictured(self, images: Sequence[Image], size: tuple[int, int]) -> Prompted:
        """The control image."""
        return {"image": images[0]}
