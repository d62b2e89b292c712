"""Flux.1 (Black Forest Labs 2024): a transformer on 2 x 2 patches of latents, T5's hidden states, what CLIP pools, and flow matching.

Its dev model was distilled to be told a guidance. Training tells it 1: no guidance.

Kontext reads the latents of a picture to edit as further tokens, in a place of their own. The control models (depth, canny) read those of a picture that lies
over the one that is drawn, in the channels of the same tokens. Fill reads a picture with a hole and the mask of it in these channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from diffpeft.errors import ConfigError
from diffpeft.families.base import CaptionReading, Conditions, Frame, Levels, Prompted, Sizes
from diffpeft.families.controls import in_order, luma, numbered
from diffpeft.families.defaults import Defaults
from diffpeft.families.devices import sent
from diffpeft.families.flow import Flow
from diffpeft.families.latents import encoded, factor, precise
from diffpeft.families.patches import PATCH, packed, places, unpacked
from diffpeft.families.prompts import refuse_skip, tokens

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from diffpeft.families.parts import Configs, Parts

_MASK = 64  # pixels of a mask to one of latents
_RESOLUTION = 1024  # no config says it
_TOKENS = 512  # of T5
# layers in the blocks of both kinds: of images and texts side by side, and of both in one
_BLOCKS = r"(single_)?transformer_blocks\.\d+\.({})"
_ATTENTION = r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
_MLP = r"ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out"


_GUIDANCE = {"cfg": "true_cfg_scale", "guidance": "guidance_scale"}


class Flux(Defaults):
    """The training side of a FluxPipeline."""

    pipelines: tuple[str, ...] = ("FluxPipeline",)
    denoiser = "transformer"
    denoisers: tuple[str, ...] = ("transformer",)
    boundary: float | None = None
    text_encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2")
    adaptable: tuple[str, ...] = ("text_encoder",)
    presets: Mapping[str, str] = MappingProxyType(
        {"attn": _BLOCKS.format(_ATTENTION), "attn-mlp": _BLOCKS.format(f"{_ATTENTION}|{_MLP}")}
    )
    unread: Mapping[str, str] = MappingProxyType({})
    base_version = "flux1"

    def __init__(self, parts: Parts, reading: CaptionReading):
        refuse_skip(reading, "of CLIP Flux.1 reads what it pools")
        self.max_length = _TOKENS if reading.max_length is None else reading.max_length
        if self.max_length > _TOKENS:
            raise ConfigError(f"max_length is {self.max_length}", remedy=f"Flux.1 reads {_TOKENS} tokens at most.")
        self.parts, self.pipe = parts, parts.pipe
        self.levels: Levels = Flow.of(parts.pipe.scheduler, PATCH)
        self.guided: bool = parts.configs[self.denoiser]["guidance_embeds"]
        self.guidance: Mapping[str, str] = _GUIDANCE if self.guided else {"cfg": _GUIDANCE["cfg"]}
        self.drawing_steps = 25 if self.guided else 4  # schnell is distilled
        self.architecture = "flux-1-dev" if self.guided else "flux-1-schnell"
        self.resolution, self.multiple = self.sizes(parts.configs).known()

    @classmethod
    def sizes(cls, configs: Configs) -> Sizes:
        """Whole patches."""
        pixels = factor(configs.get("vae", {}))
        return Sizes(_RESOLUTION, pixels * PATCH if pixels else None)

    @classmethod
    def channels(cls, latent: int) -> int:
        """Those of a patch."""
        return latent * PATCH**2

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [b, 3, h, w] in [-1, 1] -> mean and standard deviation of the latents [b, c, h / f, w / f]."""
        return encoded(self.parts("vae"), pixels)

    def embed(self, encoder: str, prompts: Sequence[str], images: Sequence[Tensor] = ()) -> Conditions:
        """What CLIP pools [b, width], or T5's hidden states [b, tokens, width]."""
        pipe, model = self.parts.pipe, self.parts(encoder)
        if encoder == "text_encoder":
            ids = tokens(pipe.tokenizer, prompts, pipe.tokenizer.model_max_length, model.device)
            return {"pooled": model(ids).pooler_output}
        return {"text": model(tokens(pipe.tokenizer_2, prompts, self.max_length, model.device))[0]}

    def framed(self, frames: Sequence[Frame]) -> Conditions:
        """Nothing: the transformer reads no sizes but that of its latents."""
        return {}

    def predict(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The transformer's velocity [b, c, h, w]."""
        import torch

        model = self.parts(self.denoiser)
        text, pooled = (sent(conditions[name], model.device).to(model.dtype) for name in ("text", "pooled"))
        controls = [sent(z, model.device).to(model.dtype) for z in in_order(conditions)]
        seen, ids = self.seen(x.to(model.dtype), controls)
        velocity = model(
            hidden_states=seen,
            timestep=t.to(model.dtype),
            guidance=torch.ones(len(x), device=x.device) if self.guided else None,
            pooled_projections=pooled,
            encoder_hidden_states=text,
            txt_ids=text.new_zeros(text.shape[1], 3),
            img_ids=ids,
        ).sample
        return precise(unpacked(velocity[:, : len(places(x))], x.shape))

    def seen(self, x: Tensor, controls: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Latents x [b, c, h, w], and those of control images, as tokens [b, n, 4 c] with their places [n, 3]."""
        return packed(x), places(x)

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> dict[str, Tensor]:
        """As a FluxPipeline takes prompts; it has negative ones on request."""
        read = {"prompt_embeds": prompts["text"], "pooled_prompt_embeds": prompts["pooled"]}
        if blank:
            return read
        return read | {"negative_prompt_embeds": negative["text"], "negative_pooled_prompt_embeds": negative["pooled"]}


class FluxKontext(Flux):
    """The training side of a FluxKontextPipeline, which draws without a picture to edit too."""

    pipelines: tuple[str, ...] = ("FluxKontextPipeline",)
    controls: tuple[int, int] = (0, 1)

    def __init__(self, parts: Parts, reading: CaptionReading):
        super().__init__(parts, reading)
        self.architecture = "flux-1-kontext-dev"

    def condition(self, pixels: Tensor, controls: Sequence[Tensor]) -> Conditions:
        """The mean of the control image's latents."""
        return numbered([self.encode(control)[0] for control in controls])

    def seen(self, x: Tensor, controls: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Those of a control image come after, and their places begin with 1."""
        import torch

        ids = [places(x), *(places(z) + z.new_tensor([1, 0, 0]) for z in controls)]
        return torch.cat([packed(z) for z in (x, *controls)], dim=1), torch.cat(ids)

    def pictured(self, images: Sequence[Image], size: tuple[int, int]) -> Prompted:
        """As it is: the pipeline would take a size of its own for it, and for what it draws."""
        area = {"max_area": size[0] * size[1]}
        return area | ({"image": images[0], "_auto_resize": False} if images else {})


class FluxControl(Flux):
    """The training side of a FluxControlPipeline."""

    pipelines: tuple[str, ...] = ("FluxControlPipeline",)
    controls: tuple[int, int] = (1, 1)
    aligned = True

    def __init__(self, parts: Parts, reading: CaptionReading):
        super().__init__(parts, reading)
        self.guidance = {"guidance": _GUIDANCE["guidance"]} if self.guided else {}

    @classmethod
    def channels(cls, latent: int) -> int:
        """Those of a patch of the picture, and of the control image's."""
        return 2 * super().channels(latent)

    def condition(self, pixels: Tensor, controls: Sequence[Tensor]) -> Conditions:
        """The mean of the control image's latents."""
        return numbered([self.encode(control)[0] for control in controls])

    def seen(self, x: Tensor, controls: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Those of the control image follow in the channels."""
        import torch

        return torch.cat([packed(z) for z in (x, *controls)], dim=2), places(x)

    def pictured(self, images: Sequence[Image], size: tuple[int, int]) -> Prompted:
        """The control image."""
        return {"control_image": images[0]}


class FluxFill(FluxControl):
    """The training side of a FluxFillPipeline. The first control image is the picture, and the second says by white what is to be filled in."""

    pipelines: tuple[str, ...] = ("FluxFillPipeline",)
    controls: tuple[int, int] = (2, 2)

    def __init__(self, parts: Parts, reading: CaptionReading):
        super().__init__(parts, reading)
        self.architecture = "flux-1-fill-dev"
        self.pixels = factor(parts.configs["vae"]) or 1

    @classmethod
    def channels(cls, latent: int) -> int:
        """Those of a patch of the picture, of the one with a hole, and the pixels of the mask, of 8 x 8 to a pixel of latents."""
        return super().channels(latent) + Flux.channels(_MASK)

    def condition(self, pixels: Tensor, controls: Sequence[Tensor]) -> Conditions:
        """The mean of the latents of the picture with a hole, and the mask with its pixels as channels."""
        import torch

        picture, mask = controls
        hole = (luma(mask) >= 0).to(picture)
        known, _ = self.encode(picture * (1 - hole))
        return numbered([known, torch.nn.functional.pixel_unshuffle(hole, self.pixels).to(known)])

    def pictured(self, images: Sequence[Image], size: tuple[int, int]) -> Prompted:
        """Both."""
        return {"image": images[0], "mask_image": images[1]}
