"""Sana (Xie et al. 2024, arXiv:2410.10629): linear attention on latents of a VAE that takes 32 pixels for one, and Gemma's hidden states of a prompt that
follows an instruction. Blank prompts for guidance do not.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from diffpeft.families.base import Conditions, Prompted
from diffpeft.families.devices import sent
from diffpeft.families.dit import Transformer, in_blocks, masked_prompts

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffpeft.families.parts import Component


class Sana(Transformer):
    """The training side of a SanaPipeline. Presets leave out convolutions by channel, which PEFT has for some ranks only."""

    name = "Sana"
    pipelines: tuple[str, ...] = ("SanaPipeline",)
    presets = in_blocks(r"transformer_blocks\.\d+", r"attn[12]\.(to_[qkv]|to_out\.0)", r"ff\.conv_(inverted|point)")
    patch = 1
    tokens = most_tokens = 300
    architecture = "sana"
    base_version = "sana"

    def read(self, encoder: str, prompt: str, device: torch.device) -> Conditions:
        """Gemma's hidden states [n, width] from the prompt's first token on, and which are no filling [n]. A blank caption is one for guidance."""
        text, mask, *_ = self.pipe.encode_prompt(
            [prompt],
            False,
            device=device,
            max_sequence_length=self.max_length,
            complex_human_instruction=_instruction(self.pipe) if prompt else None,
        )
        return {"text": text[0], "mask": mask[0]}

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """Time is a thousand times the share of noise."""
        return self.answer(model, x, 1000 * t, read)

    def answer(self, model: Component, x: Tensor, time: Tensor, read: Conditions) -> Tensor:
        """What the transformer says; a variance beside the velocity is not read."""
        answer = model(
            x,
            encoder_hidden_states=read["text"],
            encoder_attention_mask=sent(read["mask"], x.device),
            timestep=time * model.config.get("timestep_scale", 1.0),
            return_dict=False,
        )[0]
        return answer[:, : x.shape[1]]

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> Prompted:
        """As a SanaPipeline takes prompts, of the sizes that are asked for."""
        return masked_prompts(prompts, negative) | {"negative_prompt": None, "use_resolution_binning": False}


def _instruction(pipe: Component) -> list[str]:
    """What the pipeline puts before prompts."""
    lines: list[str] = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
    return lines
