"""ERNIE-Image (Baidu 2026): one stream of image patches and texts, a language model's last hidden states but one, and Flux.2's kind of latents."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffpeft.families.base import Conditions, Prompted
from diffpeft.families.devices import sent
from diffpeft.families.dit import Transformer, in_blocks, unfilled
from diffpeft.families.flow import Flow
from diffpeft.families.flux2 import standardised
from diffpeft.families.latents import moments
from diffpeft.families.patches import patchified

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffpeft.families.parts import Component

_EPSILON = 1e-5  # the pipeline's own, whatever the VAE's config says


class ErnieImage(Transformer):
    """The training side of an ErnieImagePipeline. What it may rewrite prompts with is not used: captions are read as they are."""

    name = "ERNIE-Image"
    pipelines: tuple[str, ...] = ("ErnieImagePipeline",)
    presets = in_blocks(r"layers\.\d+", r"self_attention\.(to_[qkv]|to_out\.0)", r"mlp\.(gate_proj|up_proj|linear_fc2)")
    packing = 2
    architecture = "ernie-image"
    base_version = "ernie_image"

    def levels_of(self, scheduler: Component) -> Flow:
        """The latents are patches already: a token is one of their pixels."""
        return Flow.of(scheduler, 1)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [b, 3, h, w] in [-1, 1] -> mean and standard deviation of the latents [b, 4 c, h / 2 f, w / 2 f]."""
        mean, std = map(patchified, moments(self.parts("vae"), pixels))
        return standardised(self.parts("vae"), mean, std, _EPSILON)

    def read(self, encoder: str, prompt: str, device: torch.device) -> Conditions:
        """Hidden states [n, width], as many as the prompt has tokens, up to those that are read."""
        import torch

        (text,) = self.pipe.encode_prompt([prompt], device)
        text = text[: self.max_length]
        return {"text": text, "length": torch.tensor(len(text))}

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """Time is a thousand times the share of noise."""
        return model(
            hidden_states=x,
            timestep=(1000 * t).to(x.dtype),
            text_bth=read["text"],
            text_lens=sent(read["length"], x.device),
            return_dict=False,
        )[0]

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> Prompted:
        """As an ErnieImagePipeline takes prompts: lists of texts."""
        return {"prompt_embeds": unfilled(prompts), "negative_prompt_embeds": unfilled(negative)}
