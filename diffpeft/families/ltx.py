"""LTX-Video (Lightricks 2024, arXiv:2501.00103), text to video, on single frames: clips [b, c, f, h, w] of a VAE that takes 32 pixels for one, normalised by
statistics among its weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffpeft.families.base import Conditions, Prompted
from diffpeft.families.devices import sent
from diffpeft.families.dit import ClipTransformer, in_blocks, masked_prompts

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffpeft.families.parts import Component


class LTX(ClipTransformer):
    """The training side of an LTXPipeline. What it is told of time is in seconds, by `rate`."""

    name = "LTX-Video"
    pipelines: tuple[str, ...] = ("LTXPipeline",)
    presets = in_blocks(r"transformer_blocks\.\d+", r"attn[12]\.(to_[qkv]|to_out\.0)", r"ff\.net\.(0\.proj|2)")
    frames_a_second = 25
    patch = 1
    side = 608  # about the area of 512 x 704
    tokens = most_tokens = 128
    architecture = "ltx-video"
    base_version = "ltx_video"

    def read(self, encoder: str, prompt: str, device: torch.device) -> Conditions:
        """T5's hidden states [n, width], and which are no filling [n]."""
        text, mask, *_ = self.pipe.encode_prompt(
            [prompt], do_classifier_free_guidance=False, device=device, max_sequence_length=self.max_length
        )
        return {"text": text[0], "mask": mask[0]}

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """One token a pixel of x; places are in seconds and in pixels of the image."""
        frames, height, width = x.shape[2:]
        pipe = self.pipe
        pixels = pipe.vae_spatial_compression_ratio
        answer = model(
            hidden_states=x.flatten(2).mT,
            encoder_hidden_states=read["text"],
            timestep=1000 * t,
            encoder_attention_mask=sent(read["mask"], x.device),
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(pipe.vae_temporal_compression_ratio / self.rate, pixels, pixels),
            return_dict=False,
        )[0]
        return answer.mT.unflatten(2, x.shape[2:])

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> Prompted:
        """As an LTXPipeline takes prompts, for single frames."""
        return masked_prompts(prompts, negative) | {"num_frames": 1, "frame_rate": self.rate}
