"""LongCat-Image-Edit (Meituan 2025): LongCat-Image's blocks on the patches of a picture and of its control image, which lies over it and which Qwen2.5-VL
looks at, smaller. Places of patches begin after those of the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffpeft.families.base import CaptionReading, Conditions, Prompted
from diffpeft.families.controls import in_order, numbered
from diffpeft.families.dit import Looking
from diffpeft.families.flux import Flux
from diffpeft.families.patches import packed, places, unpacked

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from diffpeft.families.parts import Component, Parts


class LongCatImageEdit(Looking):
    """The training side of a LongCatImageEditPipeline, which draws pictures of one area."""

    name = "LongCat-Image-Edit"
    pipelines: tuple[str, ...] = ("LongCatImageEditPipeline",)
    controls: tuple[int, int] = (1, 1)
    aligned = True
    presets = Flux.presets
    packing = 2
    architecture = "longcat-image-edit"
    base_version = "longcat_image_edit"

    def __init__(self, parts: Parts, reading: CaptionReading):
        super().__init__(parts, reading)
        parts.pipe.tokenizer_max_length = self.max_length
        parts.pipe.encode_prompt = self._read_or_known

    def _read_or_known(
        self,
        prompt: str | list[str] | None = None,
        image: Image | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The pipeline's `encode_prompt`, which fails for a prompt that was read before."""
        if prompt_embeds is not None:
            return prompt_embeds, _of_text(prompt_embeds)
        read: tuple[Tensor, Tensor] = type(self.pipe).encode_prompt(self.pipe, prompt, image, num_images_per_prompt)
        return read

    def condition(self, pixels: Tensor, controls: Sequence[Tensor]) -> Conditions:
        """The mean of the control image's latents."""
        return numbered([self.encode(control)[0] for control in controls])

    def seen(self, encoder: str, prompt: str, images: Sequence[Image], device: torch.device) -> Conditions:
        """Hidden states [n, width] from the image on: as many as it has tokens, and as are read of captions."""
        (image,) = images
        half = self.pipe.image_processor.resize(image, image.height // 2, image.width // 2)
        texts, _ = self.pipe.encode_prompt([prompt], image=half)
        return {"text": texts[0]}

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """The patches of the control image come after the picture's, in the same places of another kind."""
        import torch

        text, seen = read["text"], [x, *in_order(read)]
        begin = text.shape[1]
        ids = [places(z) + z.new_tensor([kind, begin, begin]) for kind, z in enumerate(seen, 1)]
        answer = model(
            hidden_states=torch.cat([packed(z) for z in seen], dim=1),
            timestep=t.to(x.dtype),
            guidance=None,
            encoder_hidden_states=text,
            txt_ids=_of_text(text),
            img_ids=torch.cat(ids),
            return_dict=False,
        )[0]
        return unpacked(answer[:, : len(ids[0])], x.shape)

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> Prompted:
        """As a LongCatImageEditPipeline takes prompts."""
        return {"prompt_embeds": prompts["text"], "negative_prompt_embeds": negative["text"]}

    def pictured(self, images: Sequence[Image], size: tuple[int, int]) -> Prompted:
        """The control image, which the pipeline scales to the area that the model was made for."""
        return {"image": images[0]}


def _of_text(text: Tensor) -> Tensor:
    """The places of a text [b, n, width]: [n, 3]."""
    import torch

    numbers = torch.arange(text.shape[1], device=text.device, dtype=text.dtype)
    return torch.stack([torch.zeros_like(numbers), numbers, numbers], dim=1)
