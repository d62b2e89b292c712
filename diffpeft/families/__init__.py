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


def open_family(pipe: Any) -> Family:
    """The training side of a pipeline. Raises WrongBaseError for one that cannot be trained yet."""
    family = family_of(pipe)
    if family not in FAMILIES:
        raise WrongBaseError(
            f"a {type(pipe).__name__} cannot be trained", remedy=f"The families that can are {', '.join(FAMILIES)}."
        )
    return FAMILIES[family](pipe)  # type: ignore[call-arg]


__all__ = ["FAMILIES", "Family", "Noised", "family_of", "open_family"]
