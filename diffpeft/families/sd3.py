"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv:2403.03206): image patches, the hidden states of two CLIPs side by side and T5's after them, and
what both CLIPs pool. A model without T5 reads zeros in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffpeft.families.base import CaptionReading, Conditions, Prompted
from diffpeft.families.dit import Transformer, in_blocks, in_last_block
from diffpeft.families.prompts import tokens

if TYPE_CHECKING:
    from torch import Tensor

    from diffpeft.families.parts import Component, Parts

_CLIPS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


class StableDiffusion3(Transformer):
    """The training side of a StableDiffusion3Pipeline."""

    name = "Stable Diffusion 3"
    pipelines: tuple[str, ...] = ("StableDiffusion3Pipeline",)
    text_encoders: tuple[str, ...] = (*_CLIPS, "text_encoder_3")
    adaptable: tuple[str, ...] = tuple(_CLIPS)
    presets = in_blocks(
        r"transformer_blocks\.\d+",
        r"attn2?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
        r"ff(_context)?\.net\.(0\.proj|2)",
    )
    tokens = 256
    architecture = "stable-diffusion-3"
    base_version = "sd3"

    def __init__(self, parts: Parts, reading: CaptionReading):
        super().__init__(parts, reading)
        self.text_encoders = tuple(name for name in self.text_encoders if parts.has(name))
        config = parts.configs[self.denoiser]
        self.unread = {self.denoiser: in_last_block(config, r"attn\.add_q_proj")}
        self.zeros = (self.max_length, config["joint_attention_dim"])

    def embed(self, encoder: str, prompts: Sequence[str], images: Sequence[Tensor] = ()) -> Conditions:
        """A CLIP's last hidden states but one [b, n, width] and what it pools [b, width], or T5's hidden states."""
        model = self.parts(encoder)
        if encoder not in _CLIPS:
            return {encoder: model(tokens(self.pipe.tokenizer_3, prompts, self.max_length, model.device))[0]}
        tokenizer = getattr(self.pipe, _CLIPS[encoder])
        ids = tokens(tokenizer, prompts, self.pipe.tokenizer_max_length, model.device)
        out = model(ids, output_hidden_states=True)
        return {encoder: out.hidden_states[-2], f"{encoder}_pooled": out.text_embeds}

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """Time is a thousand times the share of noise."""
        text, pooled = self._both(read)
        return model(
            hidden_states=x, timestep=1000 * t, encoder_hidden_states=text, pooled_projections=pooled, return_dict=False
        )[0]

    def _both(self, read: Conditions) -> tuple[Tensor, Tensor]:
        """The hidden states of all encoders [b, n, width], CLIP's filled up with zeros to the width of T5's, and what is pooled [b, width + width]."""
        import torch

        clip = torch.cat([read[name] for name in _CLIPS], dim=-1)
        t5 = read.get("text_encoder_3")
        t5 = clip.new_zeros(len(clip), *self.zeros) if t5 is None else t5
        clip = torch.nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return torch.cat([clip, t5], dim=1), torch.cat([read[f"{name}_pooled"] for name in _CLIPS], dim=-1)

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> Prompted:
        """As a StableDiffusion3Pipeline takes prompts."""
        (text, pooled), (negative_text, negative_pooled) = self._both(prompts), self._both(negative)
        return {
            "prompt_embeds": text,
            "pooled_prompt_embeds": pooled,
            "negative_prompt_embeds": negative_text,
            "negative_pooled_prompt_embeds": negative_pooled,
        }
