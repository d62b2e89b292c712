"""AuraFlow (fal 2024): T5's hidden states, zeros where they are filling, in streams beside image patches and then in one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffpeft.families.base import Conditions, Prompted
from diffpeft.families.dit import Transformer, in_blocks, masked_prompts

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffpeft.families.parts import Component


class AuraFlow(Transformer):
    """The training side of an AuraFlowPipeline."""

    name = "AuraFlow"
    pipelines: tuple[str, ...] = ("AuraFlowPipeline",)
    presets = in_blocks(
        r"(joint|single)_transformer_blocks\.\d+",
        r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
        r"ff(_context)?\.(linear_[12]|out_projection)",
    )
    tokens = most_tokens = 256
    architecture = "auraflow"
    base_version = "auraflow"

    def read(self, encoder: str, prompt: str, device: torch.device) -> Conditions:
        """T5's hidden states [n, width]."""
        text, *_ = self.pipe.encode_prompt(
            [prompt], do_classifier_free_guidance=False, device=device, max_sequence_length=self.max_length
        )
        return {"text": text[0]}

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """Time is the share of noise."""
        return model(x, encoder_hidden_states=read["text"], timestep=t.to(x.dtype), return_dict=False)[0]

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> Prompted:
        """As an AuraFlowPipeline takes prompts. It asks for masks, and does not read them."""
        return masked_prompts(
            *({**texts, "mask": texts["text"].new_ones(texts["text"].shape[:2])} for texts in (prompts, negative))
        )
