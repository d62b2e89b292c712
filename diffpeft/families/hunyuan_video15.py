"""HunyuanVideo 1.5 (Tencent 2025, arXiv:2511.18870), text to video: clips [b, c, f, h, w] beside zeros where other tasks have a first frame and its mask,
Qwen2.5-VL's hidden states after those of the template, and ByT5's of the words that a caption has in quotation marks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffpeft.families.base import CaptionReading, Conditions, Prompted
from diffpeft.families.devices import sent
from diffpeft.families.dit import ClipTransformer, counted, in_blocks, in_last_block
from diffpeft.families.frames import alone, first_of, images_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffpeft.families.parts import Component, Parts


class HunyuanVideo15(ClipTransformer):
    """The training side of a HunyuanVideo15Pipeline, whose guidance is a component of its own: the guider. Presets leave out the refiner of texts."""

    name = "HunyuanVideo 1.5"
    pipelines: tuple[str, ...] = ("HunyuanVideo15Pipeline",)
    text_encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2")
    presets = in_blocks(
        r"transformer_blocks\.\d+",
        r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
        r"ff(_context)?\.net\.(0\.proj|2)",
    )
    idle = "image_embedder|context_embedder_2"  # few captions have a word in quotation marks
    patch = 1
    side = 640  # about the area of 480 x 848
    tokens = most_tokens = 1000
    architecture = "hunyuan-video-1.5"
    base_version = "hunyuan_video_1_5"

    def __init__(self, parts: Parts, reading: CaptionReading):
        super().__init__(parts, reading)
        stream = in_last_block(parts.configs[self.denoiser], r"attn\.(add_q_proj|to_add_out)|ff_context\..*")
        self.unread = {self.denoiser: rf"{stream}|({self.idle})\..*"}

    @classmethod
    def channels(cls, latent: int) -> int:
        """Latents, those of a first frame, and its mask."""
        return 2 * latent + 1

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [b, 3, h, w] or [b, 3, f, h, w] in [-1, 1] -> mean and standard deviation of the latents [b, c, f / 4, h / 16, w / 16]."""
        self._one_by_one(self.parts("vae"))
        return super().encode(pixels)

    def _one_by_one(self, vae: Component) -> None:
        """Have the VAE, which fails on several clips, take one after the other."""
        vae.enable_slicing()

    def read(self, encoder: str, prompt: str, device: torch.device) -> Conditions:
        """Hidden states [n, width] of as many tokens as a prompt has; of the second encoder one that does not count, where it reads nothing."""
        import torch

        pipe, model = self.pipe, self.parts(encoder)
        if encoder == "text_encoder_2":
            states, mask = pipe._get_byt5_prompt_embeds(
                pipe.tokenizer_2, model, prompt, device, pipe.tokenizer_2_max_length
            )
            n = int(mask.sum())
            return {"glyphs": states[0, : max(n, 1)], "glyphs_length": torch.tensor(n)}
        states, mask = pipe._get_mllm_prompt_embeds(
            model,
            pipe.tokenizer,
            prompt,
            device,
            self.max_length,
            system_message=pipe.system_message,
            crop_start=pipe.prompt_template_encode_start_idx,
        )
        text = states[0][mask[0].bool()]
        return {"text": text, "length": torch.tensor(len(text))}

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """There is no first frame: zeros. An image that is all zeros is none."""
        import torch

        known, image = torch.zeros_like(x), x.new_zeros(len(x), 1, model.config.image_embed_dim)
        return self.answer(model, [x, known, known[:, :1]], t, read, image)

    def answer(self, model: Component, beside: Sequence[Tensor], t: Tensor, read: Conditions, image: Tensor) -> Tensor:
        """What the transformer says of latents, those of a first frame, and which are known. Time is a thousand times the share of noise."""
        import torch

        x = torch.cat([*beside], dim=1)
        masks = {name: sent(mask.to(x.dtype), x.device) for name, mask in _masks(read).items()}
        return model(
            hidden_states=x,
            timestep=(1000 * t).to(x.dtype),
            encoder_hidden_states=read["text"],
            encoder_attention_mask=masks["text"],
            encoder_hidden_states_2=read["glyphs"],
            encoder_attention_mask_2=masks["glyphs"],
            image_embeds=image,
            return_dict=False,
        )[0]

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> Prompted:
        """As a HunyuanVideo15Pipeline takes prompts, for single frames."""
        if self.pipe.vae is not None:
            self._one_by_one(self.pipe.vae)
        keywords: Prompted = {"num_frames": 1}
        for prefix, read in (("", prompts), ("negative_", negative)):
            masks = _masks(read)
            for name, number in (("text", ""), ("glyphs", "_2")):
                keywords[f"{prefix}prompt_embeds{number}"] = read[name]
                keywords[f"{prefix}prompt_embeds_mask{number}"] = masks[name].long()
        return keywords


class HunyuanVideo15ImageToVideo(HunyuanVideo15):
    """The training side of a HunyuanVideo15ImageToVideoPipeline, which is shown the first frame of a clip."""

    pipelines: tuple[str, ...] = ("HunyuanVideo15ImageToVideoPipeline",)
    first_frame = True
    viewers: tuple[str, ...] = ("vae", "image_encoder")
    idle = "context_embedder_2"
    architecture = "hunyuan-video-1.5-i2v"

    def condition(self, pixels: Tensor, controls: Sequence[Tensor]) -> Conditions:
        """The first frame's latents with zeros behind, and what SigLIP sees of it."""
        import torch

        frame, count = first_of(pixels)
        latents, _ = self.encode(frame)
        model, pipe = self.parts("image_encoder"), self.pipe
        with torch.no_grad():
            seen = [
                pipe._get_image_embeds(model, pipe.feature_extractor, image, model.device) for image in images_of(frame)
            ]
        return {"known": alone(latents, self.frames_of(count)), "image": torch.cat(seen)}

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """The mask is of the first frame."""
        import torch

        mask = torch.zeros_like(x[:, :1])
        mask[:, :, 0] = 1
        return self.answer(model, [x, read["known"], mask], t, read, read["image"])


def _masks(read: Conditions) -> dict[str, Tensor]:
    """Which tokens of both texts count [b, n], on the host."""
    lengths = {"text": read["length"], "glyphs": read["glyphs_length"]}
    return {name: counted(length, read[name].shape[1]) for name, length in lengths.items()}
