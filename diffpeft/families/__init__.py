"""What a model family needs beyond the names of its layers: which pipelines are of it, and how a training step adds noise and what it predicts."""

from __future__ import annotations

from collections.abc import Mapping

from diffpeft.errors import WrongBaseError
from diffpeft.families.base import Family, Noised
from diffpeft.families.sd import StableDiffusion

FAMILIES: dict[str, type[Family]] = {
    "sd15": StableDiffusion,
    "sd2": StableDiffusion,
}

# {diffusers' class of a denoiser: the family whose layer names and sizes it has}. A class that is not here is of no family that is known.
_MODELS = {
    "UNet2DConditionModel": "sd15",
    "SD3Transformer2DModel": "sd3",
    "FluxTransformer2DModel": "flux",
    "Flux2Transformer2DModel": "flux2",
    "ChromaTransformer2DModel": "chroma",
    "WanTransformer3DModel": "wan",
    "WanVACETransformer3DModel": "wan",
    "WanAnimateTransformer3DModel": "wan",
    "QwenImageTransformer2DModel": "qwen_image",
    "ZImageTransformer2DModel": "z_image",
    "Lumina2Transformer2DModel": "lumina2",
    "HunyuanVideoTransformer3DModel": "hunyuan_video",
    "PixArtTransformer2DModel": "pixart",
    "SanaTransformer2DModel": "sana",
    "AuraFlowTransformer2DModel": "auraflow",
    "LTXVideoTransformer3DModel": "ltx",
    "LTX2VideoTransformer3DModel": "ltx2",
    "MochiTransformer3DModel": "mochi",
    "CogVideoXTransformer3DModel": "cogvideox",
    "HiDreamImageTransformer2DModel": "hidream",
}
# {what the names of pipelines begin with: the family}, where the denoiser is a UNet or none is there; of several that fit, the longest counts
_PIPELINES = {
    "StableDiffusion": "sd15",
    "StableDiffusionXL": "sdxl",
    "StableDiffusion3": "sd3",
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
    "HunyuanVideoFramepack": None,
    "PixArt": "pixart",
    "Sana": "sana",
    "SanaVideo": None,
    "SanaImageToVideo": None,
    "SanaWM": None,
    "AuraFlow": "auraflow",
    "LTX": "ltx",
    "LTX2": "ltx2",
    "Mochi": "mochi",
    "CogVideoX": "cogvideox",
    "HiDream": "hidream",
}
# the cross-attention widths that tell families with one class apart: {the class's family: {width: family}}
_UNETS = {768: "sd15", 1024: "sd2", 2048: "sdxl", 1280: "sdxl_refiner"}
_WIDTHS = {"sd15": {1024: "sd2", 2048: "sdxl", 1280: "sdxl_refiner"}, "sdxl": {1280: "sdxl_refiner"}}


def family_of(target: object) -> str | None:
    """The family id of a pipeline or model, by the class of its denoiser; None if that tells none. UNets have one class: of these the pipeline's name
    tells, and the cross-attention width (SD2.x is SD1.x with one of 1024).
    """
    denoiser = _denoiser(target)
    family = _by_class(denoiser)
    width = getattr(getattr(denoiser, "config", None), "cross_attention_dim", None)
    if denoiser is None or (family == "sd15" and isinstance(getattr(target, "components", None), Mapping)):
        family = _by_name(target) if denoiser is None or width not in _UNETS else _by_name(target) or _UNETS[width]
    return _WIDTHS.get(family or "", {}).get(width, family) if isinstance(width, int) else family


def is_unnamed(target: object) -> bool:
    """Whether a pipeline or model has one of diffusers' denoisers, and no family here has its layer names."""
    denoiser = _denoiser(target)
    return family_of(target) is None and any(
        base.__module__.startswith("diffusers.") for base in type(denoiser).__mro__
    )


def _denoiser(target: object) -> object:
    """A pipeline's transformer or UNet, or the model that was given; without the module of torch.compile around it."""
    parts = getattr(target, "components", None)
    if isinstance(parts, Mapping):
        models = (parts.get(name) for name in ("transformer", "unet", "transformer_2"))
        target = next((model for model in models if model is not None), None)
    return getattr(target, "_orig_mod", target)


def _by_name(pipe: object) -> str | None:
    """The family of a pipeline's class by its name, or of one that it is derived from."""
    for base in type(pipe).__mro__:
        if starts := [start for start in _PIPELINES if base.__name__.startswith(start)]:
            return _PIPELINES[max(starts, key=len)]
    return None


def _by_class(model: object) -> str | None:
    """The family of a model's class, or of one that it is derived from."""
    return next((_MODELS[base.__name__] for base in type(model).__mro__ if base.__name__ in _MODELS), None)


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


def open_family(pipe: object) -> Family:
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
