"""Qwen-Image (Alibaba 2025): streams of image patches and of texts side by side, a language model's hidden states without those of the template."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from diffpeft.families.base import CaptionReading, Conditions, Prompted
from diffpeft.families.controls import drawn, in_order, numbered
from diffpeft.families.devices import sent
from diffpeft.families.dit import Transformer, in_blocks, in_last_block, mask_of
from diffpeft.families.latents import of_one_frame
from diffpeft.families.patches import packed, unpacked
from diffpeft.families.prompts import stacked

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
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
        stream = r"attn\.(add_q_proj|to_add_out)|txt_mlp\.net\.(0\.proj|2)"
        self.unread = {self.denoiser: in_last_block(parts.configs[self.denoiser], stream)}

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [b, 3, h, w] in [-1, 1] -> mean and standard deviation of the latents [b, c, h / f, w / f]."""
        return of_one_frame(self.parts("vae"), pixels)

    def read(self, encoder: str, prompt: str, device: torch.device) -> Conditions:
        """Hidden states [n, width] of the prompt, as many as it has tokens."""
        import torch

        texts, _ = self.pipe.encode_prompt([prompt], device, max_sequence_length=self.max_length)
        return {"text": texts[0], "length": torch.tensor(texts.shape[1])}

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """The transformer reads patches, those of control images after the picture's; of shorter texts a mask says what is filled up."""
        import torch

        seen, mask = [x, *in_order(read)], mask_of(read)
        shapes = [(1, *(side // self.patch for side in z.shape[2:])) for z in seen]
        answer = model(
            hidden_states=torch.cat([packed(z) for z in seen], dim=1),
            timestep=t.to(x.dtype),
            guidance=None,
            encoder_hidden_states=read["text"],
            encoder_hidden_states_mask=None if mask is None else sent(mask.long(), x.device),
            img_shapes=[shapes] * len(x),
            return_dict=False,
        )[0]
        return unpacked(answer[:, : math.prod(shapes[0])], x.shape)

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> Prompted:
        """As a QwenImagePipeline takes prompts."""
        masks = {"prompt_embeds_mask": mask_of(prompts), "negative_prompt_embeds_mask": mask_of(negative)}
        texts = {"prompt_embeds": prompts["text"], "negative_prompt_embeds": negative["text"]}
        return texts | {name: mask.long() for name, mask in masks.items() if mask is not None}


class QwenImageEdit(QwenImage):
    """The training side of a QwenImageEditPipeline. Its text encoder looks at the control image too."""

    pipelines: tuple[str, ...] = ("QwenImageEditPipeline",)
    controls: tuple[int, int] = (1, 1)
    looking: tuple[str, ...] = ("text_encoder",)
    side = 1024
    architecture = "Qwen-Image-Edit"
    base_version = "qwen_image_edit"

    def condition(self, pixels: Tensor, controls: Sequence[Tensor]) -> Conditions:
        """The means of the control images' latents."""
        return numbered([self.encode(control)[0] for control in controls])

    def embed(self, encoder: str, prompts: Sequence[str], images: Sequence[Tensor] = ()) -> Conditions:
        """The conditions of prompts, each of which is read by itself with its control images; without any as a text alone."""
        import torch

        model, rows = self.parts(encoder), list[Conditions]()
        for row, prompt in enumerate(prompts):
            shown = self.shown([drawn(image[row]) for image in images]) if images else None
            with torch.no_grad():
                texts, _ = self.pipe.encode_prompt(
                    [prompt], image=shown, device=model.device, max_sequence_length=self.max_length
                )
            rows.append({"text": texts[0], "length": torch.tensor(texts.shape[1])})
        return stacked(rows)

    def shown(self, images: list[Image]) -> Image | list[Image]:
        """Control images as the text encoder looks at them: the one that the denoiser reads."""
        return images[0]

    def pictured(self, images: Sequence[Image], size: tuple[int, int]) -> Prompted:
        """The control images, which the pipeline scales to the area that the model was made for."""
        return {"image": images[0]}


class QwenImageEditPlus(QwenImageEdit):
    """The training side of a QwenImageEditPlusPipeline (2509, 2511)."""

    pipelines: tuple[str, ...] = ("QwenImageEditPlusPipeline",)
    controls: tuple[int, int] = (1, 3)
    architecture = "Qwen-Image-Edit-Plus"
    base_version = "qwen_image_edit_plus"

    def shown(self, images: list[Image]) -> list[Image]:
        """Small ones."""
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

        sizes = [plus.calculate_dimensions(plus.CONDITION_IMAGE_SIZE, image.width / image.height) for image in images]
        resize = self.pipe.image_processor.resize
        return [resize(image, height, width) for image, (width, height) in zip(images, sizes, strict=True)]

    def pictured(self, images: Sequence[Image], size: tuple[int, int]) -> Prompted:
        """All of them."""
        return {"image": list(images)}
