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

# the longer name first: a class is of the first family whose name it starts with
_CLASSES = {
    "StableDiffusionXL": "sdxl",
    "StableDiffusion3": "sd3",
    "StableDiffusion": "sd15",
    "Flux2": "flux2",
    "Flux": "flux",
    "UNet2DConditionModel": "sd15",
}
_WIDTHS = {1024: "sd2", 2048: "sdxl"}  # cross-attention widths of families that share the class UNet2DConditionModel


def family_of(target: Any) -> str | None:
    """The family id of a pipeline or model, by its class; None if the class does not tell. SD2.x is SD1.x with a cross-attention width of 1024."""
    family = next((family for start, family in _CLASSES.items() if type(target).__name__.startswith(start)), None)
    if family != "sd15":
        return family
    config = getattr(getattr(target, "unet", target), "config", None)
    return _WIDTHS.get(getattr(config, "cross_attention_dim", None), family)  # type: ignore[arg-type]


def open_family(pipe: Any) -> Family:
    """The training side of a pipeline. Raises WrongBaseError for one that cannot be trained yet."""
    family = family_of(pipe)
    if family not in FAMILIES:
        raise WrongBaseError(
            f"a {type(pipe).__name__} cannot be trained", remedy=f"The families that can are {', '.join(FAMILIES)}."
        )
    return FAMILIES[family](pipe)  # type: ignore[call-arg]


__all__ = ["FAMILIES", "Family", "Noised", "family_of", "open_family"]
