"""CogVideoX 1.0 and 1.5 (Yang et al. 2024, arXiv:2408.06072), text to video: clips [b, c, f, h, w] at discrete levels of noise, one attention over T5's hidden
states and patches, and no mask. 1.5 reads two frames of latents as one: a clip with one too few has its first twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffpeft.errors import ConfigError, WrongBaseError
from diffpeft.families.base import CaptionReading, Conditions, Levels, Prompted, Sizes
from diffpeft.families.discrete import Discrete
from diffpeft.families.dit import ClipTransformer, in_blocks
from diffpeft.families.frames import alone, first_of
from diffpeft.families.latents import moments

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffpeft.families.parts import Component, Configs, Parts

_OFS = 2.0  # the pipeline's


class CogVideoX(ClipTransformer):
    """The training side of a CogVideoXPipeline."""

    name = "CogVideoX"
    pipelines: tuple[str, ...] = ("CogVideoXPipeline",)
    presets = in_blocks(r"transformer_blocks\.\d+", r"attn1\.(to_[qkv]|to_out\.0)", r"ff\.net\.(0\.proj|2)")
    side = 592  # about the area of 480 x 720
    tokens = most_tokens = 226
    architecture = "cogvideox"
    base_version = "cogvideox"

    def __init__(self, parts: Parts, reading: CaptionReading):
        config = parts.configs[self.denoiser]
        self.tokens = self.most_tokens = config["max_text_seq_length"]
        super().__init__(parts, reading)
        if config["patch_size_t"]:
            parts.pipe._prepare_rotary_positional_embeddings = self._places
        if self.max_length != self.tokens and not config["use_rotary_positional_embeddings"]:
            raise ConfigError(
                f"max_length is {self.max_length}",
                remedy=f"The places of this CogVideoX are for {self.tokens} tokens: leave --max-length out.",
            )

    @classmethod
    def sizes(cls, configs: Configs) -> Sizes:
        """1.0 was made for 8 frames a second, 1.5 for 16."""
        newer = configs.get(cls.denoiser, {}).get("patch_size_t")
        return super().sizes(configs)._replace(rate=16 if newer else 8)

    def levels_of(self, scheduler: Component) -> Levels:
        """By betas, shifted to more noise."""
        return Discrete(scheduler)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [b, 3, h, w] or [b, 3, f, h, w] in [-1, 1] -> mean and standard deviation of the latents, whose frames fill whole patches."""
        import torch

        mean, std = super().encode(pixels)
        mean, std = (torch.cat([*[t[:, :, :1]] * self._lacking(t.shape[2]), t], dim=2) for t in (mean, std))
        return mean, std

    def _lacking(self, frames: int) -> int:
        """How many frames of latents there are too few for whole patches."""
        patch: int = self.parts.configs[self.denoiser]["patch_size_t"] or 1
        return -frames % patch

    def _places(self, height: int, width: int, frames: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The places of 1.5 in clips of this size in pixels: whole numbers from 0. The pipeline's own are a cut out of the largest size that it was made for,
        and there are none beyond, so that tall pictures would have too few.
        """
        from diffusers.models.embeddings import get_3d_rotary_pos_embed

        config = self.parts.configs[self.denoiser]
        side = self.pipe.vae_scale_factor_spatial * config["patch_size"]
        grid = (height // side, width // side)
        cos, sin = get_3d_rotary_pos_embed(
            config["attention_head_dim"], None, grid, -(-frames // config["patch_size_t"]), grid_type="slice",
            max_size=grid, device=device,
        )  # fmt: skip
        return cos, sin

    def read(self, encoder: str, prompt: str, device: torch.device) -> Conditions:
        """T5's hidden states [n, width], filled up."""
        texts, _ = self.pipe.encode_prompt([prompt], None, False, device=device, max_sequence_length=self.max_length)
        return {"text": texts[0]}

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """v or epsilon, as the scheduler says."""
        return self.answer(model, x, t, read)

    def answer(self, model: Component, x: Tensor, t: Tensor, read: Conditions, **more: Tensor | None) -> Tensor:
        """What the transformer, which has frames before channels, says of what it reads [b, c, f, h, w]."""
        frames, height, width = x.shape[2:]
        pixels, places = self.pipe.vae_scale_factor_spatial, None
        if model.config.use_rotary_positional_embeddings:
            places = self.pipe._prepare_rotary_positional_embeddings(height * pixels, width * pixels, frames, x.device)
        return model(
            hidden_states=x.transpose(1, 2),
            encoder_hidden_states=read["text"],
            timestep=t,
            image_rotary_emb=places,
            return_dict=False,
            **more,
        )[0].transpose(1, 2)

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> Prompted:
        """As a CogVideoXPipeline takes prompts, for single frames."""
        return {"prompt_embeds": prompts["text"], "negative_prompt_embeds": negative["text"], "num_frames": 1}


class CogVideoXImageToVideo(CogVideoX):
    """The training side of a CogVideoXImageToVideoPipeline: the first frame of a clip is known."""

    pipelines: tuple[str, ...] = ("CogVideoXImageToVideoPipeline",)
    first_frame = True
    architecture = "cogvideox-i2v"

    def __init__(self, parts: Parts, reading: CaptionReading):
        super().__init__(parts, reading)
        if parts.configs[self.denoiser]["use_learned_positional_embeddings"]:
            raise WrongBaseError(
                "the places that this CogVideoX has learnt are of clips of one size: it cannot be trained",
                remedy="Take CogVideoX 1.5.",
            )

    @classmethod
    def channels(cls, latent: int) -> int:
        """Latents, and those of the first frame."""
        return 2 * latent

    def condition(self, pixels: Tensor, controls: Sequence[Tensor]) -> Conditions:
        """The first frame's latents with zeros behind, scaled as the model was trained."""
        frame, count = first_of(pixels)
        vae, frames = self.parts("vae"), self.frames_of(count)
        scale = vae.config.scaling_factor
        known = moments(vae, frame)[0] * (1 / scale if vae.config.invert_scale_latents else scale)
        return {"known": alone(known, frames + self._lacking(frames))}

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """v or epsilon. Some models read a number beside the time that is always the same."""
        import torch

        ofs = None if model.config.ofs_embed_dim is None else x.new_full((1,), _OFS)
        return self.answer(model, torch.cat([x, read["known"]], dim=1), t, read, ofs=ofs)
