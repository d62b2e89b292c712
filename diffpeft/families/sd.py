"""Stable Diffusion 1.x and 2.x: a UNet on latents, one CLIP text encoder, discrete noise levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffpeft.families.base import Conditions, Frame, Levels, Sizes
from diffpeft.families.discrete import Discrete
from diffpeft.families.latents import encoded, factor, precise
from diffpeft.families.prompts import tokens

if TYPE_CHECKING:
    from torch import Tensor

    from diffpeft.families.parts import Configs, Parts


class StableDiffusion:
    """The training side of a StableDiffusionPipeline with a Stable Diffusion 1.x."""

    pipelines: tuple[str, ...] = ("StableDiffusionPipeline",)
    denoiser = "unet"
    text_encoders: tuple[str, ...] = ("text_encoder",)
    adaptable: tuple[str, ...] = text_encoders
    packing = 1
    architecture = "stable-diffusion-v1"
    base_version = "sd_v1"

    def __init__(self, parts: Parts):
        self.parts, self.pipe = parts, parts.pipe
        self.levels: Levels = Discrete(parts.pipe.scheduler)
        self.resolution, self.multiple = self.sizes(parts.configs).known()

    @classmethod
    def sizes(cls, configs: Configs) -> Sizes:
        """The UNet halves its latents at every level but the last."""
        unet, pixels = configs.get(cls.denoiser, {}), factor(configs.get("vae", {}))
        size, levels = unet.get("sample_size"), unet.get("down_block_types")
        return Sizes(
            size * pixels if isinstance(size, int) and pixels else None,
            pixels * 2 ** (len(levels) - 1) if levels and pixels else None,
        )

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [b, 3, h, w] in [-1, 1] -> mean and standard deviation of the latents [b, c, h / f, w / f]."""
        return encoded(self.parts("vae"), pixels)

    def embed(self, encoder: str, prompts: Sequence[str]) -> Conditions:
        """The text encoder's last hidden states [b, tokens, width]."""
        tokenizer, model = self.parts.pipe.tokenizer, self.parts(encoder)
        return {encoder: model(tokens(tokenizer, prompts, tokenizer.model_max_length, model.device))[0]}

    def framed(self, frames: Sequence[Frame]) -> Conditions:
        """Nothing: the UNet reads no sizes."""
        return {}

    def predict(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The UNet's prediction [b, c, h, w]."""
        unet = self.parts(self.denoiser)
        return precise(unet(x.to(unet.dtype), t, conditions["text_encoder"].to(unet.dtype)).sample)

    def prompted(self, prompts: Conditions, blank: Conditions) -> dict[str, Tensor]:
        """As a StableDiffusionPipeline takes prompts."""
        return {"prompt_embeds": prompts["text_encoder"], "negative_prompt_embeds": blank["text_encoder"]}


class StableDiffusion2(StableDiffusion):
    """The training side of a StableDiffusionPipeline with a Stable Diffusion 2.x, which predicts epsilon or v."""

    def __init__(self, parts: Parts):
        super().__init__(parts)
        predicts_v = self.levels.kind == "v_prediction"  # at 768 pixels, and epsilon at 512
        self.architecture = "stable-diffusion-v2-768-v" if predicts_v else "stable-diffusion-v2-512"
        self.base_version = "sd_v2_v" if predicts_v else "sd_v2"
