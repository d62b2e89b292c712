"""LTX-Video (Lightricks 2024, arXiv:2501.00103), to video from a text or an image: clips [b, c, f, h, w] of a VAE that takes 32 pixels for one, normalised by
statistics among its weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffpeft.families.base import Conditions, Prompted
from diffpeft.families.devices import sent
from diffpeft.families.dit import ClipTransformer, FirstInPlace, in_blocks, masked_prompts
from diffpeft.families.frames import started

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
        return self.answer(model, x, 1000 * t, read)

    def answer(self, model: Component, x: Tensor, time: Tensor, read: Conditions) -> Tensor:
        """What the transformer says of latents x [b, c, f, h, w] at times [b], or [b, n] by token."""
        frames, height, width = x.shape[2:]
        pipe = self.pipe
        pixels = pipe.vae_spatial_compression_ratio
        answer = model(
            hidden_states=x.flatten(2).mT,
            encoder_hidden_states=read["text"],
            timestep=time,
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


class LTXImageToVideo(FirstInPlace, LTX):
    """The training side of an LTXImageToVideoPipeline: the first frame of a clip is known, and stands in its place at no noise."""

    pipelines: tuple[str, ...] = ("LTXImageToVideoPipeline",)

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """Time is by token, and 0 for the first frame."""
        if "first" not in read:
            return super().velocity(model, x, t, read)
        return self.answer(model, *started(x, read["first"], 1000 * t), read)
