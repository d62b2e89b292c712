"""Which programs read a file as it is meant, from its header.

What is known of stock diffusers was tried with it, family by family: its own format holds all; of flat names it passes over some layers, without a word,
and of DoRAs the magnitudes; the joint layers of Flux it takes apart by the published width. What is known of ComfyUI was tried with its loader
(`model_lora_keys_unet`, `load_lora`, `calculate_weight`) on its own models: it reads a model's original names of every family that it has, and diffusers'
names where it has a map from one to the other; of the later families this is read in its maps.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping

from diffpeft.converters.formats import FORMATS
from diffpeft.files import Json, parsed

# which programs read a format at all, those first that it is for: {format: (of LoRA and DoRA, of the other methods)}
READERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "kohya": (("sd-scripts", "A1111", "ComfyUI", "diffusers"), ("A1111", "ComfyUI", "LyCORIS")),
    "diffusers": (("diffusers", "ComfyUI"), ()),
    "peft": (("PEFT", "transformers"), ("PEFT",)),
    "kohya-diffusers": (("sd-scripts", "A1111", "ComfyUI", "diffusers"), ("A1111", "ComfyUI", "LyCORIS")),
    "comfyui": (("ComfyUI", "diffusers"), ("ComfyUI",)),
    "lycoris": (("LyCORIS", "ComfyUI"), ("LyCORIS", "ComfyUI")),
    "diffusers-old": (("diffusers", "ComfyUI"), ()),
    "xlabs": (("x-flux", "ComfyUI", "diffusers"), ()),
    "bfl": (("diffusers", "ComfyUI"), ("diffusers", "ComfyUI")),
    "safeloras": (("cloneofsimo/lora",), ()),
    "onetrainer": (("OneTrainer", "ComfyUI", "diffusers"), ("OneTrainer", "ComfyUI")),
}
OTHERS = "others"  # the families that a program's rows do not name
_UNETS = ("sd15", "sd2", "sdxl", "sdxl_refiner")
_FLUXLIKE = ("flux2", "longcat_image", "ovis_image")
_NAMED = ("kohya", "diffusers", "comfyui", "lycoris", "onetrainer")
Rows = Mapping[tuple[str, ...], Collection[str]]  # {formats: the families of which they are read}
ROWS: dict[str, Rows] = {
    "diffusers": {
        ("kohya", "kohya-diffusers", "diffusers", "diffusers-old", "xlabs", "bfl", "onetrainer"): ("any", "flux"),
        ("kohya", "kohya-diffusers", "diffusers", "diffusers-old", "onetrainer"): _UNETS,
        ("kohya", "kohya-diffusers", "diffusers", "onetrainer"): ("chroma",),
        ("kohya", "diffusers"): ("flux2", "z_image"),
        ("kohya", "diffusers", "comfyui"): ("wan", "qwen_image"),
        ("diffusers",): (OTHERS,),  # it asks the model for its names
        (): (  # it cannot load a LoRA into these at all
            *("pixart", "hunyuan_image", "hunyuan_video15", "longcat_image", "ovis_image"),
            *("bria", "glm_image", "nucleus_image", "omnigen2"),
        ),
    },
    "ComfyUI": {
        (*_NAMED, "kohya-diffusers", "diffusers-old", "xlabs", "bfl"): ("any", "flux"),
        (*_NAMED, "kohya-diffusers", "diffusers-old"): _UNETS,
        (*_NAMED, "kohya-diffusers"): ("sd3", "chroma", *_FLUXLIKE),
        _NAMED: ("qwen_image", "qwen_image21", "z_image", "hidream", "krea2"),
        ("kohya", "diffusers", "comfyui", "onetrainer"): ("auraflow", "ernie_image"),
        ("kohya", "diffusers", "comfyui"): ("pixart", "kandinsky5"),
        ("kohya", "comfyui"): (  # it has no map of diffusers' names of these
            *("lumina2", "omnigen2", "cosmos", "ideogram4", "hunyuan_video", "ltx", "ltx2", "mochi"),
            *("wan", "skyreels_v2", "chrono_edit", "helios", "minimax_h3"),
        ),
        # q, k and v are one layer, the model is in a decoder, and of flat names it knows its own alone
        ("comfyui",): ("hunyuan_video15", "ace_step", "hunyuan_image"),
    },
    "A1111": {("kohya", "kohya-diffusers"): ("any", "sd15", "sd2", "sdxl", "sd3")},
    "sd-scripts": {
        ("kohya", "kohya-diffusers"): ("any", "sd15", "sd2"),  # whose layers it calls as diffusers does
        ("kohya",): ("sdxl", "sd3", "flux", "chroma", "lumina2", "hunyuan_image", "cosmos"),
    },
    "OneTrainer": {
        ("onetrainer",): (
            *("any", *_UNETS, "sd3", "flux", "flux2", "chroma", "pixart", "sana", "hidream", "qwen_image", "z_image"),
            *("hunyuan_video", "cosmos", "ernie_image", "ideogram4", "krea2"),
        )
    },
    "LyCORIS": {
        ("kohya", "kohya-diffusers", "lycoris"): (
            *("any", *_UNETS, "sd3", "flux", "chroma", "flux2", "qwen_image", "z_image", "lumina2", "pixart", "sana"),
            *("auraflow", "hidream", "wan", "hunyuan_video", "ltx", "ltx2", "mochi", "cogvideox"),
        ),
        ("lycoris",): (OTHERS,),
    },
    "PEFT": {("peft",): (OTHERS,)},
    "transformers": {("peft",): (OTHERS,)},
    "x-flux": {("xlabs",): ("any", "flux")},
    "cloneofsimo/lora": {("safeloras",): ("any", "sd15", "sd2")},
}
# {program: {family: the formats of which it reads LoRAs of it as they are meant}}; of a family that is not here those of OTHERS, if any
READ_BY = {
    program: {family: formats for formats, families in rows.items() for family in families}
    for program, rows in ROWS.items()
}
_FLAT = ("kohya-diffusers", "onetrainer")  # diffusers' names with underscores
_FLUX2S = r"(double_stream_modulation_(img|txt)|single_stream_modulation|time_guidance_embed)[._].*"
_HUNYUANS = r"(guidance_in|time_in)\..*|txt_in\.[ct]_embedder\..*"
_HUNYUANS_FLAT = r".*_(mlp_fc[12]|mod_linear|modulation_linear|mlp_[02]|embedder_linear_[12])"
# {program: {(family, format): the layers, as the file spells them, of which it reads nothing}}
_PASSED_OVER: dict[str, dict[tuple[str, str], str]] = {
    "diffusers": {
        **{("sdxl", format): r"unet\.add_embedding_.*" for format in _FLAT},
        **{
            (family, format): r"transformer\.single_transformer_blocks_\d+_(proj_mlp|proj_out|norm_linear)"
            for family in ("flux", "chroma")
            for format in _FLAT
        },
        ("flux2", "kohya"): r"transformer\.(.*_stream_modulation.*_lin|final_layer_adaLN_modulation_1|guidance_in_.*)",
        **{("wan", format): r"transformer\.(?!blocks[._]).*" for format in ("kohya", "comfyui")},
        ("z_image", "kohya"): r"transformer\.(final_layer_.*|x_embedder)",
        **{(family, "diffusers"): r"transformer\..*\.conv_depth" for family in ("sana", "sana_video")},  # groups
    },
    "ComfyUI": {
        **{("flux2", format): rf"transformer\.{_FLUX2S}" for format in ("diffusers", *_FLAT, "lycoris")},
        **{
            ("chroma", format): r"transformer\.distilled_guidance_layer[._].*"
            for format in ("diffusers", *_FLAT, "lycoris")
        },
        ("hunyuan_video", "comfyui"): rf"transformer\.({_HUNYUANS})",
        ("hunyuan_video", "kohya"): _HUNYUANS_FLAT,
    },
}
_WIDTH = 3072  # of Flux, by which diffusers takes joint layers apart
_JOINT = {r".*_attn_qkv": 3 * _WIDTH, r".*_linear1": 7 * _WIDTH}  # {layer: its rows}
Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]  # {component.layer as a file spells it: {role: shape}}


def readers(
    format: str,
    methods: Collection[str],
    family: str = "any",
    layers: Shapes | None = None,
    metadata: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """The programs that read these methods in a format, and with `layers` and `metadata` these ones.

    What they make of a model of an unknown family nobody knows, but that PEFT asks the model itself.
    """
    if not family and not FORMATS[format].folder:
        return ()
    low_rank, others = READERS[format]
    plain = {*methods} <= {"lora", "dora"}
    cannot = _failing(format, methods, family, layers or {}, metadata or {}) if plain else set[str]()
    names = [n for n in (low_rank if plain else others) if n not in cannot and reads(n, format, family)]
    return tuple(n for n in names if not _passes_over(n, format, family, layers or {}))


def reads(program: str, format: str, family: str) -> bool:
    """Whether a program that reads a format reads it of a family."""
    by_family = READ_BY[program]
    return format in by_family.get(family, by_family.get(OTHERS, ()))


def _passes_over(program: str, format: str, family: str, layers: Shapes) -> bool:
    """Whether a program reads nothing of some of these layers."""
    passed_over = _PASSED_OVER.get(program, {}).get((family, format))
    return passed_over is not None and any(re.fullmatch(passed_over, layer) for layer in layers)


def _failing(
    format: str, methods: Collection[str], family: str, layers: Shapes, metadata: Mapping[str, str]
) -> set[str]:
    """The programs that read the format, and not these LoRAs or DoRAs."""
    magnitudes, theirs = "dora" in methods, format == "diffusers"
    two = any(
        layer.startswith("transformer_2.") for layer in layers
    )  # denoisers in one file, of which others read the first
    failing = {
        "diffusers": two or (not theirs and (magnitudes or _apart(format, family, layers))),
        "sd-scripts": magnitudes,
        "ComfyUI": theirs and (two or magnitudes or _unlike(layers, metadata)),
    }
    return {name for name, fails in failing.items() if fails}


def _apart(format: str, family: str, layers: Shapes) -> bool:
    """Whether diffusers would take joint layers apart at other rows than these have, or not know Wan's names by those that it looks for."""
    if (family, format) == ("wan", "kohya"):
        return not any("_ffn_" in layer for layer in layers)
    if format != "kohya" or family not in ("flux", "chroma"):
        return False
    rows = [(layer, roles["lora_B"][0]) for layer, roles in layers.items() if roles.get("lora_B")]
    return any(re.fullmatch(joint, layer) and n != size for layer, n in rows for joint, size in _JOINT.items())


def _unlike(layers: Shapes, metadata: Mapping[str, str]) -> bool:
    """Whether ComfyUI makes something else of diffusers' own format: it reads no alphas in metadata, and of a UNet's attention no layer."""
    if any(re.match(r"unet\..*\.to_(q|k|v|out)", layer) for layer in layers):
        return True
    try:
        config = parsed(metadata.get("lora_adapter_metadata", "{}"), items=1 << 20)
    except ValueError:
        return True
    components = {key.rpartition(".")[0] for key in config if key.endswith("lora_alpha")}
    return any(_scaled(config, f"{component}." if component else "") for component in components)


def _scaled(config: Json, prefix: str) -> bool:
    """Whether a PEFT config says alphas that are not the ranks."""
    rank, alpha = (config.get(f"{prefix}{name}") for name in ("r", "lora_alpha"))
    ranks, alphas = (config.get(f"{prefix}{name}_pattern") or {} for name in ("rank", "alpha"))
    return rank != alpha or json.dumps(ranks, sort_keys=True) != json.dumps(alphas, sort_keys=True)
