"""What a model family needs beyond the names of its layers: which pipelines are of it, and how a training step adds noise and what it predicts."""

from __future__ import annotations

from typing import Any

from diffpeft.errors import WrongBaseError
from diffpeft.families.base import Family, Noised
from diffpeft.families.sd import StableDiffusion

FAMILIES: dict[str, type[Family]] = {
    "sd15": StableDiffusion,
    "sd2": StableDiffusion,
}

# {what the names of pipelines' and models' classes begin with: the family}; of several that fit, the longest counts. None: a model of its own.
_CLASSES = {
    "StableDiffusion": "sd15",
    "UNet2DConditionModel": "sd15",
    "StableDiffusionXL": "sdxl",
    "StableDiffusion3": "sd3",
    "SD3": "sd3",
    "Flux": "flux",
    "Flux2": "flux2",
    "Flux3": None,
    "Chroma": "chroma",
    "Wan": "wan",
    "QwenImage": "qwen_image",
    "QwenImage21": None,
    "ZImage": "z_image",
    "Lumina2": "lumina2",
    "HunyuanVideo": "hunyuan_video",
    "HunyuanVideo15": None,
    "PixArt": "pixart",
    "Sana": "sana",
    "SanaVideo": None,
    "SanaWM": None,
    "AuraFlow": "auraflow",
    "LTX": "ltx",
    "Mochi": "mochi",
    "CogVideoX": "cogvideox",
    "HiDream": "hidream",
}
# the cross-attention widths that tell families with one class apart: {the class's family: {width: family}}
_WIDTHS = {"sd15": {1024: "sd2", 2048: "sdxl"}, "sdxl": {1280: "sdxl_refiner"}}


def family_of(target: Any) -> str | None:
    """The family id of a pipeline or model, by its class; None if the class does not tell. SD2.x is SD1.x with a cross-attention width of 1024."""
    name = type(getattr(target, "_orig_mod", target)).__name__  # within torch.compile's module
    starts = [start for start in _CLASSES if name.startswith(start)]
    family = _CLASSES[max(starts, key=len)] if starts else None
    config = getattr(getattr(target, "unet", target), "config", None)
    width = getattr(config, "cross_attention_dim", None)
    return _WIDTHS.get(family or "", {}).get(width, family) if isinstance(width, int) else family


def check_trainable(pipeline: str, input_channels: int | None, image_channels: int | None, where: object = "") -> None:
    """Raise WrongBaseError for a class of pipelines that cannot be trained yet, or a denoiser that reads more than the latents of one image.

    Channels that are not known are None.
    """
    classes = dict.fromkeys(name for family in FAMILIES.values() for name in family.pipelines)
    if pipeline not in classes:
        raise WrongBaseError(
            f"a {pipeline} cannot be trained",
            where=where,
            remedy=f"The families that can are {', '.join(FAMILIES)}: a {' or a '.join(classes)}.",
        )
    if input_channels and image_channels and input_channels != image_channels:
        raise WrongBaseError(
            f"its denoiser reads {input_channels} channels and not the {image_channels} of an image: it cannot be trained",
            where=where,
            remedy="It is for inpainting, editing or upscaling: take the model that it was made from.",
        )


def open_family(pipe: Any) -> Family:
    """The training side of a pipeline. Raises WrongBaseError for one that cannot be trained yet."""
    denoiser, vae = (getattr(getattr(pipe, part, None), "config", None) for part in ("unet", "vae"))
    check_trainable(type(pipe).__name__, getattr(denoiser, "in_channels", None), getattr(vae, "latent_channels", None))
    family = family_of(pipe)
    if family not in FAMILIES:
        raise WrongBaseError(
            f"a {type(pipe).__name__} with the text width of {family} cannot be trained",
            remedy=f"The families that can are {', '.join(FAMILIES)}.",
        )
    return FAMILIES[family](pipe)  # type: ignore[call-arg]


__all__ = ["FAMILIES", "Family", "Noised", "check_trainable", "family_of", "open_family"]
