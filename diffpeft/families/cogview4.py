"""CogView4 (Zhipu 2025): one attention over GLM's hidden states and image patches. It reads the size of an image as SDXL does, and no mask: texts are
filled up to sixteen tokens at their beginning, and examples whose texts have other lengths are asked for apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffpeft.families.base import Conditions, Frame, Prompted
from diffpeft.families.dit import Transformer, in_blocks
from diffpeft.families.flow import Flow
from diffpeft.families.prompts import by_length

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffpeft.families.parts import Component


class CogView4(Transformer):
    """The training side of a CogView4Pipeline."""

    name = "CogView4"
    pipelines: tuple[str, ...] = ("CogView4Pipeline",)
    presets = in_blocks(r"transformer_blocks\.\d+", r"attn1\.(to_[qkv]|to_out\.0)", r"ff\.net\.(0\.proj|2)")
    tokens = most_tokens = 1024
    architecture = "cogview4"
    base_version = "cogview4"

    def levels_of(self, scheduler: Component) -> Flow:
        """mu grows with the side of an image."""
        from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift

        few, low, high = (
            scheduler.config.get(name, default)
            for name, default in (("base_image_seq_len", 256), ("base_shift", 0.25), ("max_shift", 0.75))
        )
        return Flow.of(scheduler, self.patch, lambda tokens: calculate_shift(tokens, few, low, high))

    def read(self, encoder: str, prompt: str, device: torch.device) -> Conditions:
        """GLM's last hidden states but one [n, width]."""
        import torch

        texts, _ = self.pipe.encode_prompt(
            [prompt], do_classifier_free_guidance=False, device=device, max_sequence_length=self.max_length
        )
        return {"text": texts[0], "length": torch.tensor(texts.shape[1])}

    def framed(self, frames: Sequence[Frame]) -> Conditions:
        """Original size, target size and crop, each with the height before the width [b, 2]."""
        import torch

        sides = {"original_size": "original", "target_size": "target", "crop_coords": "crop"}
        return {
            name: torch.tensor([getattr(frame, side) for frame in frames], dtype=torch.float32)
            for name, side in sides.items()
        }

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """Time is a thousand times the level: as the pipeline says it, before the shift. Texts of each length are asked for together."""
        time, text = 1000 * self.levels.place(t, x.shape), read["text"]
        sizes = {name: value for name, value in read.items() if name not in ("text", "length")}

        def answer(rows: Tensor, length: int) -> Tensor:
            return model(
                hidden_states=x[rows],
                encoder_hidden_states=text[rows, :length],
                timestep=time[rows],
                **{name: values[rows] for name, values in sizes.items()},
                return_dict=False,
            )[0]

        return by_length(read["length"], x, answer)

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> Prompted:
        """As a CogView4Pipeline takes prompts. Those of other lengths are filled up at the end, where it has no way to say so."""
        return {"prompt_embeds": prompts["text"], "negative_prompt_embeds": negative["text"]}
