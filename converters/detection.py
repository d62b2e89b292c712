"""Which format and which families a file's names and shapes fit. Reads the header only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from converters.formats import FORMATS
from diffpeft.bundle import Handle
from diffpeft.errors import UnknownKeysError, listed

# Names (dots written as underscores) that only these families have. SD1.x and SD2.x have the names that are left.
SIGNS = (
    (
        ("sdxl", "sdxl_refiner"),
        r"(lora_unet_)?(input_blocks_\d+|middle_block_\d+|output_blocks_\d+)_|(lora_te2|text_encoder_2)_text_model_encoder"
        r"|.*(down_blocks_\d+|mid_block|up_blocks_\d+)_attentions_\d+_transformer_blocks_[1-9]",
    ),
    (("sd3",), r".*joint_blocks_\d+_|transformer_transformer_blocks_\d+_(attn2_|norm1_context)"),
    (
        ("flux", "chroma"),
        r".*(double_blocks_\d+_(img|txt)_(attn|mlp_[02]|mod_lin)|single_blocks_\d+_(linear|modulation)|single_transformer_blocks_\d+_)",
    ),
    (("hunyuan_video",), r".*(double_blocks_\d+_(img|txt)_(mlp_fc|mod_linear)|individual_token_refiner)"),
    (("qwen_image",), r".*transformer_blocks_\d+_(img|txt)_(mlp_net|mod_1)"),
    (("wan",), r".*(blocks_\d+_(self_attn|cross_attn|ffn)_|condition_embedder_)"),
    (("z_image", "lumina2"), r".*(layers|noise_refiner|context_refiner)_\d+_(attention|feed_forward)_"),
    (("auraflow",), r".*(joint_transformer_blocks|double_layers)_\d+_"),
    (("hidream",), r".*(double|single)_stream_blocks_\d+_"),
)
_CROSS = re.compile(
    r".*(down_blocks_\d+|mid_block|up_blocks_\d+)_attentions_\d+_transformer_blocks_\d+_attn2_to_[kv][._](lora_(down|A)|hada_w[12]_b)"
)
_START = re.compile(r"^(base_model\.model\.|oft_unet_)")  # PEFT's and sd-scripts' OFT's, before the layer's own name
_UNET = re.compile(r"(lora_unet_|unet_)?(down_blocks|mid_block|up_blocks|conv_(in|out)|time_embedding)_")
_TEXT, _DENOISER = (
    re.compile(r"lora_te|text_encoder|text_model_|encoder_layers_"),
    re.compile(r"lora_unet_|lora_transformer_|unet_|transformer_"),
)
_TEXT_ONLY_FAMILIES = ("sd15", "sd2", "sdxl", "sd3", "flux")
WIDTHS = {768: ("sd15",), 1024: ("sd2",), 2048: ("sdxl",), 1280: ("sdxl_refiner",)}


@dataclass(frozen=True)
class Detection:
    """What a file is: its format, its likeliest family, the methods in it, how sure that is (0 to 1), and the other families that fit."""

    format: str
    family: str
    methods: frozenset[str]
    confidence: float
    alternatives: tuple[str, ...] = ()


def format_of(keys: Iterable[str], source: str) -> str:
    """The format that most keys are of. Raises UnknownKeysError if no key is of any format."""
    keys = list(keys)
    counts = {name: sum(fmt.split(key) is not None for key in keys) for name, fmt in FORMATS.items()}
    best = max(counts, key=counts.__getitem__)
    if not counts[best]:
        raise UnknownKeysError(
            "this holds no adapter that is known here",
            where=f"{source}: {listed(keys[:3])}{' ...' if len(keys) > 3 else ''}",
            remedy=f"Readable are the formats {', '.join(FORMATS)}.",
        )
    return best


def families_of(tensors: Mapping[str, Handle]) -> tuple[str, ...]:
    """Every family the names fit, the likeliest first. Between SD1.x and SD2.x, whose names are equal, the cross-attention width decides."""
    flat = {_START.sub("", key).replace(".", "_"): handle for key, handle in tensors.items()}
    signed = [families for families, sign in SIGNS if any(re.match(sign, key) for key in flat)]
    if signed:
        return signed[0]
    widths = {handle.shape[1] for key, handle in flat.items() if _CROSS.match(key) and len(handle.shape) >= 2}
    if widths:
        return WIDTHS.get(min(widths), ("sd15",))
    if any(_UNET.match(key) for key in flat):
        return ("sd15", "sd2")
    return (
        _TEXT_ONLY_FAMILIES
        if any(_TEXT.match(key) for key in flat) and not any(_DENOISER.match(key) for key in flat)
        else ()
    )
