"""Lumina-Image 2.0 (Alpha-VLLM 2025, arXiv:2503.21758): one stream of texts and image patches, Gemma's hidden states. Its time is 1 - sigma, and it
predicts the way to the image. Prompts follow a system prompt, blank ones for guidance do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffpeft.families.base import Conditions, Prompted
from diffpeft.families.devices import sent
from diffpeft.families.dit import Transformer, in_blocks, masked_prompts
from diffpeft.families.flow import Flow, line_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffpeft.families.parts import Component


class Lumina2(Transformer):
    """The training side of a Lumina2Pipeline. Presets leave out the refiners of noise and of texts."""

    name = "Lumina 2"
    pipelines: tuple[str, ...] = ("Lumina2Pipeline",)
    presets = in_blocks(r"layers\.\d+", r"attn\.(to_[qkv]|to_out\.0)", r"feed_forward\.linear_[123]")
    tokens = 256
    architecture = "lumina-2"
    base_version = "lumina2"

    def levels_of(self, scheduler: Component) -> Flow:
        """The pipeline takes the number of channels for that of tokens: where it shifts by size, the shift is the same for all."""
        channels = self.parts.configs[self.denoiser]["in_channels"]
        return Flow.of(scheduler, self.patch, lambda _: line_of(scheduler)(channels))

    def read(self, encoder: str, prompt: str, device: torch.device) -> Conditions:
        """Gemma's last hidden states but one [n, width], and which are no filling [n]. A blank caption is one for guidance."""
        prompt = f"{self.pipe.system_prompt} <Prompt Start> {prompt}" if prompt else prompt
        text, mask = self.pipe._get_gemma_prompt_embeds([prompt], device, self.max_length)
        return {"text": text[0], "mask": mask[0]}

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """Both signs are the other way round."""
        answer = model(
            hidden_states=x,
            timestep=1 - t,
            encoder_hidden_states=read["text"],
            encoder_attention_mask=sent(read["mask"], x.device),
            return_dict=False,
        )[0]
        return -answer

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> Prompted:
        """As a Lumina2Pipeline takes prompts."""
        return masked_prompts(prompts, negative)
