"""Mochi 1 (Genmo 2024), text to video: clips [b, c, f, h, w] of a VAE that takes 8 x 8 pixels of 6 frames for one, and T5's hidden states. Its time runs
from noise to pictures, and so does its velocity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffpeft.families.base import CaptionReading, Conditions, Prompted
from diffpeft.families.devices import sent
from diffpeft.families.dit import ClipTransformer, in_blocks, in_last_block, masked_prompts

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffpeft.families.parts import Component, Parts


class Mochi(ClipTransformer):
    """The training side of a MochiPipeline."""

    name = "Mochi"
    pipelines: tuple[str, ...] = ("MochiPipeline",)
    presets = in_blocks(
        r"transformer_blocks\.\d+",
        r"attn1\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
        r"ff(_context)?\.net\.(0\.proj|2)",
    )
    frames_a_second = 30
    side = 640  # about the area of 480 x 848
    tokens = most_tokens = 256
    architecture = "mochi-1"
    base_version = "mochi"

    def __init__(self, parts: Parts, reading: CaptionReading):
        super().__init__(parts, reading)
        self.unread = {self.denoiser: in_last_block(parts.configs[self.denoiser], r"attn1\.add_q_proj")}

    def read(self, encoder: str, prompt: str, device: torch.device) -> Conditions:
        """T5's hidden states [n, width], and which are no filling [n]."""
        text, mask, *_ = self.pipe.encode_prompt(
            [prompt], do_classifier_free_guidance=False, device=device, max_sequence_length=self.max_length
        )
        return {"text": text[0], "mask": mask[0]}

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """Time is a thousand times the share of the picture, and the transformer says the velocity towards it."""
        return -model(
            hidden_states=x,
            encoder_hidden_states=read["text"],
            timestep=1000 * (1 - t),
            encoder_attention_mask=sent(read["mask"], x.device),
            return_dict=False,
        )[0]

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> Prompted:
        """As a MochiPipeline takes prompts, for single frames."""
        return masked_prompts(prompts, negative) | {"num_frames": 1}
