"""Flux.2 (Black Forest Labs 2025), dev and klein: latents of 2 x 2 patches, normalised by statistics that its VAE keeps, and three layers of a language
model side by side. Its dev model was distilled to be told a guidance. Training tells it 1: no guidance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffpeft.families.base import CaptionReading, Conditions, Prompted
from diffpeft.families.controls import in_order, numbered
from diffpeft.families.devices import sent
from diffpeft.families.dit import Transformer, in_blocks
from diffpeft.families.flow import Flow
from diffpeft.families.latents import moments, spread
from diffpeft.families.patches import patchified

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from diffpeft.families.parts import Component, Parts

_STEPS = 50  # the pipelines' own number: their shift depends on it


class Flux2(Transformer):
    """The training side of a Flux2Pipeline or a Flux2KleinPipeline."""

    name = "Flux.2"
    pipelines: tuple[str, ...] = ("Flux2Pipeline", "Flux2KleinPipeline")
    presets = in_blocks(
        r"(single_)?transformer_blocks\.\d+",
        r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|to_qkv_mlp_proj|to_out)",
        r"ff(_context)?\.linear_(in|out)",
    )
    packing = 2
    controls: tuple[int, int] = (0, 10)
    base_version = "flux2"

    def __init__(self, parts: Parts, reading: CaptionReading):
        super().__init__(parts, reading)
        self.guided: bool = parts.configs[self.denoiser]["guidance_embeds"]
        self.guidance = {"guidance" if self.guided else "cfg": "guidance_scale"}
        self.drawing_steps = 4 if parts.pipe.config.get("is_distilled") else self.drawing_steps
        self.architecture = "Flux.2-dev" if self.guided else "Flux.2-klein"
        self.base_version = "flux_2_dev" if self.guided else "flux_2_klein"

    def levels_of(self, scheduler: Component) -> Flow:
        """The latents are patches already: a token is one of their pixels."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return Flow.of(scheduler, 1, lambda tokens: compute_empirical_mu(int(tokens), _STEPS))

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [b, 3, h, w] in [-1, 1] -> mean and standard deviation of the latents [b, 4 c, h / 2 f, w / 2 f]."""
        mean, std = map(patchified, moments(self.parts("vae"), pixels))
        return standardised(self.parts("vae"), mean, std)

    def read(self, encoder: str, prompt: str, device: torch.device) -> Conditions:
        """Hidden states [n, 3 width], filled up to the number of tokens that are read."""
        text, _ = self.pipe.encode_prompt([prompt], device, max_sequence_length=self.max_length)
        return {"text": text[0]}

    def condition(self, pixels: Tensor, controls: Sequence[Tensor]) -> Conditions:
        """The means of the control images' latents."""
        return numbered([self.encode(control)[0] for control in controls])

    def pictured(self, images: Sequence[Image], size: tuple[int, int]) -> Prompted:
        """The control images."""
        return {"image": list(images)} if images else {}

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """The transformer reads one token a pixel of x and of control images, with places in four axes: a picture has a number, rows and columns."""
        import torch

        controls, ids = in_order(read), self.pipe._prepare_latent_ids(x)
        if controls:
            beside = self.pipe._prepare_image_ids([z[:1] for z in controls])
            ids = torch.cat([ids, beside.expand(len(x), -1, -1).to(ids)], dim=1)
        answer = model(
            hidden_states=torch.cat([z.flatten(2).mT for z in (x, *controls)], dim=1),
            timestep=t.to(x.dtype),
            guidance=x.new_ones(len(x)) if self.guided else None,
            encoder_hidden_states=read["text"],
            txt_ids=sent(self.pipe._prepare_text_ids(read["text"]), x.device),
            img_ids=sent(ids, x.device),
            return_dict=False,
        )[0][:, : x[0, 0].numel()]
        return answer.mT.unflatten(2, x.shape[2:])

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> Prompted:
        """As the pipelines take prompts; dev's has no negative ones."""
        texts = {"prompt_embeds": prompts["text"]}
        return texts if self.guided else texts | {"negative_prompt_embeds": negative["text"]}


def standardised(vae: Component, mean: Tensor, std: Tensor, epsilon: float | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [b, c, h, w] of latents, over those that a VAE's batch norm has seen."""
    epsilon = vae.config.batch_norm_eps if epsilon is None else epsilon
    centre, scale = vae.bn.running_mean.to(mean), (vae.bn.running_var.to(mean) + epsilon).sqrt()
    return (mean - spread(centre, mean, 1)) / spread(scale, mean, 1), std / spread(scale, mean, 1)
