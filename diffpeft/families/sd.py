"""Stable Diffusion 1.x and 2.x: a UNet on latents, one CLIP text encoder, discrete noise levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from diffpeft.errors import ConfigError
from diffpeft.families.base import CaptionReading, Conditions, Frame, Levels, Sizes
from diffpeft.families.defaults import Defaults
from diffpeft.families.devices import sent
from diffpeft.families.discrete import Discrete
from diffpeft.families.latents import encoded, factor, precise
from diffpeft.families.prompts import after, chunks, chunks_of, length_of

if TYPE_CHECKING:
    from torch import Tensor

    from diffpeft.families.parts import Component, Configs, Parts


class StableDiffusion(Defaults):
    """The training side of a StableDiffusionPipeline with a Stable Diffusion 1.x."""

    pipelines: tuple[str, ...] = ("StableDiffusionPipeline",)
    denoiser = "unet"
    denoisers: tuple[str, ...] = ("unet",)
    boundary: float | None = None
    text_encoders: tuple[str, ...] = ("text_encoder",)
    adaptable: tuple[str, ...] = text_encoders
    presets: Mapping[str, str] = MappingProxyType({})
    guidance: Mapping[str, str] = MappingProxyType({"cfg": "guidance_scale"})
    drawing_steps = 25
    architecture = "stable-diffusion-v1"
    base_version = "sd_v1"

    def __init__(self, parts: Parts, reading: CaptionReading):
        self.parts, self.pipe = parts, parts.pipe
        self.chunks, layer = chunks_of(parts.pipe.tokenizer, reading), self._layer(reading)
        layers = parts.outline("text_encoder").config.num_hidden_layers
        self.layer = -layer
        self.unread: Mapping[str, str] = {"text_encoder": after(layer, layers)} if layer > 1 else {}
        self.max_length = self.chunks * length_of(parts.pipe.tokenizer)
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

    @classmethod
    def channels(cls, latent: int) -> int:
        """As many as latents have."""
        return latent

    def _layer(self, reading: CaptionReading) -> int:
        """Which of the text encoder's layers is read, 1 the last."""
        layers = self.parts.outline("text_encoder").config.num_hidden_layers
        if not 1 <= reading.clip_skip <= layers:
            raise ConfigError(f"clip_skip is {reading.clip_skip}", remedy=f"It is 1, the last layer, to {layers}.")
        return reading.clip_skip

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [b, 3, h, w] in [-1, 1] -> mean and standard deviation of the latents [b, c, h / f, w / f]."""
        return encoded(self.parts("vae"), pixels)

    def embed(self, encoder: str, prompts: Sequence[str], images: Sequence[Tensor] = ()) -> Conditions:
        """The text encoder's hidden states [b, tokens, width], the last or an earlier layer's through the last norm."""
        model = self.parts(encoder)
        out = model(chunks(self.pipe.tokenizer, prompts, self.chunks, model.device), output_hidden_states=True)
        inner: Component = getattr(model, "text_model", model)  # older transformers have that level
        states = out[0] if self.layer == -1 else inner.final_layer_norm(out.hidden_states[self.layer])
        return {encoder: states.unflatten(0, (len(prompts), self.chunks)).flatten(1, 2)}

    def framed(self, frames: Sequence[Frame]) -> Conditions:
        """Nothing: the UNet reads no sizes."""
        return {}

    def predict(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The UNet's prediction [b, c, h, w]."""
        unet = self.parts(self.denoiser)
        text = sent(conditions["text_encoder"], unet.device).to(unet.dtype)
        return precise(unet(x.to(unet.dtype), t, text).sample)

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> dict[str, Tensor]:
        """As a StableDiffusionPipeline takes prompts."""
        return {"prompt_embeds": prompts["text_encoder"], "negative_prompt_embeds": negative["text_encoder"]}


class StableDiffusion2(StableDiffusion):
    """The training side of a StableDiffusionPipeline with a Stable Diffusion 2.x, which predicts epsilon or v."""

    def __init__(self, parts: Parts, reading: CaptionReading):
        super().__init__(parts, reading)
        predicts_v = self.levels.kind == "v_prediction"  # at 768 pixels, and epsilon at 512
        self.architecture = "stable-diffusion-v2-768-v" if predicts_v else "stable-diffusion-v2-512"
        self.base_version = "sd_v2_v" if predicts_v else "sd_v2"
