"""Stable Diffusion XL (Podell et al. 2023, arXiv:2307.01952): two CLIP text encoders side by side, the second one's pooled output, and sizes.

Illustrious, NoobAI, Pony and others are of it too; some predict v with a zero-terminal SNR, which their scheduler's config says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffpeft.families.base import CaptionReading, Conditions, Frame
from diffpeft.families.devices import sent
from diffpeft.families.latents import precise
from diffpeft.families.prompts import chunks, refuse_skip
from diffpeft.families.sd import StableDiffusion

if TYPE_CHECKING:
    from torch import Tensor

_TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


class StableDiffusionXL(StableDiffusion):
    """The training side of a StableDiffusionXLPipeline."""

    pipelines: tuple[str, ...] = ("StableDiffusionXLPipeline",)
    text_encoders: tuple[str, ...] = tuple(_TOKENIZERS)
    adaptable: tuple[str, ...] = text_encoders
    architecture = "stable-diffusion-xl-v1-base"
    base_version = "sdxl_base_v1-0"

    def embed(self, encoder: str, prompts: Sequence[str], images: Sequence[Tensor] = ()) -> Conditions:
        """The last hidden states but one [b, tokens, width], and of the encoder with a projection what it pools of the first chunk [b, width]."""
        tokenizer, model = getattr(self.pipe, _TOKENIZERS[encoder]), self.parts(encoder)
        out = model(chunks(tokenizer, prompts, self.chunks, model.device), output_hidden_states=True)
        states = {encoder: out.hidden_states[self.layer].unflatten(0, (len(prompts), self.chunks)).flatten(1, 2)}
        return states | {"pooled": out.text_embeds[:: self.chunks]} if "text_embeds" in out else states

    def _layer(self, reading: CaptionReading) -> int:
        """The last but one; of the encoder that pools, the last is read too."""
        refuse_skip(reading, "SDXL always reads the last layer but one")
        return 2

    def framed(self, frames: Sequence[Frame]) -> Conditions:
        """Original size, crop and target size, each with the height before the width [b, 6]."""
        import torch

        return {"time_ids": torch.tensor([[*frame.original, *frame.crop, *frame.target] for frame in frames])}

    def predict(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The UNet's prediction [b, c, h, w]."""
        unet = self.parts(self.denoiser)
        read = {name: sent(value, unet.device).to(unet.dtype) for name, value in conditions.items()}
        added = {"text_embeds": read["pooled"], "time_ids": read["time_ids"]}
        return precise(unet(x.to(unet.dtype), t, _text(read), added_cond_kwargs=added).sample)

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> dict[str, Tensor]:
        """As a StableDiffusionXLPipeline takes prompts. Some models' blank prompts are zeros, which it makes itself."""
        read = {"prompt_embeds": _text(prompts), "pooled_prompt_embeds": prompts["pooled"]}
        if blank and self.parts.pipe.config.force_zeros_for_empty_prompt:
            return read
        return read | {"negative_prompt_embeds": _text(negative), "negative_pooled_prompt_embeds": negative["pooled"]}


def _text(conditions: Conditions) -> Tensor:
    """The hidden states of both encoders side by side [b, tokens, width + width]."""
    import torch

    return torch.cat([conditions[encoder] for encoder in _TOKENIZERS], dim=-1)
