"""Z-Image (Tongyi 2025): one stream of texts and image patches, Qwen3's hidden states. Its time is 1 - sigma, and it predicts the way to the image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffpeft.families.base import Conditions, Prompted
from diffpeft.families.dit import Transformer, in_blocks, unfilled

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffpeft.families.parts import Component


class ZImage(Transformer):
    """The training side of a ZImagePipeline. Presets leave out the refiners of noise and of texts, as other trainers do."""

    name = "Z-Image"
    pipelines: tuple[str, ...] = ("ZImagePipeline",)
    presets = in_blocks(r"layers\.\d+", r"attention\.(to_[qkv]|to_out\.0)", r"feed_forward\.w[123]")
    architecture = "Z-Image"
    base_version = "z_image"

    def read(self, encoder: str, prompt: str, device: torch.device) -> Conditions:
        """Hidden states [n, width] of the prompt in the chat's template, as many as it has tokens."""
        import torch

        (text,), _ = self.pipe.encode_prompt([prompt], device, False, max_sequence_length=self.max_length)
        return {"text": text, "length": torch.tensor(len(text))}

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """The transformer takes lists, of clips of one frame."""
        import torch

        answers = model(list(x.unsqueeze(2)), 1 - t, unfilled(read), return_dict=False)[0]
        return -torch.stack(answers).squeeze(2)

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> Prompted:
        """As a ZImagePipeline takes prompts: lists of texts."""
        return {"prompt_embeds": unfilled(prompts), "negative_prompt_embeds": unfilled(negative)}
