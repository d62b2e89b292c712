"""Qwen-Image (Alibaba 2025): streams of image patches and of texts side by side, a language model's hidden states without those of the template."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from diffpeft.families.base import CaptionReading, Conditions, Prompted
from diffpeft.families.devices import sent
from diffpeft.families.dit import Transformer, in_blocks, mask_of
from diffpeft.families.latents import encoded
from diffpeft.families.patches import packed, unpacked

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffpeft.families.parts import Component, Parts


class QwenImage(Transformer):
    """The training side of a QwenImagePipeline. Its VAE is one of clips: an image is a clip of one frame."""

    name = "Qwen-Image"
    pipelines: tuple[str, ...] = ("QwenImagePipeline",)
    presets = in_blocks(
        r"transformer_blocks\.\d+",
        r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
        r"(img|txt)_mlp\.net\.(0\.proj|2)",
    )
    guidance: Mapping[str, str] = MappingProxyType({"cfg": "true_cfg_scale"})
    packing = 2
    side = 1328
    most_tokens = 1024
    architecture = "Qwen-Image"
    base_version = "qwen_image"

    def __init__(self, parts: Parts, reading: CaptionReading):
        super().__init__(parts, reading)
        last = parts.configs[self.denoiser]["num_layers"] - 1
        stream = r"attn\.(add_q_proj|to_add_out)|txt_mlp\.net\.(0\.proj|2)"
        self.unread = {self.denoiser: rf"transformer_blocks\.{last}\.({stream})"}  # of texts: what comes out of it

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [b, 3, h, w] in [-1, 1] -> mean and standard deviation of the latents [b, c, h / f, w / f]."""
        return of_one_frame(self.parts("vae"), pixels)

    def read(self, encoder: str, prompt: str, device: torch.device) -> Conditions:
        """Hidden states [n, width] of the prompt, as many as it has tokens."""
        import torch

        texts, _ = self.pipe.encode_prompt([prompt], device, max_sequence_length=self.max_length)
        return {"text": texts[0], "length": torch.tensor(texts.shape[1])}

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """The transformer reads patches; of shorter texts a mask says what is filled up."""
        shape = (1, *(side // self.patch for side in x.shape[2:]))
        mask = mask_of(read)
        answer = model(
            hidden_states=packed(x),
            timestep=t.to(x.dtype),
            guidance=None,
            encoder_hidden_states=read["text"],
            encoder_hidden_states_mask=None if mask is None else sent(mask.long(), x.device),
            img_shapes=[[shape]] * len(x),
            return_dict=False,
        )[0]
        return unpacked(answer, x.shape)

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> Prompted:
        """As a QwenImagePipeline takes prompts."""
        masks = {"prompt_embeds_mask": mask_of(prompts), "negative_prompt_embeds_mask": mask_of(negative)}
        texts = {"prompt_embeds": prompts["text"], "negative_prompt_embeds": negative["text"]}
        return texts | {name: mask.long() for name, mask in masks.items() if mask is not None}


def of_one_frame(vae: Component, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents [b, c, h / f, w / f] of images [b, 3, h, w], by a VAE of clips."""
    mean, std = encoded(vae, pixels.unsqueeze(2))
    return mean.squeeze(2), std.squeeze(2)
