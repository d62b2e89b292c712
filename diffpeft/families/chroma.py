"""Chroma (Lodestone Rock 2025): Flux.1 without guidance and without what CLIP pools. Of T5's tokens one of the filling is read, and no more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffpeft.families.base import Conditions, Prompted
from diffpeft.families.dit import Transformer, masked_prompts
from diffpeft.families.flux import Flux
from diffpeft.families.patches import packed, places, unpacked

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffpeft.families.parts import Component


class Chroma(Transformer):
    """The training side of a ChromaPipeline."""

    name = "Chroma"
    pipelines: tuple[str, ...] = ("ChromaPipeline",)
    presets = Flux.presets
    packing = 2
    architecture = "chroma"
    base_version = "chroma"

    def read(self, encoder: str, prompt: str, device: torch.device) -> Conditions:
        """T5's hidden states [n, width], and which of them are read [n], in the states' numbers."""
        text, _, mask, *_ = self.pipe.encode_prompt(
            [prompt], device=device, do_classifier_free_guidance=False, max_sequence_length=self.max_length
        )
        return {"text": text[0], "mask": mask[0]}

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """The transformer reads patches, and a mask of texts and patches."""
        import torch

        tokens, text = packed(x), read["text"]
        answer = model(
            hidden_states=tokens,
            timestep=t.to(x.dtype),
            encoder_hidden_states=text,
            txt_ids=text.new_zeros(text.shape[1], 3),
            img_ids=places(x),
            attention_mask=torch.cat([read["mask"], tokens.new_ones(tokens.shape[:2])], dim=1),
            return_dict=False,
        )[0]
        return unpacked(answer, x.shape)

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> Prompted:
        """As a ChromaPipeline takes prompts."""
        return masked_prompts(prompts, negative)
