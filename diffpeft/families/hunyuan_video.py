"""HunyuanVideo (Tencent 2024, arXiv:2412.03603), text to video: clips [b, c, f, h, w], Llama's hidden states after those of the template, and
what CLIP pools. It was distilled to be told a guidance. Training tells it 1: no guidance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from diffpeft.families.base import Conditions, Prompted
from diffpeft.families.devices import sent
from diffpeft.families.dit import ClipTransformer, masked_prompts
from diffpeft.families.flux import Flux
from diffpeft.families.frames import alone, first_of
from diffpeft.families.latents import encoded

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffpeft.families.parts import Component


class HunyuanVideo(ClipTransformer):
    """The training side of a HunyuanVideoPipeline. Presets leave out the refiner of texts."""

    name = "HunyuanVideo"
    pipelines: tuple[str, ...] = ("HunyuanVideoPipeline",)
    text_encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2")
    presets = Flux.presets
    guidance: Mapping[str, str] = MappingProxyType({"cfg": "true_cfg_scale", "guidance": "guidance_scale"})
    side = 720  # about the area of 544 x 960
    tokens = most_tokens = 256
    architecture = "hunyuan-video"
    base_version = "hunyuan_video"

    def read(self, encoder: str, prompt: str, device: torch.device) -> Conditions:
        """Llama's hidden states [n, width] and which are no filling [n], or what CLIP pools [width]."""
        from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

        if encoder == "text_encoder_2":
            return {"pooled": self.pipe._get_clip_prompt_embeds([prompt], device=device)[0]}
        text, mask = self.pipe._get_llama_prompt_embeds(
            [prompt], DEFAULT_PROMPT_TEMPLATE, device=device, max_sequence_length=self.max_length
        )
        return {"text": text[0], "mask": mask[0]}

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """Time and guidance are a thousand times the share of noise and 1."""
        return self.answer(model, x, t, read)

    def answer(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """What the transformer says of what it reads [b, c, f, h, w]."""
        return model(
            hidden_states=x,
            timestep=1000 * t,
            encoder_hidden_states=read["text"],
            encoder_attention_mask=sent(read["mask"], x.device).to(x.dtype),
            pooled_projections=read["pooled"],
            guidance=x.new_full((len(x),), 1000.0) if model.config.guidance_embeds else None,
            return_dict=False,
        )[0]

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> Prompted:
        """As a HunyuanVideoPipeline takes prompts, for single frames; it has negative ones on request."""
        read = masked_prompts(prompts, negative) | {
            "pooled_prompt_embeds": prompts["pooled"],
            "negative_pooled_prompt_embeds": negative["pooled"],
            "num_frames": 1,
        }
        return {name: value for name, value in read.items() if not (blank and name.startswith("negative"))}


class SkyReelsImageToVideo(HunyuanVideo):
    """The training side of a HunyuanSkyreelsImageToVideoPipeline (SkyReels-V1, Skywork 2025), which reads the first frame of a clip in channels of its own."""

    name = "SkyReels-V1"
    pipelines: tuple[str, ...] = ("HunyuanSkyreelsImageToVideoPipeline",)
    first_frame = True
    architecture = "skyreels-v1-i2v"
    base_version = "skyreels_v1"

    @classmethod
    def channels(cls, latent: int) -> int:
        """Latents, and those of the first frame."""
        return 2 * latent

    def condition(self, pixels: Tensor, controls: Sequence[Tensor]) -> Conditions:
        """The first frame's latents with zeros behind."""
        opening, count = first_of(pixels)
        known, _ = encoded(self.parts("vae"), opening)
        return {"known": alone(known, self.frames_of(count))}

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """Those of the first frame follow in the channels."""
        import torch

        return self.answer(model, torch.cat([x, read["known"]], dim=1), t, read)
