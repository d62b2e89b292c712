"""Wan 2.1 and 2.2 (Alibaba 2025, arXiv:2503.20314), text to video, on single frames: clips [b, c, f, h, w], and UMT5's hidden states with zeros behind."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from diffpeft.families.base import CaptionReading, Conditions, Prompted
from diffpeft.families.dit import ClipTransformer, in_blocks

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
        texts, _ = self.pipe.encode_prompt(
            [prompt], do_classifier_free_guidance=False, device=device, max_sequence_length=self.max_length
        )
        return {"text": texts[0]}

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """Time is a thousand times the share of noise; some models read it once a token."""
        time = 1000 * t
        if self.pipe.config.expand_timesteps:
            time = time[:, None].expand(-1, math.prod(x.shape[2:]) // self.patch**2)
        return model(hidden_states=x, timestep=time, encoder_hidden_states=read["text"], return_dict=False)[0]

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> Prompted:
        """As a WanPipeline takes prompts, for single frames."""
        return {"prompt_embeds": prompts["text"], "negative_prompt_embeds": negative["text"], "num_frames": 1}
