"""Krea 2 (Krea 2026): one stream of texts and image patches; twelve layers of a language model, which the transformer itself mixes. Texts have no places,
so that what fills them up is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffpeft.families.base import CaptionReading, Conditions, Prompted
from diffpeft.families.devices import sent
from diffpeft.families.dit import Transformer, in_blocks, mask_of
from diffpeft.families.flow import Flow
from diffpeft.families.latents import of_one_frame
from diffpeft.families.patches import packed, places, unpacked

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffpeft.families.parts import Component, Parts

_DISTILLED = 1.15  # mu of distilled models, of whatever size


class Krea2(Transformer):
    """The training side of a Krea2Pipeline."""

    name = "Krea 2"
    pipelines: tuple[str, ...] = ("Krea2Pipeline",)
    presets = in_blocks(r"transformer_blocks\.\d+", r"attn\.(to_[qkv]|to_gate|to_out\.0)", r"ff\.(gate|up|down)")
    packing = 2
    architecture = "krea-2"
    base_version = "krea2"

    def __init__(self, parts: Parts, reading: CaptionReading):
        super().__init__(parts, reading)
        self.drawing_steps = 8 if self.pipe.config.is_distilled else 28

    def levels_of(self, scheduler: Component) -> Flow:
        """A distilled model is shifted alike for every size."""
        return Flow.of(scheduler, self.patch, (lambda _: _DISTILLED) if self.pipe.config.is_distilled else None)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [b, 3, h, w] in [-1, 1] -> mean and standard deviation of the latents [b, c, h / f, w / f]."""
        return of_one_frame(self.parts("vae"), pixels)

    def read(self, encoder: str, prompt: str, device: torch.device) -> Conditions:
        """Hidden states [n, layers, width] of the prompt and of what follows it in the template."""
        import torch

        states, mask = self.pipe.encode_prompt([prompt], device, max_sequence_length=self.max_length)
        text = states[0][mask[0]]
        return {"text": text, "length": torch.tensor(len(text))}

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """The transformer reads patches; texts are at place 0."""
        import torch

        mask, text = mask_of(read), read["text"]
        images = places(x)
        answer = model(
            hidden_states=packed(x),
            encoder_hidden_states=text,
            timestep=t.to(x.dtype),
            position_ids=torch.cat([images.new_zeros(text.shape[1], 3), images]),
            encoder_attention_mask=None if mask is None else sent(mask, x.device),
            return_dict=False,
        )[0]
        return unpacked(answer, x.shape)

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> Prompted:
        """As a Krea2Pipeline takes prompts: with masks, and negative ones as long as the others."""
        import torch

        texts = [*prompts["text"], *negative["text"]]
        text = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        lengths = torch.cat([prompts["length"], negative["length"]])
        n = len(prompts["text"])
        mask = torch.arange(text.shape[1]) < lengths[:, None]
        return {
            "prompt_embeds": text[:n],
            "prompt_embeds_mask": mask[:n],
            "negative_prompt_embeds": text[n:],
            "negative_prompt_embeds_mask": mask[n:],
        }
