"""Kandinsky 5 (Kandinsky Lab 2025, arXiv:2511.14993), to video from a text or an image: clips with channels last, Qwen2.5-VL's hidden states after those of the
template, and what CLIP pools. It reads no mask: examples whose texts have other lengths are asked for apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from diffpeft.families.base import CaptionReading, Conditions, Prompted, Sizes
from diffpeft.families.dit import ClipTransformer, FirstInPlace, in_blocks
from diffpeft.families.prompts import by_length

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffpeft.families.parts import Component, Configs, Parts

_EVENED = 4  # frames of latents, which the pipeline evens out by those behind
_SQUARE = 8  # tokens, the side of what sparse attention chooses


class Kandinsky5Video(ClipTransformer):
    """The training side of a Kandinsky5T2VPipeline. Presets leave out the blocks of texts."""

    name = "Kandinsky 5"
    pipelines: tuple[str, ...] = ("Kandinsky5T2VPipeline",)
    text_encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2")
    presets = in_blocks(
        r"visual_transformer_blocks\.\d+",
        r"(self|cross)_attention\.(to_(query|key|value)|out_layer)",
        r"feed_forward\.(in|out)_layer",
    )
    side = 640  # about the area of 512 x 768
    most_tokens = 1024
    architecture = "kandinsky-5-video"
    base_version = "kandinsky5_video"

    @classmethod
    def sizes(cls, configs: Configs) -> Sizes:
        """Whole tokens, and squares of them where attention is sparse."""
        sizes = super().sizes(configs)
        sparse = configs.get(cls.denoiser, {}).get("attention_type") == "nabla"
        return sizes._replace(multiple=sizes.multiple * _SQUARE) if sizes.multiple and sparse else sizes

    def read(self, encoder: str, prompt: str, device: torch.device) -> Conditions:
        """Qwen's hidden states [n, width] of as many tokens as a prompt has, or what CLIP pools [width]."""
        import torch
        from diffusers.pipelines.kandinsky5.pipeline_kandinsky import prompt_clean

        cleaned = [prompt_clean(prompt)]
        if encoder == "text_encoder_2":
            return {"pooled": self.pipe._encode_prompt_clip(cleaned, device)[0]}
        texts, _ = self.pipe._encode_prompt_qwen(cleaned, device, self.max_length)
        return {"text": texts[0], "length": torch.tensor(texts.shape[1])}

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """Time is a thousand times the share of noise."""
        return self.answer(model, x, t, read)

    def answer(self, model: Component, x: Tensor, t: Tensor, read: Conditions, known: int = 0) -> Tensor:
        """What the transformer says of latents of which so many frames are known. Beside them there are zeros, and a mask of these frames."""
        import torch

        clip, pixels = x.movedim(1, -1), self.pipe.vae_scale_factor_spatial
        if model.config.visual_cond:
            mask = torch.zeros_like(clip[..., :1])
            mask[:, :known] = 1
            clip = torch.cat([clip, torch.zeros_like(clip), mask], dim=-1)
        scale = self.pipe._get_scale_factor(*(side * pixels for side in x.shape[3:]))
        return asked_of(model, clip, t, read, self.patch, scale, lambda z: self.pipe.get_sparse_params(z, x.device))

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> Prompted:
        """As a Kandinsky5T2VPipeline takes prompts, for single frames. Those of other lengths are filled up at the end, where it has no way to say so."""
        import torch

        keywords: Prompted = {"num_frames": 1}
        for prefix, read in (("", prompts), ("negative_", negative)):
            keywords[f"{prefix}prompt_embeds_qwen"] = read["text"]
            keywords[f"{prefix}prompt_embeds_clip"] = read["pooled"]
            ends = torch.nn.functional.pad(read["length"].cumsum(0), (1, 0))
            keywords[f"{prefix}prompt_cu_seqlens"] = ends.to(torch.int32)
        return keywords


def asked_of(
    model: Component,
    clip: Tensor,
    t: Tensor,
    read: Conditions,
    patch: int,
    scale: Sequence[float],
    sparse: Callable[[Tensor], object] = lambda _: None,
) -> Tensor:
    """What the transformer says of clips with channels last [b, f, h, w, c], as [b, c, f, h, w]."""
    import torch

    clip, sizes = clip.contiguous(), (clip.shape[1], *(side // patch for side in clip.shape[2:4]))
    places = [torch.arange(n, device=clip.device) for n in sizes]

    def answered(rows: Tensor, length: int) -> Tensor:
        answer: Tensor = model(
            hidden_states=clip[rows],
            encoder_hidden_states=read["text"][rows, :length],
            pooled_projections=read["pooled"][rows],
            timestep=1000 * t[rows],
            visual_rope_pos=places,
            text_rope_pos=torch.arange(length, device=clip.device),
            scale_factor=scale,
            sparse_params=sparse(clip[rows]),
        ).sample
        return answer.movedim(-1, 1)

    channels = model.config.out_visual_dim
    return by_length(read["length"], clip[..., :channels].movedim(-1, 1), answered)


class Kandinsky5ImageToVideo(FirstInPlace, Kandinsky5Video):
    """The training side of a Kandinsky5I2VPipeline, which has one time for all frames."""

    pipelines: tuple[str, ...] = ("Kandinsky5I2VPipeline",)
    architecture = "kandinsky-5-video-i2v"

    def __init__(self, parts: Parts, reading: CaptionReading):
        super().__init__(parts, reading)
        evened = type(parts.pipe).normalize_first_frame
        parts.pipe.normalize_first_frame = lambda z: evened(parts.pipe, z) if z.shape[1] > _EVENED else z

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """The first frame is in its place."""
        import torch

        if "first" not in read:
            return super().velocity(model, x, t, read)
        return self.answer(model, torch.cat([read["first"], x[:, :, 1:]], 2), t, read, known=1)
