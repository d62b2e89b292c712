"""What a model family needs beyond the names of its layers: which pipelines are of it, and how a training step adds noise and what it predicts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from diffpeft.converters.detection import UNETS
from diffpeft.converters.families import TABLES
from diffpeft.errors import WrongBaseError
from diffpeft.families.auraflow import AuraFlow
from diffpeft.families.base import USUAL, CaptionReading, Conditions, Family, Frame, Noised
from diffpeft.families.chroma import Chroma
from diffpeft.families.cogvideox import CogVideoX, CogVideoXImageToVideo
from diffpeft.families.cogview4 import CogView4
from diffpeft.families.cosmos import Cosmos, Cosmos25, CosmosImageToVideo
from diffpeft.families.easyanimate import EasyAnimate
from diffpeft.families.ernie_image import ErnieImage
from diffpeft.families.flux import Flux, FluxControl, FluxFill, FluxKontext
from diffpeft.families.flux2 import Flux2
from diffpeft.families.followed import FOLLOWED
from diffpeft.families.generic import Generic
from diffpeft.families.hidream import HiDream
from diffpeft.families.hunyuan_video import HunyuanVideo, SkyReelsImageToVideo
from diffpeft.families.hunyuan_video15 import HunyuanVideo15, HunyuanVideo15ImageToVideo
from diffpeft.families.ideogram4 import Ideogram4
from diffpeft.families.kandinsky5_edit import Kandinsky5Edit
from diffpeft.families.kandinsky5_video import Kandinsky5ImageToVideo, Kandinsky5Video
from diffpeft.families.krea2 import Krea2
from diffpeft.families.longcat_image_edit import LongCatImageEdit
from diffpeft.families.ltx import LTX, LTXImageToVideo
from diffpeft.families.ltx2 import LTX2, LTX2ImageToVideo
from diffpeft.families.lumina2 import Lumina2
from diffpeft.families.mochi import Mochi
from diffpeft.families.parts import Configs, Parts
from diffpeft.families.pixart import PixArt
from diffpeft.families.qwen_image import QwenImage, QwenImageEdit, QwenImageEditPlus
from diffpeft.families.sana import Sana
from diffpeft.families.sana_video import SanaImageToVideo, SanaVideo
from diffpeft.families.sd import StableDiffusion, StableDiffusion2
from diffpeft.families.sd3 import StableDiffusion3
from diffpeft.families.sdxl import StableDiffusionXL
from diffpeft.families.skyreels_v2 import SkyReelsV2, SkyReelsV2ImageToVideo
from diffpeft.families.wan import Wan, WanImageToVideo
from diffpeft.families.z_image import ZImage

FAMILIES: dict[str, type[Family]] = {  # those that can be trained
    "sd15": StableDiffusion,
    "sd2": StableDiffusion2,
    "sdxl": StableDiffusionXL,
    "flux": Flux,
    "flux_kontext": FluxKontext,
    "flux_control": FluxControl,
    "flux_fill": FluxFill,
    "flux2": Flux2,
    "z_image": ZImage,
    "qwen_image": QwenImage,
    "qwen_image_edit": QwenImageEdit,
    "qwen_image_edit_plus": QwenImageEditPlus,
    "longcat_image_edit": LongCatImageEdit,
    "kandinsky5_edit": Kandinsky5Edit,
    "chroma": Chroma,
    "sd3": StableDiffusion3,
    "lumina2": Lumina2,
    "pixart": PixArt,
    "sana": Sana,
    "auraflow": AuraFlow,
    "cogview4": CogView4,
    "hidream": HiDream,
    "krea2": Krea2,
    "ideogram4": Ideogram4,
    "ernie_image": ErnieImage,
    "cosmos": Cosmos,
    "cosmos_i2v": CosmosImageToVideo,
    "cosmos25": Cosmos25,
    "wan": Wan,
    "wan_i2v": WanImageToVideo,
    "ltx_i2v": LTXImageToVideo,
    "ltx": LTX,
    "hunyuan_video": HunyuanVideo,
    "hunyuan_video15": HunyuanVideo15,
    "hunyuan_video15_i2v": HunyuanVideo15ImageToVideo,
    "ltx2": LTX2,
    "ltx2_i2v": LTX2ImageToVideo,
    "cogvideox": CogVideoX,
    "cogvideox_i2v": CogVideoXImageToVideo,
    "mochi": Mochi,
    "sana_video": SanaVideo,
    "kandinsky5_video": Kandinsky5Video,
    "skyreels_v2": SkyReelsV2,
    "skyreels_v2_i2v": SkyReelsV2ImageToVideo,
    "skyreels_v1_i2v": SkyReelsImageToVideo,
    "sana_video_i2v": SanaImageToVideo,
    "kandinsky5_i2v": Kandinsky5ImageToVideo,
    "easyanimate": EasyAnimate,
    **FOLLOWED,
    (_OTHERS := "generic"): Generic,  # what has no family of its own
}

# {diffusers' class of a denoiser: the family whose layer names and sizes it has}. A class that is not here is of no family that is known.
_MODELS = {
    "UNet2DConditionModel": "sd15",
    "DreamLiteUNetModel": None,  # derived from it, with other layers
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
    "HunyuanVideo15Transformer3DModel": "hunyuan_video15",
    "HunyuanVideoFramepackTransformer3DModel": "framepack",
    "Kandinsky5Transformer3DModel": "kandinsky5",
    "SanaVideoTransformer3DModel": "sana_video",
    "SkyReelsV2Transformer3DModel": "skyreels_v2",
    "HeliosTransformer3DModel": "helios",
    "ChronoEditTransformer3DModel": "chrono_edit",
    "WanAnimate2Transformer3DModel": "wan_animate2",
    "MiniMaxH3Transformer3DModel": "minimax_h3",
    "Flux3Transformer2DModel": "flux3",
    "AceStepTransformer1DModel": "ace_step",
    "Krea2Transformer2DModel": "krea2",
    "CosmosTransformer3DModel": "cosmos",
    "Ideogram4Transformer2DModel": "ideogram4",
    "ErnieImageTransformer2DModel": "ernie_image",
    "CogView4Transformer2DModel": "cogview4",
    "HunyuanImageTransformer2DModel": "hunyuan_image",
    "QwenImage21Transformer2DModel": "qwen_image21",
    "LongCatImageTransformer2DModel": "longcat_image",
    "OvisImageTransformer2DModel": "ovis_image",
    "BriaTransformer2DModel": "bria",
    "BriaFiboTransformer2DModel": "bria_fibo",
    "BriaFibo2Transformer2DModel": "bria_fibo2",
    "PRXTransformer2DModel": "prx",
    "GlmImageTransformer2DModel": "glm_image",
    "NucleusMoEImageTransformer2DModel": "nucleus_image",
}
# {what the names of pipelines begin with: the family}; of several that fit, the longest counts. What a class in FAMILIES is trained from begins its own,
# and here are those of which there is none.
_PIPELINES: dict[str, str | None] = {
    **{name.removesuffix("Pipeline"): family for family, kind in FAMILIES.items() for name in kind.pipelines},
    "StableDiffusion": "sd15",  # and sd2, which a width tells
    "Flux3": "flux3",
    "HunyuanVideoFramepack": "framepack",
    "SanaWM": None,
    "WanAnimate2": "wan_animate2",
    "Kandinsky5": "kandinsky5",
    "Helios": "helios",
    "ChronoEdit": "chrono_edit",
    "MiniMaxH3": "minimax_h3",
    "AceStep": "ace_step",
    "Cosmos": "cosmos",
    "Cosmos3": None,
    "Anima": "cosmos",
    "GlmImage": "glm_image",
}
_NAMED_AS = {
    "kolors": "sdxl",
    "kandinsky5_video": "kandinsky5",
    "kandinsky5_edit": "kandinsky5",
    "longcat_image_edit": "longcat_image",
}  # {family: the one that has its layer names}
# the cross-attention widths that tell families with one class apart: {the class's family: {width: family}}
_WIDTHS = {"sd15": UNETS, "sdxl": {width: family for width, family in UNETS.items() if family == "sdxl_refiner"}}


def family_of(target: object) -> str | None:
    """The family id of a pipeline or model, by the class of its denoiser; None if that tells none. UNets have one class: of these the pipeline's name
    tells, and the cross-attention width (SD2.x is SD1.x with one of 1024).
    """
    denoiser = _denoiser(target)
    family = _by_class(denoiser)
    width = getattr(getattr(denoiser, "config", None), "cross_attention_dim", None)
    if denoiser is None or (family == "sd15" and isinstance(getattr(target, "components", None), Mapping)):
        by_name = _by_name(base.__name__ for base in type(target).__mro__)
        family = by_name if denoiser is None or width not in UNETS else by_name or UNETS[width]
    family = _by_width(family, width)
    return named_as(family) if family else None


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


def _by_name(pipelines: Iterable[str]) -> str | None:
    """The family of a pipeline's class by its name, or of one that it is derived from."""
    for name in pipelines:
        if starts := [start for start in _PIPELINES if name.startswith(start)]:
            return _PIPELINES[max(starts, key=len)]
    return None


def _by_width(family: str | None, width: object) -> str | None:
    """The family among those with one class that has this cross-attention width."""
    return _WIDTHS.get(family or "", {}).get(width, family) if isinstance(width, int) else family


def _by_class(model: object) -> str | None:
    """The family of a model's class, or of one that it is derived from."""
    return next((_MODELS[base.__name__] for base in type(model).__mro__ if base.__name__ in _MODELS), None)


def trainable(pipeline: str, configs: Configs, where: object = "") -> str:
    """The family in FAMILIES of a pipeline, by the name of its class and its components' configs, which may lack anything.

    Raises WrongBaseError for one that cannot be trained yet, and for a denoiser that reads more than the latents of one image.
    """
    family, vae = _by_configs(pipeline, configs, where), configs.get("vae", {})
    if family == _OTHERS:
        return family
    kind = FAMILIES[family]
    read, made = configs.get(kind.denoiser, {}).get("in_channels"), vae.get("latent_channels") or vae.get("z_dim")
    if read and made and read not in {kind.channels(made), *((made,) if kind.first_frame else ())}:
        pictures = "an image and its control image" if kind.aligned else "an image"
        raise WrongBaseError(
            f"its denoiser reads {read} channels and not the {kind.channels(made)} of {pictures}: it cannot be trained",
            where=where,
            remedy="It is for inpainting, editing or upscaling: take the model that it was made from.",
        )
    return family


def _by_configs(pipeline: str, configs: Configs, where: object) -> str:
    """The family in FAMILIES that trains a pipeline. Raises WrongBaseError for one of a known family that is for something else."""
    named = _by_width(_by_name([pipeline]), configs.get("unet", {}).get("cross_attention_dim"))
    ids = [id for id, cls in FAMILIES.items() if pipeline in cls.pipelines]
    if not ids and named not in {*FAMILIES, *_WIDTHS["sd15"].values()}:
        return _OTHERS
    family = named if named in ids else next((id for id in ids if is_of(id, [named])), None)
    if family is None:
        raise _refusal(pipeline, ids, named, where)
    return family


def _refusal(pipeline: str, ids: Collection[str], named: str | None, where: object) -> WrongBaseError:
    """The error of a pipeline of a known kind of model that is not trained: `ids` are the families of its class, whose text width is that of `named`."""
    if ids:
        return WrongBaseError(
            f"a {pipeline} with the text width of {named} cannot be trained",
            where=where,
            remedy=f"Those of {', '.join(ids)} can: pass the base model.",
        )
    tables = {named_as(family) for family in (_by_name([pipeline]), named) if family}
    kin = [id for id in FAMILIES if named_as(id) in tables]
    pipelines = _names(FAMILIES[id].pipelines for id in kin)
    return WrongBaseError(
        f"a {pipeline} cannot be trained: it is for another task than those that models of its kind are trained for",
        where=where,
        remedy=f"Pass the folder or the Hub id of a {' or a '.join(pipelines)} of this kind ({', '.join(kin)}). "
        "docs/families.md lists what is trained.",
    )


def is_of(family: str, others: Iterable[str | None]) -> bool:
    """Whether a family in FAMILIES is one of others, or a variant of one: with its layers and the files of its checkpoints."""
    kinds = tuple(FAMILIES[other] for other in others if other in FAMILIES)
    return family in others or issubclass(FAMILIES[family], kinds)


def named_as(family: str) -> str | None:
    """The family in TABLES whose layer names a family has; None if its model's own are all."""
    family = _NAMED_AS.get(family, family)
    if family in TABLES or family not in FAMILIES:
        return family if family in TABLES else None  # some are known by their pipeline's name alone
    ids = {kind: _NAMED_AS.get(name, name) for name, kind in FAMILIES.items()}
    return next((ids[base] for base in FAMILIES[family].__mro__ if ids.get(base) in TABLES), None)


def _names(groups: Iterable[Iterable[str]]) -> list[str]:
    """Each name once."""
    return list(dict.fromkeys(name for group in groups for name in group))


def open_family(target: object, reading: CaptionReading = USUAL) -> Family:
    """The training side of a pipeline, or of Parts of one.

    Raises WrongBaseError for one that cannot be trained yet, ConfigError for a way to read captions that it cannot.
    """
    parts = target if isinstance(target, Parts) else Parts(target)
    return FAMILIES[trainable(type(parts.pipe).__name__, parts.configs)](parts, reading)


__all__ = [
    "FAMILIES",
    "Conditions",
    "Configs",
    "Family",
    "Frame",
    "Generic",
    "Noised",
    "Parts",
    "CaptionReading",
    "family_of",
    "is_of",
    "is_unnamed",
    "named_as",
    "open_family",
    "trainable",
]
