"""EasyAnimate 5.1 (Alibaba 2024, arXiv:2405.18991), text to video: clips [b, c, f, h, w], and Qwen2-VL's hidden states of a prompt,
filled up and without a mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffpeft.families.base import CaptionReading, Conditions, Prompted, Sizes
from diffpeft.families.dit import ClipTransformer, in_blocks, in_last_block, masked_prompts
from diffpeft.families.flow import Flow

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffpeft.families.parts import Component, Configs, Parts


class EasyAnimate(ClipTransformer):
    """The training side of an EasyAnimatePipeline with a flow."""

    name = "EasyAnimate"
    pipelines: tuple[str, ...] = ("EasyAnimatePipeline",)
    presets = in_blocks(
        r"transformer_blocks\.\d+",
        r"attn1\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
        r"(txt_)?ff\.net\.(0\.proj|2)",
    )
    frames_a_second = 8
    side = 512
    tokens = most_tokens = 256
    architecture = "easyanimate-v5.1"
    base_version = "easyanimate"

    def __init__(self, parts: Parts, reading: CaptionReading):
        super().__init__(parts, reading)
        self.unread = {
            self.denoiser: in_last_block(parts.configs[self.denoiser], r"attn1\.(add_q_proj|to_add_out)|txt_ff\..*")
        }

    @classmethod
    def sizes(cls, configs: Configs) -> Sizes:
        """The VAE's config tells of its levels: the first of them is of frames by themselves."""
        widths = configs.get("vae", {}).get("block_out_channels")
        return super().sizes(configs)._replace(temporal=2 ** (len(widths) - 2) if widths else None)

    def levels_of(self, scheduler: Component) -> Flow:
        """Where they are shifted by size, the pipeline always says the same."""
        return Flow.of(scheduler, self.patch, lambda tokens: 1.0)

    def read(self, encoder: str, prompt: str, device: torch.device) -> Conditions:
        """The last hidden states but one [n, width], and which are no filling [n], which the pipeline asks for."""
        text, _, mask, _ = self.pipe.encode_prompt(
            [prompt], do_classifier_free_guidance=False, device=device, max_sequence_length=self.max_length
        )
        return {"text": text[0], "mask": mask[0]}

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """Time is a thousand times the share of noise."""
        answer = model(x, 1000 * t, encoder_hidden_states=read["text"], return_dict=False)[0]
        return answer[:, : x.shape[1]]

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> Prompted:
        """As an EasyAnimatePipeline takes prompts, for single frames."""
        return masked_prompts(prompts, negative) | {"num_frames": 1}
