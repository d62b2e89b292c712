"""Cosmos 2 and 2.5 (NVIDIA 2025, arXiv:2511.00062): to an image, or to a video from a text or its first frame. T5's hidden states with zeros behind, or every
layer of Qwen2.5-VL's.

Cosmos 2 draws z + s n with s from 80 down. Scaled by 1 / (1 + s) that is a straight line, whose share of noise s / (1 + s) is the time that the transformer
reads and whose velocity is what it says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffpeft.families.base import CaptionReading, Conditions, Levels, Prompted
from diffpeft.families.dit import ClipTransformer, FirstInPlace, Transformer, in_blocks
from diffpeft.families.flow import Flow
from diffpeft.families.latents import of_one_frame, spread
from diffpeft.families.packages import check_imported

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffpeft.families.parts import Component, Parts

_NO_NOISE = 1e-4  # s of a first frame, as the pipelines have it


class Cosmos(Transformer):
    """The training side of a Cosmos2TextToImagePipeline. Its VAE is one of clips: an image is a clip of one frame."""

    name = "Cosmos"
    pipelines: tuple[str, ...] = ("Cosmos2TextToImagePipeline",)
    presets = in_blocks(r"transformer_blocks\.\d+", r"attn[12]\.(to_[qkv]|to_out\.0)", r"ff\.net\.(0\.proj|2)")
    drawing_steps = 35
    architecture = "cosmos-predict2"
    base_version = "cosmos_predict2"

    def __init__(self, parts: Parts, reading: CaptionReading):
        super().__init__(parts, reading)
        model = type(parts.outline(self.denoiser))
        check_imported(model, "transforms", "torchvision", "the transformer scales a mask of the frame")

    def levels_of(self, scheduler: Component) -> Levels:
        """Shares of noise, whatever the steps of the scheduler."""
        return Flow()

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [b, 3, h, w] in [-1, 1] -> mean and standard deviation of the latents [b, c, h / f, w / f]."""
        return of_one_frame(self.parts("vae"), pixels)

    def read(self, encoder: str, prompt: str, device: torch.device) -> Conditions:
        """Hidden states [n, width] of as many tokens as are read."""
        texts, _ = self.pipe.encode_prompt(
            [prompt], do_classifier_free_guidance=False, device=device, max_sequence_length=self.max_length
        )
        return {"text": texts[0]}

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """Time is the share of noise."""
        return self.answer(model, x.unsqueeze(2), t, read).squeeze(2)

    def answer(self, model: Component, x: Tensor, time: Tensor, read: Conditions, **more: object) -> Tensor:
        """What the transformer says of latents x [b, c, f, h, w] that fill the frame, at times [b] or [b, 1, f, 1, 1]."""
        pixels = self.pipe.vae_scale_factor_spatial
        answer: Tensor = model(
            hidden_states=x,
            timestep=time.to(x.dtype),
            encoder_hidden_states=read["text"],
            padding_mask=x.new_zeros(1, 1, *(side * pixels for side in x.shape[3:])),
            return_dict=False,
            **more,
        )[0]
        return answer

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> Prompted:
        """As the pipelines take prompts."""
        return {"prompt_embeds": prompts["text"], "negative_prompt_embeds": negative["text"]}


class CosmosClips(ClipTransformer, Cosmos):
    """One of clips. Time is by frame, and a mask says which frames are known."""

    frames_a_second = 16
    side = 720  # of videos of 704 x 1280 the shorter, in whole tokens

    @classmethod
    def channels(cls, latent: int) -> int:
        """Latents, and which are known."""
        return latent + 1

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """Nothing is known."""
        time = spread(t, x).expand(-1, 1, x.shape[2], 1, 1)
        return self.answer(model, x, time, read, condition_mask=x.new_zeros(len(x), 1, *x.shape[2:]))

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> Prompted:
        """As the pipelines take prompts, for single frames."""
        return super().prompted(prompts, negative, blank) | {"num_frames": 1}


class CosmosImageToVideo(FirstInPlace, CosmosClips):
    """The training side of a Cosmos2VideoToWorldPipeline that is shown an image: the first frame of a clip, in its place almost without noise."""

    pipelines: tuple[str, ...] = ("Cosmos2VideoToWorldPipeline",)
    architecture = "cosmos-predict2-i2v"

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """The first frame is at next to no noise."""
        import torch

        if "first" not in read:
            return super().velocity(model, x, t, read)
        time = spread(t, x).repeat(1, 1, x.shape[2], 1, 1)
        time[:, :, 0] = _NO_NOISE / (1 + _NO_NOISE)
        mask = x.new_zeros(len(x), 1, *x.shape[2:])
        mask[:, :, 0] = 1
        return self.answer(model, torch.cat([read["first"], x[:, :, 1:]], 2), time, read, condition_mask=mask)

    def answer(self, model: Component, x: Tensor, time: Tensor, read: Conditions, **more: object) -> Tensor:
        """With the rate of frames."""
        return super().answer(model, x, time, read, **more, fps=int(self.rate or 0))


class Cosmos25(CosmosClips):
    """The training side of a Cosmos2_5_PredictBasePipeline, from a text."""

    name = "Cosmos 2.5"
    pipelines: tuple[str, ...] = ("Cosmos2_5_PredictBasePipeline",)
    architecture = "cosmos-predict2.5"
    base_version = "cosmos_predict2_5"

    def levels_of(self, scheduler: Component) -> Levels:
        """Those of the scheduler, which is one of a flow."""
        return Flow.of(scheduler, self.patch)
