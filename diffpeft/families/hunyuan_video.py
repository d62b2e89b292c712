"""HunyuanVideo (Tencent 2024, arXiv:2412.03603), text to video, on single frames: clips [b, c, f, h, w], Llama's hidden states after those of the template, and
what CLIP pools. It was distilled to be told a guidance. Training tells it 1: no guidance.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from diffpeft.families.base import Conditions, Prompted
from diffpeft.families.devices import sent
from diffpeft.families.dit import ClipTransformer, masked_prompts
from diffpeft.families.flux import Flux

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
