"""Stable Diffusion 1.x and 2.x: a UNet on latents, one CLIP text encoder, discrete noise levels, epsilon or v prediction.

x_t = sqrt(a_t) z + sqrt(1 - a_t) n; the target is n, or v = sqrt(a_t) n - sqrt(1 - a_t) z (Ho et al. 2020; Salimans and Ho 2022).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffpeft.errors import WrongBaseError, shown
from diffpeft.families.base import Noised

if TYPE_CHECKING:
    from torch import Tensor


class StableDiffusion:
    """The training side of a StableDiffusionPipeline."""

    pipelines: tuple[str, ...] = ("StableDiffusionPipeline",)
    denoiser = "unet"
    text_encoders: tuple[str, ...] = ("text_encoder",)

    def __init__(self, pipe: Any):
        from diffusers import DDPMScheduler

        self.pipe = pipe
        self.kind: str = pipe.scheduler.config.prediction_type
        if self.kind not in ("epsilon", "v_prediction", "sample"):
            raise WrongBaseError(
                f"the model predicts {shown(self.kind)} and cannot be trained",
                where="prediction_type of its scheduler",
                remedy="Models that predict epsilon, v_prediction or sample can.",
            )
        self.noise = DDPMScheduler.from_config(pipe.scheduler.config)
        self.resolution: int = pipe.unet.config.sample_size * pipe.vae_scale_factor
        self.multiple: int = pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.down_block_types) - 1)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [b, 3, h, w] in [-1, 1] -> mean and standard deviation of the scaled latents, [b, c, h / f, w / f], fp32."""
        import torch

        vae = self.pipe.vae
        with torch.no_grad():
            posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        return tuple(t.float() * vae.config.scaling_factor for t in (posterior.mean, posterior.std))

    def embed(self, prompts: list[str]) -> Tensor:
        """Prompts -> the text encoder's last hidden states [b, tokens, width]."""
        tokenizer, encoder = self.pipe.tokenizer, self.pipe.text_encoder
        ids = tokenizer(
            prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids
        return encoder(ids.to(encoder.device))[0]

    def noised(self, z: Tensor, n: Tensor, u: Tensor) -> Noised:
        """Latents and noise [b, c, h, w] at noise levels u [b] in [0, 1)."""
        t = (u * self.noise.config.num_train_timesteps).long().to(z.device)
        a = self.noise.alphas_cumprod.to(z.device)[t]
        target = n if self.kind == "epsilon" else z if self.kind == "sample" else self.noise.get_velocity(z, n, t)
        return Noised(self.noise.add_noise(z, n, t), t, target, a / (1 - a), self.kind)

    def predict(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The UNet's prediction [b, c, h, w] in fp32."""
        unet = self.pipe.unet
        return unet(x.to(unet.dtype), t, text.to(unet.dtype)).sample.float()
