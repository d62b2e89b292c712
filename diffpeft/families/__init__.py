"""What a model family needs beyond the names of its layers: which pipelines are of it, and how a training step adds noise and what it predicts."""
from __future__ import annotations

from typing import Any

_CLASSES = {"StableDiffusionXL": "sdxl", "StableDiffusion3": "sd3", "StableDiffusion": "sd15", "Flux": "flux", "UNet2DConditionModel": "sd15"}


def family_of(target: Any) -> str | None:
    """The family id of a pipeline or model, by its class; None if the class does not tell. SD2.x is SD1.x with a cross-attention width of 1024."""
    name = type(target).__name__
    family = next((family for start, family in _CLASSES.items() if name.startswith(start)), None)
    if family == "sd15":
        unet = getattr(target, "unet", target)
        width = getattr(getattr(unet, "config", None), "cross_attention_dim", None)
        return {1024: "sd2", 2048: "sdxl"}.get(width, family) if name == "UNet2DConditionModel" else {1024: "sd2"}.get(width, family)
    return family
